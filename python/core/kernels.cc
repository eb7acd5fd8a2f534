// The kernels in this process, without a server, for orlop.kernels, and digests of host memory.
// Arrays are addresses of tensors that the caller in Python keeps alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "base/checksum.h"
#include "base/thread_pool.h"
#include "kernels/blocks.h"
#include "kernels/int8_blocks.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "kernels/reduce.h"
#include "kernels/targets.h"
#include "kernels/tensor_pass.h"
#include "kernels/types.h"
#include "python/core/gil.h"
#include "python/core/module.h"
#include "python/core/status.h"

namespace orlop::python {
namespace nb = nanobind;
using namespace nb::literals;

namespace {

constexpr size_t kRangeElements = size_t{1} << 18;  // elements of one task
constexpr size_t kHashedBytes = 4 * kLeafBytes;     // of one task of a digest
constexpr size_t kShardElements = size_t{1} << 22;  // the norms of shards are summed in order

template <typename T>
T* At(uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr): as torch gives it
}

template <typename T>
T Word(const char* what, const std::string& word,
       const std::vector<std::pair<const char*, T>>& known) {
  for (const auto& [name, value] : known)
    if (word == name) return value;
  throw nb::value_error((std::string(what) + " '" + word + "' is unknown").c_str());
}
kernels::DType DTypeOf(const std::string& word) {
  return Word<kernels::DType>("dtype", word,
                              {{"float32", kernels::DType::kF32},
                               {"bfloat16", kernels::DType::kBF16},
                               {"float16", kernels::DType::kF16}});
}

// Threads for tasks. Only one caller runs at a time.
struct Pool {
  std::mutex mutex;
  std::unique_ptr<ThreadPool> threads;
};

// The pool of this process. A forked child has none of its parent's threads, and begins with a new
// one.
Pool& PoolOfProcess() {
  static std::atomic<Pool*> pool = [] {
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return new Pool;
  }();
  return *pool;
}

// Runs tasks on the calling thread and a pool, without the GIL. The pool is made again if `threads`
// changes.
void RunOnPool(int threads, size_t count, const std::function<void(size_t)>& task) {
  ReleasedGil released;
  Pool& pool = PoolOfProcess();
  std::lock_guard<std::mutex> lock(pool.mutex);
  if (!pool.threads || pool.threads->thread_count() != threads - 1)
    pool.threads = std::make_unique<ThreadPool>(threads - 1);
  pool.threads->Run(count, task);
}

const kernels::Optimizer& Find(const std::string& name) {
  const kernels::Optimizer* optimizer = kernels::FindOptimizer(name);
  if (optimizer == nullptr)
    throw nb::value_error(
        ("optimizer '" + name + "' is none of " + kernels::OptimizerNames()).c_str());
  return *optimizer;
}

nb::dict Describe(const kernels::Optimizer& optimizer) {
  nb::dict out;
  nb::dict defaults;
  for (const kernels::HyperParameter& parameter : optimizer.hyper_parameters)
    defaults[parameter.name] = parameter.default_value;
  out["hyper_parameters"] = defaults;
  nb::dict states;
  for (const kernels::StateSpec& state : optimizer.states)
    states[state.name] = state.code_book == kernels::CodeBook::kSigned;
  out["states"] = states;
  out["whole_tensor"] = optimizer.scope != kernels::Scope::kElement;
  return out;
}

nb::dict Optimizers() {
  nb::dict out;
  for (const kernels::OptimizerUnit& unit : kernels::OptimizerUnits())
    out[unit.optimizer.name] = Describe(unit.optimizer);
  return out;
}

// The pass that an optimizer makes over a whole tensor before its step, and the memory of the pass.
class Pass {
 public:
  // Makes the pass. `averages` of rows, then of columns, are read and updated; null if there are
  // none.
  Pass(const kernels::RangeStep& whole, const kernels::StepScalars& scalars,
       const std::vector<uint64_t>& shape, float* averages) {
    const auto matrix = kernels::MatrixShape::Of(shape);
    memory_.resize((kernels::PassMemory::Bytes(*whole.optimizer, matrix) + 7) / 8);
    const kernels::PassMemory memory(*whole.optimizer, matrix, memory_.data());
    std::copy_n(averages, memory.rows.size(), memory.rows.begin());
    std::copy_n(averages + memory.rows.size(), memory.columns.size(), memory.columns.begin());
    pass_.emplace(*whole.optimizer, matrix, scalars, memory);
    for (int round = 0; round < pass_->rounds() && status_.ok(); ++round) {
      status_ = pass_->Add(whole, 0);
      if (status_.ok()) pass_->EndRound();
    }
    std::copy(memory.rows.begin(), memory.rows.end(), averages);
    std::copy(memory.columns.begin(), memory.columns.end(), averages + memory.rows.size());
  }
  const absl::Status& status() const { return status_; }
  void Finish(kernels::RangeStep* whole) const { pass_->Finish(0, whole); }

