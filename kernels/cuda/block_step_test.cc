// Compares the CUDA kernels' template on the host (host_execution.h) with the scalar reference, bit
// for bit: every optimizer and format, all counts from 0 to 513 as ranges of one batch, and hostile
// values. Also ranges beyond 2^31 elements, of which only the touched pages exist.
#include "kernels/cuda/block_step.h"

#include <sys/mman.h>

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/blocks.h"
#include "kernels/code_books.h"
#include "kernels/code_books4.h"
#include "kernels/cuda/batch.h"
#include "kernels/cuda/codec.h"
#include "kernels/cuda/geometry.h"
#include "kernels/cuda/host_execution.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "kernels/reference.h"
#include "kernels/testing/test_data.h"
#include "kernels/testing/test_range.h"
#include "kernels/types.h"

namespace orlop::kernels {
#define ORLOP_OPTIMIZER(name) OptimizerUnit name##Unit();
#include "kernels/optimizers.inc"
#undef ORLOP_OPTIMIZER

namespace cuda {
namespace {

#define ORLOP_RULE
#include "kernels/optimizer_rules.inc"

using testing::AllFormats;
using testing::Formats;
using testing::HostileRange;
using testing::Hostility;
using testing::kAllHostilities;
using testing::kAllTypes;
using testing::NameOf;
using testing::Range;
using testing::SameBits;
using testing::ScalarsFor;
using testing::Source;
using testing::Tails;
using testing::Values;
using testing::Variants;

using RunBatch = void (*)(const Batch& batch);
struct HostKernel {
  const Optimizer* optimizer;
  RunBatch run;
};

std::vector<HostKernel> HostKernels() {
  return {
#define ORLOP_OPTIMIZER(O) {FindOptimizer(O##Unit().optimizer.name), RunOnHost<O>},
#include "kernels/optimizers.inc"
#undef ORLOP_OPTIMIZER
  };
}

// Like cuda::Step, on the host. Returns the number of batches.
int StepOnHost(absl::Span<const RangeStep> steps, RunBatch run) {
  const absl::Status status = CheckRanges(steps);
  EXPECT_TRUE(status.ok()) << status;
  const auto batch = std::make_unique<Batch>();
  int batches = 0;
  for (; !steps.empty(); ++batches) {
    steps.remove_prefix(FillBatch(steps, batch.get()));
    run(*batch);
  }
  return batches;
}

// Gradients of a type, aligned.
std::vector<uint32_t> Gradient(Source& source, DType dtype, size_t count, Hostility hostility) {
  const testing::OddlyAligned odd(source, dtype, count, hostility);
  std::vector<uint32_t> aligned(count + 1);
  std::memcpy(aligned.data(), odd.span().data, count * SizeOf(dtype));
  return aligned;
}

// Ranges of every count, equal ranges for the reference, and the steps of both.
struct Ranges {
  Ranges(const Optimizer* optimizer, Formats formats, const std::vector<double>& values,
         uint64_t seed) {
    Source source(seed);
    const size_t n = Tails().size();
    actual.reserve(n);
    for (const size_t count : Tails()) {
      const Hostility hostility = kAllHostilities[count % 3];
      dtypes.push_back(kAllTypes[count / 3 % 3]);
      gradients.push_back(Gradient(source, dtypes.back(), count, hostility));
      actual.push_back(HostileRange(source, optimizer, formats, count, hostility));
      scalars.push_back(ScalarsFor(*optimizer, values, count));
    }
    expected = actual;
    for (size_t i = 0; i < n; ++i) {
      steps.push_back(StepOf(actual[i], i, seed));
      const RangeStep twin = StepOf(expected[i], i, seed);
      if (actual[i].count > 0) reference::Step(twin);
    }
  }
  RangeStep StepOf(Range& range, size_t i, uint64_t seed) const {
    const TypedSpan gradient = {dtypes[i], gradients[i].data(), range.count};
    RangeStep step = range.StepOf(scalars[i], gradient, seed, 0, range.count, i % 2 == 0);
    step.first_block = i << (i % 50);
    return step;
  }

