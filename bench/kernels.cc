// bench kernels: one fused step of every optimizer and state format in this process, on one thread
// and on all, beside a plain copy that moves the same number of bytes in the same round. Also the
// staging of a gradient (copy, squared norm, non-finite count) beside its copy alone, and the
// digest of bf16 weights beside a copy of half of them.
//   Bytes   of one parameter: all that a step reads and writes of gradient (bf16), weight,
//           remainder, states and their absmax, in place. The copy reads half of them and writes
//           the other half.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <ratio>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "base/checksum.h"
#include "base/thread_pool.h"
#include "bench/bench.h"
#include "kernels/blocks.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "kernels/reduce.h"
#include "kernels/tensor_pass.h"
#include "kernels/types.h"

namespace orlop::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kTaskElements = size_t{1} << 18;

// Zeroed memory of its own, in huge pages if possible, like the servers' memory.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    data_ = at == MAP_FAILED ? nullptr : static_cast<char*>(at);
    if (data_ == nullptr) return;
    madvise(data_, bytes, MADV_HUGEPAGE);
    std::memset(data_, 0, bytes);
  }
  ~Memory() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return data_; }

 private:
  const size_t bytes_;
  char* data_;
};

// One tensor with room for every format, and for the copies.
struct Tensor {
  explicit Tensor(size_t count)
      : count(count),
        gradient(2 * count),
        weight(2 * count),
        remainder(2 * count),
        copy(kLargestHalf * 2 * count) {
    for (size_t i = 0; i < kernels::kMaxStates; ++i) {
      values[i] = std::make_unique<Memory>(4 * count);
      absmax[i] = std::make_unique<Memory>(4 * kernels::FourBitBlockCount(count));
    }
  }
  bool ok() const {
    bool all = gradient.data() && weight.data() && remainder.data() && copy.data();
    for (size_t i = 0; i < kernels::kMaxStates; ++i)
      all = all && values[i]->data() && absmax[i]->data();
    return all;
  }
  // Sets gradients of a normal distribution, weights thirty times as large, and no state.
  void Fill() {
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0, 1e-3f);
    std::vector<uint16_t> bits(1 << 16);
    for (uint16_t& value : bits) {
      const float x = normal(random);
      uint32_t wide;
      std::memcpy(&wide, &x, sizeof(wide));
      value = static_cast<uint16_t>(wide >> 16);
    }
    for (size_t i = 0; i < count; ++i) {
      reinterpret_cast<uint16_t*>(gradient.data())[i] = bits[(i * 7 + (i >> 16)) & 0xFFFF];
      reinterpret_cast<uint16_t*>(weight.data())[i] = bits[i & 0xFFFF] + (5 << 7);
    }
  }

  // Bytes of one parameter that the largest copy reads.
  static constexpr size_t kLargestHalf = 17;
  size_t count;
  Memory gradient, weight, remainder, copy;
  std::unique_ptr<Memory> values[kernels::kMaxStates], absmax[kernels::kMaxStates];
};

struct Workload {
  const kernels::Optimizer* optimizer;
  kernels::StateFormat format;
  std::string name;  // kernels.adamw.8bit
};

double BytesOfState(kernels::StateFormat format) {
  switch (format) {
    case kernels::StateFormat::kFp32:
      return 4;
    case kernels::StateFormat::k8Bit:
      return 1 + 4.0 / kernels::kQuantBlock;
    case kernels::StateFormat::k4Bit:
      return 0.5 + 4.0 / kernels::kFourBitBlock;
  }
  return 0;
}

double BytesOf(const Workload& work) {
  return 2 + 2 * (2 + 2 +
                  static_cast<double>(work.optimizer->states.size()) * BytesOfState(work.format));
}

std::vector<double> DefaultsOf(const kernels::Optimizer& optimizer) {
  std::vector<double> values;
  for (const kernels::HyperParameter& parameter : optimizer.hyper_parameters)
    values.push_back(absl::string_view(parameter.name) == "momentum" ? 0.9
                                                                     : parameter.default_value);
  return values;
}

