#include "cli/print/table.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace orlop::cli {
namespace {

template <typename... Values>
std::string Format(const char* format, Values... values) {
  char text[64];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

size_t Width(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](unsigned char c) { return (c & 0xC0) != 0x80; }));
}

std::string Scaled(double value, double step, std::initializer_list<const char*> units) {
  auto unit = units.begin();
  // A value 0.05 below the step would be printed as "1024.0", so it already uses the next unit.
  while (value >= step - 0.05 && unit + 1 != units.end()) value /= step, ++unit;
  return Format("%.1f %s", value, *unit);
}

}  // namespace

void Table::AddRow(std::vector<std::string> cells) {
  cells.resize(columns_.size());
  rows_.push_back(std::move(cells));
}

std::string Table::Render() const {
  std::vector<size_t> widths(columns_.size(), 0);  // 0: the column is left out
  std::vector<std::string> titles;
  for (const auto& row : rows_)
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], Width(row[i]));
  for (size_t i = 0; i < columns_.size(); ++i) {
    titles.push_back(columns_[i].title);
    if (widths[i] > 0) widths[i] = std::max(widths[i], Width(columns_[i].title));
  }
  std::string text;
  const auto append = [&](const std::vector<std::string>& row) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      if (widths[i] == 0) continue;
      const std::string blanks(widths[i] - Width(row[i]), ' ');
      line += (line.empty() ? "" : "  ") +
              (columns_[i].align == Align::kLeft ? row[i] + blanks : blanks + row[i]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  };
  append(titles);
  for (const auto& row : rows_) append(row);
  return text;
}

std::string Plural(uint64_t count, const std::string& noun) {
  return std::to_string(count) + " " + noun + (count == 1 ? "" : "s");
}

std::string HumanBytes(uint64_t bytes) {
  if (bytes < 1024) return Format("%llu B", static_cast<unsigned long long>(bytes));
  return Scaled(static_cast<double>(bytes) / 1024, 1024,
                {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"});
}

std::string HumanCount(uint64_t count) {
  if (count < 1000) return std::to_string(count);
  return Scaled(static_cast<double>(count) / 1000, 1000, {"k", "M", "G", "T"});
}

std::string HumanSeconds(double seconds) {
  if (seconds < 1) return Format("%.1f ms", seconds * 1000);
  if (seconds < 60) return Format("%.1f s", seconds);
  const long whole = std::lround(seconds);
  if (whole < 3600) return Format("%ld m %02ld s", whole / 60, whole % 60);
  return Format("%ld h %02ld m", whole / 3600, whole / 60 % 60);
}

std::string Bar(uint64_t part, uint64_t whole, int width, bool unicode) {
  const double share =
      whole == 0 ? 0 : std::min(1.0, static_cast<double>(part) / static_cast<double>(whole));
  const int filled = static_cast<int>(std::lround(share * width));
  std::string bar;
  for (int i = 0; i < width; ++i) bar += i < filled ? (unicode ? "█" : "#") : (unicode ? "░" : ".");
  return bar;
}

}  // namespace orlop::cli