  std::vector<DType> dtypes;
  std::vector<std::vector<uint32_t>> gradients;
  std::vector<StepScalars> scalars;
  std::vector<Range> actual, expected;
  std::vector<RangeStep> steps;
};

TEST(CudaOnHost, EqualsTheReferenceForEveryOptimizerAndFormat) {
  size_t elements = 0;
  uint64_t seed = 500;
  for (const HostKernel& kernel : HostKernels()) {
    for (const std::vector<double>& values : Variants(*kernel.optimizer)) {
      for (const Formats& formats : AllFormats()) {
        Ranges ranges(kernel.optimizer, formats, values, ++seed);
        // A batch has kRangesPerBatch ranges; the empty range is left out.
        EXPECT_EQ(
            StepOnHost(ranges.steps, kernel.run),
            static_cast<int>((ranges.steps.size() - 1 + kRangesPerBatch - 1) / kRangesPerBatch));
        for (size_t i = 0; i < ranges.actual.size(); ++i) {
          ranges.actual[i].ExpectSameBits(ranges.expected[i]);
          elements += ranges.actual[i].count;
          ASSERT_FALSE(HasFailure()) << kernel.optimizer->name << " " << NameOf(formats)
                                     << ", count " << i << ", seed " << seed;
        }
      }
    }
  }
  std::printf("%zu elements compared, seeds 501 to %zu\n", elements, static_cast<size_t>(seed));
}

// ---- Codes ----

template <CodeBook kBook>
void ExpectCodes(Rounding rounding, float x, float absmax, float unit) {
  const auto describe = [&] {
    return ::testing::Message() << "x " << x << ", absmax " << absmax << ", unit " << unit
                                << ", rounding " << static_cast<int>(rounding);
  };
  ASSERT_EQ(Encode8<kBook>(rounding, x, absmax, unit),
            reference::Encode(kBook, rounding, x, absmax, unit))
      << describe();
  ASSERT_EQ(Encode4<kBook>(rounding, x, absmax, unit),
            reference::Encode4(kBook, rounding, x, absmax, unit))
      << describe();
}

// Checks x and its neighbours, of both signs, with every rounding.
template <CodeBook kBook>
void ExpectCodesNear(float x, float absmax, Source& source) {
  for (int ulps = -3; ulps <= 3; ++ulps) {
    const float near = FloatOf(BitsOf(x) + static_cast<uint32_t>(ulps));
    const float random = static_cast<float>(source.Bits() >> 8) * 0x1p-24f;
    for (const float value : {near, -near}) {
      if (std::fabs(value) > absmax) continue;
      ExpectCodes<kBook>(Rounding::kNoZero, value, absmax, 0);
      ExpectCodes<kBook>(Rounding::kNearest, value, absmax, 0);
      for (const float unit : {0.0f, random, 1 - 0x1p-24f}) {
        ExpectCodes<kBook>(Rounding::kStochastic, value, absmax, unit);
      }
    }
  }
}

TEST(CudaOnHost, CodesEqualTheReferenceAroundEveryEntryAndMiddle) {
  Source source(31);
  std::vector<float> around = {0x1p-126f, 0x1p-31f, 0x1p-32f, 0x1p-20f};
  const auto add = [&around](const auto& book) {
    for (size_t i = 1; i < book.size(); ++i) {
      around.push_back(std::fabs(book[i]));
      around.push_back(std::fabs((book[i - 1] + book[i]) / 2));
    }
  };
  add(kSignedCodeBook);
  add(kUnsignedCodeBook);
  add(kSigned4CodeBook);
  add(kUnsigned4CodeBook);
  std::vector<float> scales = {1, 0x1p-149f, 0x1p-65f, 0x1p64f, 0x1.8p65f, FLT_MAX};
  for (int i = 0; i < 20; ++i) scales.push_back(std::exp(static_cast<float>(source.Normal())));
  for (const float absmax : scales) {
    for (const float a : around) {
      if (a * absmax < 0x1p-147f) continue;
      ExpectCodesNear<CodeBook::kSigned>(a * absmax, absmax, source);
      ExpectCodesNear<CodeBook::kUnsigned>(a * absmax, absmax, source);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(CudaOnHost, WidensEveryHalf) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint16_t halves[2] = {static_cast<uint16_t>(bits), 0};
    for (const DType dtype : {DType::kF16, DType::kBF16}) {
      ASSERT_EQ(BitsOf(LoadGradient(dtype, halves, 0)),
                BitsOf(reference::Load({dtype, halves, 1}, 0)));
    }
  }
}

// ---- Geometry ----

TEST(CudaGeometry, FindsTheRangeOfEveryBlock) {
  std::mt19937_64 random(32);
  for (int round = 0; round < 200; ++round) {
    const auto n = static_cast<uint32_t>(1 + random() % kRangesPerBatch);
    std::vector<uint64_t> first = {0};
    for (uint32_t i = 0; i < n; ++i)
      first.push_back(first.back() + 1 + random() % (uint64_t{1} << (3 * (i % 12))));
    for (uint32_t i = 0; i < n; ++i) {
      ASSERT_EQ(FindRange(first.data(), n, first[i]), i);
      ASSERT_EQ(FindRange(first.data(), n, first[i + 1] - 1), i);
    }
  }
}

TEST(CudaGeometry, GridsCoverMoreBlocksThanOneMayHave) {
  const uint64_t blocks = 2 * kLargestGrid + 5;
  Grid grid = NextGrid(0, blocks);
  EXPECT_EQ(grid.block_count, kLargestGrid);
  grid = NextGrid(grid.first_block + grid.block_count, blocks);
  EXPECT_EQ(grid.first_block, kLargestGrid);
  EXPECT_EQ(grid.block_count, kLargestGrid);
  grid = NextGrid(grid.first_block + grid.block_count, blocks);
  EXPECT_EQ(grid.block_count, 5);
  EXPECT_EQ(NextGrid(blocks, blocks).block_count, 0);
}

TEST(CudaGeometry, PlacesBlocksBeyond32Bits) {
  const uint64_t count = (uint64_t{1} << 40) + 3;
  const BlockPlace last = PlaceOf(BlockCount(count) - 1, count);
  EXPECT_EQ(last.begin, uint64_t{1} << 40);
  EXPECT_EQ(last.count, 3);
  EXPECT_EQ(PlaceOf(last.block - 1, count).count, kQuantBlock);
}

TEST(CudaGeometry, ABatchHoldsRangesOfOneOptimizerAndLeavesEmptyOnesOut) {
  const Optimizer* adamw = FindOptimizer("adamw");
  const Optimizer* lion = FindOptimizer("lion");
  Range range(adamw, {}, std::vector<float>(300)), other(lion, {}, std::vector<float>(5));
  const std::vector<float> zeros(300);
  const StepScalars scalars = adamw->Prepare(Values(*adamw), 0, 1);
  const StepScalars other_scalars = lion->Prepare(Values(*lion), 0, 1);
  const RangeStep step = range.StepOf(scalars, testing::Span(zeros));
  RangeStep empty = step;
  empty.gradient.count = 0;
  std::vector<RangeStep> steps = {step, empty, step,
                                  other.StepOf(other_scalars, {DType::kF32, zeros.data(), 5})};
  const auto batch = std::make_unique<Batch>();
  EXPECT_EQ(FillBatch(steps, batch.get()), 3);
  EXPECT_EQ(batch->range_count, 2);
  EXPECT_EQ(batch->first_block[2], 4);
  steps.assign(kRangesPerBatch + 1, step);
  EXPECT_EQ(FillBatch(steps, batch.get()), kRangesPerBatch);
}

TEST(CudaGeometry, RefusesAGradientThatIsNotAligned) {
  const Optimizer* adamw = FindOptimizer("adamw");
  Range range(adamw, {}, std::vector<float>(5));
  const std::vector<float> zeros(6);
  const StepScalars scalars = adamw->Prepare(Values(*adamw), 0, 1);
  const TypedSpan odd = {DType::kF32, reinterpret_cast<const char*>(zeros.data()) + 2, 5};
  const RangeStep steps[] = {
      range.StepOf(scalars, testing::Span(std::vector<float>(zeros.begin() + 1, zeros.end()))),
      range.StepOf(scalars, odd)};
  const absl::Status status = CheckRanges(steps);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "range 1: gradient is not aligned to its elements");
}

// Memory of which only the touched pages exist.
class Sparse {
 public:
  explicit Sparse(size_t bytes)
      : bytes_(bytes),
        begin_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~Sparse() {
    if (valid()) munmap(begin_, bytes_);
  }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  bool valid() const { return begin_ != MAP_FAILED; }
  void* data() const { return begin_; }
  template <class T>
  std::vector<T> Copy(size_t begin, size_t count) const {
    const T* from = static_cast<const T*>(begin_) + begin;
    return std::vector<T>(from, from + count);
  }
  template <class T>
  void Set(size_t begin, const std::vector<T>& values) {
    std::copy(values.begin(), values.end(), static_cast<T*>(begin_) + begin);
  }