// Sets the states to the codes of zero.
void ResetState(const Workload& work, Tensor* tensor) {
  for (size_t i = 0; i < work.optimizer->states.size(); ++i) {
    const bool is_signed = work.optimizer->states[i].code_book == kernels::CodeBook::kSigned;
    const int zero = work.format == kernels::StateFormat::kFp32 || !is_signed ? 0
                     : work.format == kernels::StateFormat::k8Bit
                         ? kernels::kSignedZeroCode
                         : kernels::kSigned4ZeroCode * 0x11;
    std::memset(tensor->values[i]->data(), zero, 4 * tensor->count);
    std::memset(tensor->absmax[i]->data(), 0, 4 * kernels::FourBitBlockCount(tensor->count));
  }
}

// The first phase of an optimizer that reads the whole tensor, on one thread as on a server. The
// tensor is one matrix of kColumns columns. For kMatrix only the element-wise part is measured,
// with any update.
class Look {
 public:
  static constexpr uint64_t kColumns = 4096;
  absl::Status Take(const kernels::RangeStep& whole, const kernels::StepScalars& scalars) {
    const kernels::MatrixShape shape{1, whole.gradient.count / kColumns, kColumns, true};
    memory_.resize((kernels::PassMemory::Bytes(*whole.optimizer, shape) + 7) / 8);
    kernels::TensorPass& pass =
        pass_.emplace(*whole.optimizer, shape, scalars,
                      kernels::PassMemory(*whole.optimizer, shape, memory_.data()));
    for (int round = 0; round < pass.rounds(); ++round) {
      if (absl::Status status = pass.Add(whole, 0); !status.ok()) return status;
      pass.EndRound();
    }
    return absl::OkStatus();
  }
  void Finish(kernels::RangeStep* whole) const {
    if (pass_) pass_->Finish(0, whole);
  }

 private:
  std::vector<double> memory_;
  std::optional<kernels::TensorPass> pass_;
};

absl::Status StepAll(const Workload& work, int64_t applied, Tensor* tensor, ThreadPool* pool) {
  kernels::RangeStep whole;
  const kernels::StepScalars scalars =
      work.optimizer->Prepare(DefaultsOf(*work.optimizer), applied, 1);
  whole.optimizer = work.optimizer;
  whole.scalars = scalars.span();
  whole.gradient = {kernels::DType::kBF16, tensor->gradient.data(), tensor->count};
  whole.weight = whole.new_weight = reinterpret_cast<uint16_t*>(tensor->weight.data());
  whole.remainder = tensor->remainder.data();
  whole.format = work.format;
  for (size_t i = 0; i < work.optimizer->states.size(); ++i)
    whole.states[i] = {tensor->values[i]->data(),
                       reinterpret_cast<float*>(tensor->absmax[i]->data())};
  Look look;
  if (work.optimizer->scope == kernels::Scope::kMatrix) {
    whole.input.values = reinterpret_cast<const float*>(tensor->copy.data());
  } else if (work.optimizer->scope != kernels::Scope::kElement) {
    if (absl::Status status = look.Take(whole, scalars); !status.ok()) return status;
    look.Finish(&whole);
  }
  std::vector<absl::Status> done(tensor->count / kTaskElements);
  pool->Run(done.size(), [&](size_t i) {
    done[i] = kernels::Step(kernels::PartOf(whole, i * kTaskElements, kTaskElements));
  });
  for (const absl::Status& status : done)
    if (!status.ok()) return status;
  return absl::OkStatus();
}

void CopyAll(double bytes_per_parameter, Tensor* tensor, ThreadPool* pool) {
  const auto half = static_cast<size_t>(bytes_per_parameter / 2 * kTaskElements);
  char* const to = tensor->copy.data();
  const char* const from = to + Tensor::kLargestHalf * tensor->count;
  pool->Run(tensor->count / kTaskElements,
            [&](size_t i) { std::memcpy(to + i * half, from + i * half, half); });
}

// Stages into the memory of the copies, which is never read.
void StageAll(bool with_sums, Tensor* tensor, ThreadPool* pool) {
  constexpr size_t kBytes = 2 * kTaskElements;
  pool->Run(tensor->count / kTaskElements, [&](size_t i) {
    char* const to = tensor->copy.data() + i * kBytes;
    const char* const from = tensor->gradient.data() + i * kBytes;
    if (!with_sums) {
      std::memcpy(to, from, kBytes);
      return;
    }
    kernels::BlockSums sums;
    kernels::CopyAndReduce(to, {kernels::DType::kBF16, from, kTaskElements}, &sums);
  });
}

