// Compares the CUDA kernels on a device with the scalar reference, bit for bit. Skipped if there is
// no device.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "absl/status/status.h"
#include "gtest/gtest.h"
#include "kernels/blocks.h"
#include "kernels/cuda/step.h"
#include "kernels/optimizer.h"
#include "kernels/reference.h"
#include "kernels/testing/test_data.h"
#include "kernels/testing/test_range.h"
#include "kernels/types.h"

namespace orlop::kernels::cuda {
namespace {

using testing::AllFormats;
using testing::Formats;
using testing::HostileRange;
using testing::Hostility;
using testing::kAllHostilities;
using testing::kAllTypes;
using testing::NameOf;
using testing::Range;
using testing::ScalarsFor;
using testing::Source;
using testing::Tails;
using testing::Variants;

// Copies of vectors on the device, freed with the object.
class Mirror {
 public:
  Mirror() = default;
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;
  ~Mirror() {
    for (const Copy& copy : copies_) cudaFree(copy.device);
  }
  template <class T>
  T* Of(std::vector<T>& host) {
    Copy copy{host.data(), nullptr, host.size() * sizeof(T)};
    EXPECT_EQ(cudaMalloc(&copy.device, copy.bytes + 4), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(copy.device, copy.host, copy.bytes, cudaMemcpyHostToDevice), cudaSuccess);
    copies_.push_back(copy);
    return static_cast<T*>(copy.device);
  }
  void CopyBack() const {
    for (const Copy& copy : copies_) {
      EXPECT_EQ(cudaMemcpy(copy.host, copy.device, copy.bytes, cudaMemcpyDeviceToHost),
                cudaSuccess);
    }
  }

 private:
  struct Copy {
    void* host;
    void* device;
    size_t bytes;
  };
  std::vector<Copy> copies_;
};

// Returns the step of a range, with the mirror's arrays.
RangeStep OnDevice(const RangeStep& host, Range& range, std::vector<uint8_t>& gradient,
                   Mirror& mirror) {
  RangeStep step = host;
  step.gradient.data = mirror.Of(gradient);
  uint16_t* weight = mirror.Of(range.weight);
  uint16_t* new_weight = mirror.Of(range.new_weight);
  step.weight = weight;
  step.new_weight = host.new_weight == range.weight.data() ? weight : new_weight;
  step.remainder = mirror.Of(range.remainder);
  for (size_t s = 0; s < range.optimizer->states.size(); ++s) {
    step.states[s] = {mirror.Of(range.codes[s]), mirror.Of(range.absmax[s])};
    if (host.format == StateFormat::kFp32) step.states[s] = {mirror.Of(range.fp32[s]), nullptr};
  }
  if (host.input.values != nullptr) step.input.values = mirror.Of(range.input);
  if (host.input.row_factors != nullptr) {
    step.input.row_factors = mirror.Of(range.row_factors);
    step.input.column_factors = mirror.Of(range.column_factors);
  }
  return step;
}

// Steps ranges of all counts in one call, and equal ranges with the reference. Returns the number
// of elements.
size_t CompareWithReference(const Optimizer* optimizer, Formats formats,
                            const std::vector<double>& values, uint64_t seed) {
  Source source(seed);
  Mirror mirror;
  const size_t n = Tails().size();
  std::vector<Range> actual, expected;
  std::vector<StepScalars> scalars(n);
  std::vector<std::vector<uint8_t>> gradients(n);
  std::vector<RangeStep> steps;
  size_t elements = 0;
  actual.reserve(n);
  expected.reserve(n);
  for (const size_t count : Tails()) {
    const Hostility hostility = kAllHostilities[count % 3];
    const testing::OddlyAligned odd(source, kAllTypes[count / 3 % 3], count, hostility);
    const auto* bytes = static_cast<const uint8_t*>(odd.span().data);
    gradients[count].assign(bytes, bytes + count * SizeOf(odd.span().dtype));
    actual.push_back(HostileRange(source, optimizer, formats, count, hostility));
    expected.push_back(actual.back());
    scalars[count] = ScalarsFor(*optimizer, values, count);
    const auto step = [&](Range& range) {
      return range.StepOf(scalars[count], odd.span(), seed, 0, count, count % 2 == 0);
    };
    if (count > 0) reference::Step(step(expected.back()));
    steps.push_back(OnDevice(step(actual.back()), actual.back(), gradients[count], mirror));
    elements += count;
  }
  cudaStream_t stream;
  EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  const absl::Status status = Step(steps, stream);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  mirror.CopyBack();
  for (size_t i = 0; i < n && !::testing::Test::HasFailure(); ++i) {
    actual[i].ExpectSameBits(expected[i]);
    EXPECT_FALSE(::testing::Test::HasFailure())
        << optimizer->name << " " << NameOf(formats) << ", count " << i << ", seed " << seed;
  }
  return elements;
}

TEST(CudaDevice, EqualsTheReferenceForEveryOptimizerAndFormat) {
  if (DeviceCount() == 0) GTEST_SKIP() << "no CUDA device found";
  size_t elements = 0;
  uint64_t seed = 900;
  for (const OptimizerUnit& unit : OptimizerUnits()) {
    for (const std::vector<double>& values : Variants(unit.optimizer)) {
      for (const Formats& formats : AllFormats()) {
        elements += CompareWithReference(&unit.optimizer, formats, values, ++seed);
        if (HasFailure()) return;
      }
    }
  }
  std::printf("%zu elements compared, seeds 901 to %zu\n", elements, static_cast<size_t>(seed));
}

TEST(CudaDevice, RefusesWhatStepRefusesWithoutADevice) {
  const RangeStep step;
  EXPECT_EQ(Step({&step, 1}, nullptr).message(), "range 0: an unknown optimizer");
  EXPECT_TRUE(Step({}, nullptr).ok());
}

}  // namespace
}  // namespace orlop::kernels::cuda
