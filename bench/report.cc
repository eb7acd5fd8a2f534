// Prints the figures of a bench: a table for people, a JSON list for programs.
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/bench.h"
#include "cli/print/json.h"
#include "cli/print/print.h"
#include "cli/print/table.h"

namespace orlop::bench {
namespace {

using nlohmann::ordered_json;

std::string CpuName() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown";
}

ordered_json Machine() {
  utsname system;
  uname(&system);
  const auto memory_bytes =
      static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return {{"cpu", CpuName()},
          {"cores", sysconf(_SC_NPROCESSORS_ONLN)},
          {"memory", memory_bytes},
          {"kernel", std::string(system.sysname) + " " + system.release}};
}

std::string Number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3f", value);
  return text;
}

ordered_json ToJson(const Figure& figure) {
  const auto [low, high] = std::minmax_element(figure.values.begin(), figure.values.end());
  const double median = Median(figure.values), baseline = Median(figure.baseline_values);
  const RatioInterval paired = PairedRatio(figure);
  return {{"name", figure.name},
          {"unit", figure.unit},
          {"min", *low},
          {"median", median},
          {"max", *high},
          {"better", figure.better},
          {"baseline_name", figure.baseline_name},
          {"baseline_median", baseline},
          {"ratio", median / baseline},
          {"paired_ratio", {paired.low, paired.median, paired.high}},
          {"repetitions", figure.values.size()},
          {"machine", Machine()}};
}

void PrintTable(const std::vector<Figure>& figures) {
  using cli::Align;
  cli::Table table({{"FIGURE"},
                    {"UNIT"},
                    {"MIN", Align::kRight},
                    {"MEDIAN", Align::kRight},
                    {"MAX", Align::kRight},
                    {"BASELINE"},
                    {"ITS MEDIAN", Align::kRight},
                    {"RATIO"}});
  for (const Figure& figure : figures) {
    const auto [low, high] = std::minmax_element(figure.values.begin(), figure.values.end());
    const RatioInterval paired = PairedRatio(figure);
    table.AddRow(
        {figure.name, figure.unit, Number(*low), Number(Median(figure.values)), Number(*high),
         figure.baseline_name, Number(Median(figure.baseline_values)),
         Number(paired.median) + " [" + Number(paired.low) + ", " + Number(paired.high) + "]"});
  }
  cli::Print(table.Render() + "ratio: median over paired rounds, with its 95 % interval\n");
}

}  // namespace

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

RatioInterval PairedRatio(const Figure& figure) {
  std::vector<double> ratios;
  ratios.reserve(figure.values.size());
  for (size_t i = 0; i < figure.values.size(); ++i)
    ratios.push_back(figure.values[i] / figure.baseline_values[i]);
  std::sort(ratios.begin(), ratios.end());
  const size_t n = ratios.size();
  // k is the largest number with P(Binomial(n, 1/2) < k) <= 2.5 %: the k-th value from either end
  // bounds the median.
  size_t k = 0;
  double below = 0, term = std::pow(0.5, static_cast<double>(n));
  for (; below + term <= 0.025; ++k) {
    below += term;
    term *= static_cast<double>(n - k) / static_cast<double>(k + 1);
  }
  const size_t rank = k == 0 ? 0 : k - 1;
  return {ratios[rank], Median(ratios), ratios[n - 1 - rank]};
}

int RunNamed(const Options& options) {
  const auto figures = options.name == "wire"      ? BenchWire(options)
                       : options.name == "kernels" ? BenchKernels(options)
                       : options.name == "flush"   ? BenchFlush(options)
                                                   : BenchStep(options);
  if (!figures.ok()) {
    std::fprintf(stderr, "orlop: bench %s: %s\n", options.name.c_str(),
                 std::string(figures.status().message()).c_str());
    return cli::kFailed;
  }
  if (!options.json) return PrintTable(*figures), cli::kOk;
  auto list = ordered_json::array();
  for (const Figure& figure : *figures) list.push_back(ToJson(figure));
  cli::PrintJson(list);
  return cli::kOk;
}

}  // namespace orlop::bench
