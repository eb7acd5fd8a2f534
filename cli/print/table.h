// This header formats output for people: aligned tables, numbers with units, and bars. Nothing here
// prints.
//   Threads  any; a Table belongs to one thread
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

// A Table has rows of cells under titled columns. The width of a cell is its number of code points
// in UTF-8.
class Table {
 public:
  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}
  // Adds a row. If it has fewer cells than there are columns, the others are empty; cells beyond
  // the last column are dropped.
  void AddRow(std::vector<std::string> cells);
  bool empty() const { return rows_.empty(); }
  // Returns the line of titles, then one line for each row. Every line ends with a newline and has
  // no trailing blanks. Columns are two spaces apart. A column whose cells are all empty is left
  // out, with its title.
  std::string Render() const;

 private:
  const std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

// Returns a count with its noun, to which an "s" is added unless the count is 1.
std::string Plural(uint64_t count, const std::string& noun);  // "1 shard", "2 shards"
// Return a number with the unit that fits its size.
std::string HumanBytes(uint64_t bytes);    // "0 B", "1023 B", "1.5 KiB", "12.0 GiB"
std::string HumanCount(uint64_t count);    // "999", "1.2 k", "10.7 M"
std::string HumanSeconds(double seconds);  // "0.8 ms", "12.3 s", "4 m 05 s", "2 h 03 m"
// Returns a bar of `width` characters, of which the share `part` / `whole` is filled: Unicode
// blocks if `unicode`, else # and dots. The bar is empty if `whole` is 0, and full if `part` is
// larger than `whole`.
std::string Bar(uint64_t part, uint64_t whole, int width, bool unicode);

}  // namespace orlop::cli
