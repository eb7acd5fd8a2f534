// `orlop bench NAME` runs named workloads beside their baselines. They are interleaved in one run,
// because machines drift and only ratios within a run are meaningful.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace orlop::bench {

struct Options {
  std::string name;
  // Measured rounds; one round before them is not measured.
  int repetitions = 15;
  // wire: MiB of payload in a round, both servers together; 128 by default.
  // flush: MiB of state that the job has, rounded up to whole tensors; 256 by default.
  std::optional<int> mebibytes;
  // kernels: Mi parameters of the tensor.
  int mebiparameters = 16;
  // wire, step, flush: an existing directory, where the private servers' data directories are
  // created and removed. Empty: the directory for temporary files.
  std::string data_dir;
  bool json = false;
};

// One quantity and its baseline, both measured in every round.
struct Figure {
  std::string name, unit, better;  // better: "higher" or "lower"
  std::vector<double> values;      // one per round
  std::string baseline_name;
  std::vector<double> baseline_values;  // of the same rounds
};

// Status: an error that kept the workload from running, or one that names a wrong result.
absl::StatusOr<std::vector<Figure>> BenchWire(const Options& options);
absl::StatusOr<std::vector<Figure>> BenchStep(const Options& options);
absl::StatusOr<std::vector<Figure>> BenchKernels(const Options& options);
absl::StatusOr<std::vector<Figure>> BenchFlush(const Options& options);

// Runs a bench, prints its figures and returns an exit code.
int RunNamed(const Options& options);
// Runs the process at the other end of the baselines (bench/peer.h) until standard input ends.
int ServePeer();

double Median(std::vector<double> values);
// The ratio values[i] / baseline_values[i]: its median, and the interval that contains the median
// with at least 95 % confidence (order statistics of the sign test). Fewer than six rounds: the
// whole range.
struct RatioInterval {
  double low = 0, median = 0, high = 0;
};
RatioInterval PairedRatio(const Figure& figure);

}  // namespace orlop::bench