 private:
  size_t bytes_;
  void* begin_;
};

// The last three blocks of a range of more than 2^32 elements equal those of a small range.
TEST(CudaGeometry, StepsTheEndOfARangeBeyond32Bits) {
  constexpr size_t kTail = 2 * kQuantBlock + 77, kBegin = size_t{1} << 32;
  constexpr size_t kCount = kBegin + kTail, kBlocks = kCount / kQuantBlock + 1;
  const Optimizer* adamw = FindOptimizer("adamw");
  const StepScalars scalars = adamw->Prepare(Values(*adamw), 3, 1);
  for (const StateFormat format : {StateFormat::k8Bit, StateFormat::k4Bit}) {
    Source source(33);
    Range small = HostileRange(source, adamw, {format}, kTail, Hostility::kTame);
    const std::vector<float> gradient = source.Floats(kTail, Hostility::kTame);
    Sparse all_gradient(4 * kCount), weight(2 * kCount), remainder(2 * kCount);
    Sparse codes[2] = {Sparse(kCount), Sparse(kCount)};
    Sparse absmax[2] = {Sparse(8 * kBlocks), Sparse(8 * kBlocks)};
    if (!all_gradient.valid() || !weight.valid() || !remainder.valid() || !codes[1].valid())
      GTEST_SKIP() << "no address space for 2^32 elements";
    const size_t code_begin = format == StateFormat::k4Bit ? kBegin / 2 : kBegin;
    const size_t scale_begin =
        kBegin / (format == StateFormat::k4Bit ? kFourBitBlock : kQuantBlock);
    all_gradient.Set(kBegin, gradient);
    weight.Set(kBegin, small.weight);
    remainder.Set(kBegin, small.remainder);
    RangeStep step = small.StepOf(scalars, testing::Span(gradient));
    step.gradient = {DType::kF32, all_gradient.data(), kCount};
    step.weight = step.new_weight = static_cast<uint16_t*>(weight.data());
    step.remainder = remainder.data();
    for (size_t s = 0; s < 2; ++s) {
      small.codes[s].resize(format == StateFormat::k4Bit ? (kTail + 1) / 2 : kTail);
      codes[s].Set(code_begin, small.codes[s]);
      absmax[s].Set(scale_begin, small.absmax[s]);
      step.states[s] = {codes[s].data(), static_cast<float*>(absmax[s].data())};
    }
    const auto batch = std::make_unique<Batch>();
    FillBatch({&step, 1}, batch.get());
    ASSERT_EQ(batch->first_block[1], kBlocks);
    for (uint64_t block = kBegin / kQuantBlock; block < kBlocks; ++block) {
      SharedMemory<2> shared;
      HostExecution<2> execution;
      BlockStep<Adamw, HostExecution<2>>(*batch, block, shared, execution).Run();
    }
    RangeStep expected = small.StepOf(scalars, testing::Span(gradient));
    expected.first_block = kBegin / kQuantBlock;
    reference::Step(expected);
    EXPECT_TRUE(SameBits(weight.Copy<uint16_t>(kBegin, kTail), small.weight));
    EXPECT_TRUE(SameBits(remainder.Copy<int16_t>(kBegin, kTail), small.remainder));
    for (size_t s = 0; s < 2; ++s) {
      EXPECT_TRUE(
          SameBits(codes[s].Copy<uint8_t>(code_begin, small.codes[s].size()), small.codes[s]));
      const size_t scales =
          format == StateFormat::k4Bit ? FourBitBlockCount(kTail) : BlockCount(kTail);
      small.absmax[s].resize(scales);
      EXPECT_TRUE(SameBits(absmax[s].Copy<float>(scale_begin, scales), small.absmax[s]));
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace orlop::kernels