 private:
  std::vector<double> memory_;
  std::optional<kernels::TensorPass> pass_;
  absl::Status status_;
};

// Makes one step of a whole tensor, which the threads share in ranges.
void Step(const std::string& optimizer, const std::vector<double>& values, int64_t applied_count,
          float gradient_scale, const std::pair<uintptr_t, std::string>& gradient, size_t count,
          uintptr_t weight, uintptr_t remainder, const std::string& master,
          const std::string& state, const std::string& rounding,
          const std::vector<std::pair<uintptr_t, uintptr_t>>& states, uint64_t seed,
          uint64_t tensor, int threads, const std::vector<uint64_t>& shape, uintptr_t averages) {
  kernels::RangeStep whole;
  whole.optimizer = &Find(optimizer);
  ThrowIfError(whole.optimizer->Validate(values));
  const kernels::StepScalars scalars =
      whole.optimizer->Prepare(values, applied_count, gradient_scale);
  whole.scalars = scalars.span();
  const kernels::DType dtype = DTypeOf(gradient.second);
  whole.gradient = {dtype, At<const void>(gradient.first), count};
  whole.master = Word<kernels::MasterFormat>("master", master,
                                             {{"exact", kernels::MasterFormat::kExact},
                                              {"24bit", kernels::MasterFormat::k24Bit},
                                              {"bf16", kernels::MasterFormat::kBF16Only}});
  whole.format = Word<kernels::StateFormat>("state", state,
                                            {{"fp32", kernels::StateFormat::kFp32},
                                             {"8bit", kernels::StateFormat::k8Bit},
                                             {"4bit", kernels::StateFormat::k4Bit}});
  whole.rounding = Word<kernels::Rounding>("rounding", rounding,
                                           {{"no_zero", kernels::Rounding::kNoZero},
                                            {"nearest", kernels::Rounding::kNearest},
                                            {"stochastic", kernels::Rounding::kStochastic}});
  whole.weight = whole.new_weight = At<uint16_t>(weight);
  whole.remainder = At<void>(remainder);
  if (states.size() > kernels::kMaxStates) throw nb::value_error("too many states");
  for (size_t i = 0; i < states.size(); ++i)
    whole.states[i] = {At<void>(states[i].first), At<float>(states[i].second)};
  whole.random = kernels::RandomKey::Of(seed, tensor, static_cast<uint64_t>(applied_count) + 1);
  std::optional<Pass> pass;
  if (whole.optimizer->scope != kernels::Scope::kElement) {
    ReleasedGil released;
    pass.emplace(whole, scalars, shape, At<float>(averages));
  }
  if (pass.has_value()) {
    ThrowIfError(pass->status());
    pass->Finish(&whole);
  }
  std::vector<absl::Status> done((count + kRangeElements - 1) / kRangeElements);
  RunOnPool(threads, done.size(), [&](size_t i) {
    done[i] = kernels::Step(kernels::PartOf(whole, i * kRangeElements, kRangeElements));
  });
  for (const absl::Status& status : done) ThrowIfError(status);
}

// The sum of squares of the finite elements and the count of the others, shard by shard, as servers
// compute them.
std::pair<double, uint64_t> SquaredNorm(const std::pair<uintptr_t, std::string>& gradient,
                                        size_t count, int threads) {
  const kernels::TypedSpan whole{DTypeOf(gradient.second), At<const void>(gradient.first), count};
  std::vector<kernels::BlockSums> sums((count + kShardElements - 1) / kShardElements);
  RunOnPool(threads, sums.size(), [&](size_t i) {
    kernels::ReduceGradient(kernels::Slice(whole, i * kShardElements, kShardElements), &sums[i]);
  });
  std::pair<double, uint64_t> total = {0, 0};
  for (const kernels::BlockSums& sum : sums) {
    total.first += sum.sum_squares;
    total.second += sum.nonfinite_count;
  }
  return total;
}

// Calls visit(begin, end) for each piece of a flat range that begins at element `first` of its
// tensor, in elements of the range.
template <typename Visit>
void ForEachPiece(uint64_t first, size_t count, uint64_t shard_elements, Visit visit) {
  for (size_t begin = 0; begin < count;) {
    const size_t end =
        std::min<size_t>(count, begin + shard_elements - (first + begin) % shard_elements);
    visit(begin, end);
    begin = end;
  }
}

size_t Int8BytesOf(uint64_t first, size_t count, uint64_t shard_elements) {
  size_t bytes = 0;
  ForEachPiece(first, count, shard_elements,
               [&](size_t begin, size_t end) { bytes += kernels::Int8Bytes(end - begin); });
  return bytes;
}

// Encodes the pieces of a flat range one after another, as client::PushPart requires.
void EncodeInt8(const std::pair<uintptr_t, std::string>& gradient, uint64_t first, size_t count,
                uint64_t shard_elements, double loss_scale, uintptr_t residual,
                uintptr_t next_residual, uintptr_t encoded, int threads) {
  const kernels::TypedSpan whole{DTypeOf(gradient.second), At<const void>(gradient.first), count};
  struct Task {
    size_t begin, count;
    uint8_t* to;
  };
  std::vector<Task> tasks;
  auto* to = At<uint8_t>(encoded);
  ForEachPiece(first, count, shard_elements, [&](size_t begin, size_t end) {
    for (; begin < end; begin += kRangeElements) {
      tasks.push_back({begin, std::min(kRangeElements, end - begin), to});
      to += kernels::Int8Bytes(tasks.back().count);
    }
  });
  RunOnPool(threads, tasks.size(), [&](size_t i) {
    const Task& task = tasks[i];
    const kernels::ErrorFeedback feedback{static_cast<float>(loss_scale),
                                          {At<const uint16_t>(residual) + task.begin, task.count},
                                          {At<uint16_t>(next_residual) + task.begin, task.count}};
    // The only error is a wrong size, and the sizes are computed here.
    (void)kernels::EncodeInt8(kernels::Slice(whole, task.begin, task.count), &feedback,
                              {task.to, kernels::Int8Bytes(task.count)});
  });
}

// The digests of host memory, as client::PushPart has them of pieces. Each is as long as 32
// hexadecimal digits.
std::vector<std::string> Digests(const std::vector<std::pair<uintptr_t, size_t>>& ranges,
                                 int threads) {
  struct Task {
    absl::Span<const char> bytes;
    std::vector<uint64_t> leaves;
  };
  std::vector<Task> tasks;
  std::vector<size_t> ends;  // for each range, the tasks that it and those before it have
  for (const auto& [address, size] : ranges) {
    const absl::Span<const char> bytes(At<const char>(address), size);
    for (size_t begin = 0; begin < size; begin += kHashedBytes)
      tasks.push_back({bytes.subspan(begin, kHashedBytes), {}});
    ends.push_back(tasks.size());
  }
  RunOnPool(threads, tasks.size(), [&](size_t i) { tasks[i].leaves = LeafHashes(tasks[i].bytes); });
  std::vector<std::string> digests;
  size_t next = 0;
  for (const size_t end : ends) {
    PieceDigest digest;
    for (; next < end; ++next) digest.AddLeaves(tasks[next].leaves);
    digests.push_back(ToString(digest.Finish()));
  }
  return digests;
}

std::vector<std::string> Targets() {
  std::vector<std::string> names;
  for (const int64_t target : kernels::SupportedTargets())
    names.push_back(kernels::TargetName(target));
  return names;
}

void UseTarget(const std::string& name) {
  static std::unique_ptr<kernels::ScopedTarget> scoped;
  scoped.reset();
  for (const int64_t target : kernels::SupportedTargets()) {
    if (kernels::TargetName(target) == name)
      scoped = std::make_unique<kernels::ScopedTarget>(target);
  }
  if (!scoped && !name.empty())
    throw nb::value_error(("this machine has no instruction set '" + name + "'").c_str());
}

}  // namespace

void BindKernels(nb::module_& module) {
  module.def("kernel_optimizers", Optimizers);
  module.def("kernel_step", Step);
  module.def("kernel_squared_norm", SquaredNorm);
  module.def("kernel_int8_bytes", Int8BytesOf);
  module.def("kernel_encode_int8", EncodeInt8);
  module.def("digests", Digests);
  module.def("kernel_targets", Targets);
  module.def("kernel_use_target", UseTarget);
}

}  // namespace orlop::python
