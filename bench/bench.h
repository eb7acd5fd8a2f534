// `orlop bench NAME`: named workloads beside their baselines, interleaved in one run, since
// machines drift and only ratios within a run mean something.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace orlop::bench {

struct Options {
  std::string name;
  int repetitions = 15;     // rounds measured, after one that is not
  int mebibytes = 128;      // wire: payload of a round, both servers together
  int mebiparameters = 16;  // kernels: of the tensor
  bool json = false;
};

// One quantity beside one baseline, both measured in every round.
struct Figure {
  std::string name, unit, better;  // better: "higher" or "lower"
  std::vector<double> values;      // per round
  std::string baseline_name;
  std::vector<double> baseline_values;  // of the same rounds
};

// Statuses: whatever kept the workload from running, or a result that was not right.
absl::StatusOr<std::vector<Figure>> BenchWire(const Options& options);
absl::StatusOr<std::vector<Figure>> BenchStep(const Options& options);
absl::StatusOr<std::vector<Figure>> BenchKernels(const Options& options);

// Runs a bench and prints its figures; returns an exit code.
int RunNamed(const Options& options);
// The process at the other end of the baselines (bench/peer.h); ends when standard input does.
int ServePeer();

double Median(std::vector<double> values);
// Of values[i] / baseline_values[i]: the median and the interval that holds it with at least 95 %
// confidence (order statistics of the sign test), the whole range for fewer than six rounds.
struct RatioInterval {
  double low = 0, median = 0, high = 0;
};
RatioInterval PairedRatio(const Figure& figure);

}  // namespace orlop::bench
