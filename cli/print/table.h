// Output for people: aligned tables, human units, bars. Plain ASCII if the output is not a
// terminal.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace orlop::cli {

enum class Align { kLeft, kRight };

struct Column {
  std::string title;
  Align align = Align::kLeft;
};

// Rows of cells under titled columns, two spaces apart, without trailing blanks. A column without
// any text in its cells is left out. Widths count UTF-8 characters.
class Table {
 public:
  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}
  // Missing cells are empty; more cells than columns are dropped.
  void AddRow(std::vector<std::string> cells);
  bool empty() const { return rows_.empty(); }
  std::string Render() const;

 private:
  const std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

std::string Plural(uint64_t count, const std::string& noun);  // "1 shard", "2 shards"
std::string HumanBytes(uint64_t bytes);    // "0 B", "1023 B", "1.5 KiB", "12.0 GiB"
std::string HumanCount(uint64_t count);    // "999", "1.2 k", "10.7 M"
std::string HumanSeconds(double seconds);  // "0.8 ms", "12.3 s", "4 m 05 s", "2 h 03 m"
// Returns a bar of `width` characters of which `part` / `whole` is filled: Unicode blocks if
// `unicode`, else # and dots. 0 of 0 is empty.
std::string Bar(uint64_t part, uint64_t whole, int width, bool unicode);

}  // namespace orlop::cli