// Hashes the weights, as a worker does to find out which have changed.
void DigestAll(Tensor* tensor, ThreadPool* pool) {
  constexpr size_t kBytes = 4 * kLeafBytes;
  const absl::Span<const char> weights(tensor->weight.data(), 2 * tensor->count);
  std::vector<std::vector<uint64_t>> leaves((weights.size() + kBytes - 1) / kBytes);
  pool->Run(leaves.size(),
            [&](size_t i) { leaves[i] = LeafHashes(weights.subspan(i * kBytes, kBytes)); });
}

double NanosecondsPerParameter(const std::function<void()>& run, size_t count) {
  const Clock::time_point start = Clock::now();
  run();
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count() /
         static_cast<double>(count);
}

std::vector<Workload> Workloads() {
  std::vector<Workload> list;
  for (const kernels::OptimizerUnit& unit : kernels::OptimizerUnits()) {
    const std::string name = absl::StrCat("kernels.", unit.optimizer.name);
    list.push_back({&unit.optimizer, kernels::StateFormat::kFp32, name + ".fp32"});
    list.push_back({&unit.optimizer, kernels::StateFormat::k8Bit, name + ".8bit"});
    if (absl::string_view(unit.optimizer.name) == "adamw")
      list.push_back({&unit.optimizer, kernels::StateFormat::k4Bit, name + ".4bit"});
  }
  return list;
}

// Measures time and bandwidth of `run` and `copy`, in turns.
void Measure(const std::string& name, const std::string& suffix, double bytes, int repetitions,
             size_t count, const std::function<void()>& run, const std::function<void()>& copy,
             std::vector<Figure>* figures) {
  Figure time{name + suffix, "ns/parameter", "lower", {}, "copy", {}};
  Figure rate{name + suffix + ".bandwidth", "GB/s", "higher", {}, "copy", {}};
  for (int round = -1; round < repetitions; ++round) {
    const double copied = NanosecondsPerParameter(copy, count);
    const double stepped = NanosecondsPerParameter(run, count);
    if (round < 0) continue;
    time.values.push_back(stepped);
    time.baseline_values.push_back(copied);
    rate.values.push_back(bytes / stepped);
    rate.baseline_values.push_back(bytes / copied);
  }
  figures->push_back(std::move(time));
  figures->push_back(std::move(rate));
}

}  // namespace

absl::StatusOr<std::vector<Figure>> BenchKernels(const Options& options) {
  const size_t count = static_cast<size_t>(std::max(options.mebiparameters, 1)) << 20;
  Tensor tensor(count);
  if (!tensor.ok())
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for ", options.mebiparameters, " Mi parameters"));
  tensor.Fill();
  std::vector<Figure> figures;
  absl::Status failed;
  const int all = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  for (const int threads : {1, all}) {
    if (threads == 1 && all == 1 && !figures.empty()) break;
    ThreadPool pool(threads - 1);
    const std::string suffix = threads == all ? "" : ".1thread";
    for (const Workload& work : Workloads()) {
      ResetState(work, &tensor);
      int64_t applied = 0;
      Measure(
          work.name, suffix, BytesOf(work), options.repetitions, count,
          [&] { failed.Update(StepAll(work, applied++, &tensor, &pool)); },
          [&] { CopyAll(BytesOf(work), &tensor, &pool); }, &figures);
      if (!failed.ok()) return failed;
    }
    Measure(
        "kernels.stage.bf16", suffix, 4, options.repetitions, count,
        [&] { StageAll(true, &tensor, &pool); }, [&] { StageAll(false, &tensor, &pool); },
        &figures);
    Measure(
        "kernels.digest.bf16", suffix, 2, options.repetitions, count,
        [&] { DigestAll(&tensor, &pool); }, [&] { CopyAll(2, &tensor, &pool); }, &figures);
  }
  return figures;
}

}  // namespace orlop::bench
