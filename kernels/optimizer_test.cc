#include "kernels/optimizer.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/blocks.h"
#include "kernels/code_books.h"
#include "kernels/quantize.h"
#include "kernels/random.h"
#include "kernels/reference.h"
#include "kernels/testing/test_data.h"
#include "kernels/testing/test_range.h"
#include "kernels/types.h"

namespace orlop::kernels {
namespace {

using testing::BitsOf;
using testing::FloatOf;
using testing::ForEachTarget;
using testing::Formats;
using ::testing::HasSubstr;
using testing::Hostility;
using testing::Range;
using testing::SameBits;
using testing::Source;
using testing::Span;
using testing::Values;

constexpr Formats kFp32{};
constexpr Formats k8Bit{StateFormat::k8Bit};

const Optimizer* Find(const char* name) {
  const Optimizer* optimizer = FindOptimizer(name);
  EXPECT_NE(optimizer, nullptr) << name;
  return optimizer;
}
Range NewRange(const char* optimizer, Formats formats, const std::vector<float>& master) {
  return Range(Find(optimizer), formats, master);
}
void Take(Range& range, const std::vector<double>& values, int64_t applied,
          const std::vector<float>& gradient, float scale = 1) {
  const StepScalars scalars = range.optimizer->Prepare(values, applied, scale);
  const absl::Status status =
      Step(range.StepOf(scalars, Span(gradient), static_cast<uint64_t>(applied)));
  ASSERT_TRUE(status.ok()) << status;
}

struct AdamWConfig {
  double learning_rate = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 1e-2;
};
std::vector<double> Values(const AdamWConfig& c) {
  return {c.learning_rate, c.beta1, c.beta2, c.eps, c.weight_decay};
}

// AdamW by its definition in the number type Real, over one element's gradients. With Real = float
// it rounds where torch.optim.AdamW on CPU tensors does.
template <class Real>
struct AdamWModel {
  Real p;
  Real m = 0, v = 0;
  void Step(const AdamWConfig& c, int t, Real gradient) {
    p = p * static_cast<Real>(1 - c.learning_rate * c.weight_decay);
    m = m + static_cast<Real>(1 - c.beta1) * (gradient - m);
    v = v * static_cast<Real>(c.beta2);
    v = v + static_cast<Real>(1 - c.beta2) * gradient * gradient;
    const Real correction2 = static_cast<Real>(std::sqrt(1 - std::pow(c.beta2, t)));
    const Real denominator = std::sqrt(v) / correction2 + static_cast<Real>(c.eps);
    const Real step_size = static_cast<Real>(-c.learning_rate / (1 - std::pow(c.beta1, t)));
    p = p + step_size * m / denominator;
  }
};

struct Error {
  double largest = 0, root_mean_square = 0;
};

template <class Values>
Error ErrorOf(const Values& values, const std::vector<double>& exact) {
  Error error;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double difference = std::fabs(values[i] - exact[i]);
    error.largest = std::max(error.largest, difference);
    error.root_mean_square += difference * difference / static_cast<double>(exact.size());
  }
  error.root_mean_square = std::sqrt(error.root_mean_square);
  return error;
}

TEST(AdamWFp32, IsAsExactAsTorchAgainstFp64) {
  constexpr int kSteps = 50;
  const AdamWConfig config{3e-3, 0.9, 0.999, 1e-8, 0.1};
  Source source(61);
  const std::vector<float> start = source.Floats(3000, Hostility::kTame);
  Range range = NewRange("adamw", kFp32, start);
  std::vector<AdamWModel<double>> exact;
  std::vector<AdamWModel<float>> torch;
  for (const float value : start) {
    exact.push_back({value});
    torch.push_back({value});
  }
  for (int t = 1; t <= kSteps; ++t) {
    const std::vector<float> gradient = source.Floats(start.size(), Hostility::kTame);
    for (size_t i = 0; i < start.size(); ++i) {
      exact[i].Step(config, t, gradient[i]);
      torch[i].Step(config, t, gradient[i]);
    }
    Take(range, Values(config), t - 1, gradient);
  }
  std::vector<double> exact_values, torch_values;
  for (size_t i = 0; i < start.size(); ++i) {
    exact_values.push_back(exact[i].p);
    torch_values.push_back(torch[i].p);
  }
  const Error ours = ErrorOf(range.Master(), exact_values);
  const Error theirs = ErrorOf(torch_values, exact_values);
  std::printf("error against fp64, ours and torch's arithmetic: max %.3g %.3g, rms %.3g %.3g\n",
              ours.largest, theirs.largest, ours.root_mean_square, theirs.root_mean_square);
  EXPECT_LE(ours.largest, 1.5 * theirs.largest) << "seed 61";
  EXPECT_LE(ours.root_mean_square, 1.5 * theirs.root_mean_square) << "seed 61";
}

TEST(AdamWFp32, ScalesTheGradientInTheSamePass) {
  Source source(62);
  const std::vector<float> start = source.Floats(700, Hostility::kTame);
  const std::vector<float> gradient = source.Floats(700, Hostility::kTame);
  std::vector<float> quarter = gradient;
  for (float& value : quarter) value *= 0.25f;
  Range fused = NewRange("adamw", kFp32, start), separate = fused;
  Take(fused, Values(AdamWConfig{}), 0, gradient, 0.25f);
  Take(separate, Values(AdamWConfig{}), 0, quarter);
  EXPECT_TRUE(SameBits(fused.Master(), separate.Master()));
  EXPECT_FALSE(SameBits(fused.Master(), start));
}

// As for shards and threads: ranges of whole blocks, in any order.
TEST(Optimizer, PartsOfWholeBlocksGiveTheBitsOfOneCall) {
  for (const OptimizerUnit& unit : OptimizerUnits()) {
    const std::vector<double> values = testing::Values(unit.optimizer, {{"weight_decay", 0.1}});
    for (const Formats& formats : testing::AllFormats()) {
      Source source(63);
      const std::vector<float> start = source.Floats(1300, Hostility::kTame);
      Range whole(&unit.optimizer, formats, start), parts = whole;
      for (int step = 0; step < 3; ++step) {
        const std::vector<float> gradient = source.Floats(1300, Hostility::kHeavyTailed);
        const StepScalars scalars = unit.optimizer.Prepare(values, step, 0.5f);
        ASSERT_TRUE(Step(whole.StepOf(scalars, Span(gradient), 5)).ok());
        for (const auto& [begin, count] : {std::pair<size_t, size_t>{512, 788}, {0, 512}}) {
          ASSERT_TRUE(Step(parts.StepOf(scalars, Span(gradient), 5, begin, count)).ok());
        }
      }
      parts.ExpectSameBits(whole);
      if (HasFailure()) FAIL() << unit.optimizer.name << " " << NameOf(formats) << ", seed 63";
    }
  }
}

TEST(Optimizer, ReadersOfTheOldWeightGoOnUndisturbed) {
  Source source(64);
  const std::vector<float> gradient = source.Floats(600, Hostility::kTame);
  Range in_place = NewRange("adamw", k8Bit, source.Floats(600, Hostility::kTame));
  Range apart = in_place;
  const std::vector<uint16_t> old_weight = apart.weight;
  const StepScalars scalars = apart.optimizer->Prepare(Values(AdamWConfig{}), 0, 1.0f);
  ASSERT_TRUE(Step(in_place.StepOf(scalars, Span(gradient))).ok());
  ASSERT_TRUE(Step(apart.StepOf(scalars, Span(gradient), 1, 0, 600, /*in_place=*/false)).ok());
  EXPECT_TRUE(SameBits(apart.weight, old_weight));
  EXPECT_TRUE(SameBits(apart.new_weight, in_place.weight));
  EXPECT_TRUE(SameBits(apart.remainder, in_place.remainder));
}

double RelativeDifference(const std::vector<float>& actual, const std::vector<float>& expected,
                          const std::vector<float>& start) {
  double difference = 0, change = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(static_cast<double>(actual[i]) - expected[i], 2);
    change += std::pow(static_cast<double>(expected[i]) - start[i], 2);
  }
  return std::sqrt(difference / change);
}

// Returns the relative L2 error of the weight change against fp32 state. Each element's gradients
// keep one scale, lognormal(sigma) inside a block.
double WeightChangeError(double sigma, Formats formats, uint64_t seed) {
  Source source(seed);
  const size_t count = 4096;
  std::vector<double> scale(count);
  for (double& value : scale) value = std::exp(sigma * source.Normal());
  const std::vector<float> start(count, 0.0f);
  Range fp32 = NewRange("adamw", kFp32, start), codes = NewRange("adamw", formats, start);
  const std::vector<double> values = Values(AdamWConfig{1e-3, 0.9, 0.999, 1e-8, 0});
  for (int step = 0; step < 300; ++step) {
    std::vector<float> gradient(count);
    for (size_t i = 0; i < count; ++i) {
      gradient[i] = static_cast<float>(scale[i] * (0.5 + source.Normal()));
    }
    Take(fp32, values, step, gradient);
    Take(codes, values, step, gradient);
  }
  return RelativeDifference(codes.Master(), fp32.Master(), start);
}

TEST(AdamW8Bit, FollowsFp32OnOrdinaryGradients) {
  for (const Rounding rounding : {Rounding::kNoZero, Rounding::kNearest, Rounding::kStochastic}) {
    EXPECT_LT(WeightChangeError(0.5, {StateFormat::k8Bit, MasterFormat::kExact, rounding}, 65),
              0.1);
  }
}

// Exact nearest rounding codes small elements of exp_avg_sq as 0, so their updates are divided by
// eps alone. Never coding a positive element as 0 bounds the error.
TEST(AdamW8Bit, NoZeroBoundsTheErrorOnHeavyTails) {
  const std::pair<double, double> limits[] = {
      {0.5, 0.038}, {1.0, 0.094}, {1.5, 0.22}, {2.0, 0.44}, {3.0, 0.87}};
  for (const auto& [sigma, limit] : limits) {
    const double no_zero = WeightChangeError(sigma, k8Bit, 66);
    const double nearest = WeightChangeError(
        sigma, {StateFormat::k8Bit, MasterFormat::kExact, Rounding::kNearest}, 66);
    std::printf("sigma %.1f: no_zero %.3f (at most %.3f), nearest %.3f\n", sigma, no_zero, limit,
                nearest);
    EXPECT_LE(no_zero, limit) << "sigma " << sigma << ", seed 66";
    if (sigma >= 2) {
      EXPECT_GT(nearest, 5 * no_zero);
    }
  }
}

TEST(AdamW4Bit, FollowsFp32OnOrdinaryGradients) {
  EXPECT_LT(WeightChangeError(0.5, {StateFormat::k4Bit}, 65), 0.5);
}

// A slow average whose gradients hardly change it: nearest rounding would freeze it.
TEST(Stochastic, KeepsSlowAveragesMoving) {
  const Optimizer* ademamix = Find("ademamix");
  const std::vector<float> start(1024, 0.0f), gradient(1024, 1e-3f);
  const std::vector<double> values = testing::Values(*ademamix, {{"beta3", 0.9999}});
  Range fp32(ademamix, kFp32, start), codes(ademamix, k8Bit, start);
  for (int step = 0; step < 2000; ++step) {
    std::vector<float> noisy = gradient;
    if (step == 0) noisy[0] = 10;  // a block's absmax that does not decrease
    Take(fp32, values, step, noisy);
    Take(codes, values, step, noisy);
  }
  double expected = 0, actual = 0;
  for (size_t i = 1; i < 256; ++i) {
    expected += fp32.fp32[1][i] / 255;
    actual += reference::Decode(CodeBook::kSigned, codes.codes[1][i], codes.absmax[1][0]) / 255;
  }
  EXPECT_NEAR(actual, expected, 0.05 * expected);
}

// The position of the largest entry plus a random number near 1 rounds to the next number, which
// has no code.
TEST(Stochastic, GivesTheLargestElementNoCodeBeyondTheLast) {
  const RandomKey key = RandomKey::Of(1, 2, 3);
  const auto is_near_one = [key](uint64_t block) {
    for (uint32_t i = 0; i < kQuantBlock; ++i) {
      if (RandomUnit(BlockRandomOf(key, block, 0), i) > 1 - 0x1p-20f) return true;
    }
    return false;
  };
  uint64_t block = 0;
  while (!is_near_one(block)) ++block;
  const BlockRandom random = BlockRandomOf(key, block, 0);
  const std::vector<float> ones(kQuantBlock, 1.0f);
  const auto expect_largest = [&](StateFormat format, CodeBook book) {
    std::vector<uint8_t> codes(format == StateFormat::k8Bit ? kQuantBlock : kQuantBlock / 2);
    float absmax[2];
    ActiveBlockKernels().encode(format, book, Rounding::kStochastic, ones.data(), random,
                                {codes.data(), absmax});
    EXPECT_TRUE(SameBits(codes, std::vector<uint8_t>(codes.size(), 255)));
  };
  ForEachTarget([&] {
    for (const StateFormat format : {StateFormat::k8Bit, StateFormat::k4Bit}) {
      expect_largest(format, CodeBook::kSigned);
      expect_largest(format, CodeBook::kUnsigned);
    }
  });
}

// The mean over seeds of the stored values is the computed value.
TEST(Stochastic, RoundsMastersToTheirMean) {
  const std::vector<float> start(kQuantBlock, 1.0f), gradient(kQuantBlock, 1.0f);
  for (const MasterFormat master : {MasterFormat::kBF16Only, MasterFormat::k24Bit}) {
    Range exact = NewRange("sgd", kFp32, start);
    const std::vector<double> values = testing::Values(*exact.optimizer, {{"lr", 1.234567e-4}});
    Take(exact, values, 0, gradient);
    double sum = 0;
    constexpr int kSeeds = 400;
    for (int seed = 0; seed < kSeeds; ++seed) {
      Range rounded(exact.optimizer, {StateFormat::kFp32, master}, start);
      const StepScalars scalars = exact.optimizer->Prepare(values, 0, 1.0f);
      ASSERT_TRUE(Step(rounded.StepOf(scalars, Span(gradient), seed)).ok());
      for (const float value : rounded.Master()) sum += value / (kSeeds * 256.0);
    }
    EXPECT_NEAR(sum, exact.Master()[0], 3e-5) << static_cast<int>(master);
  }
}

TEST(AdamW8Bit, OneOverflowingElementLeavesTheOthersAlone) {
  ForEachTarget([] {
    std::vector<float> gradient(300, 1e-3f);
    Range clean = NewRange("adamw", k8Bit, std::vector<float>(300, 1.0f)), hit = clean;
    Take(clean, Values(AdamWConfig{}), 0, gradient);
    gradient[290] = FloatOf(0x7FC00000);
    Take(hit, Values(AdamWConfig{}), 0, gradient);
    EXPECT_EQ(hit.weight[290], 0x7FC0);
    EXPECT_EQ(hit.remainder[290], 0);
    EXPECT_EQ(hit.codes[0][290], kSignedZeroCode);
    EXPECT_EQ(hit.codes[1][290], kUnsignedZeroCode);
    hit.weight[290] = clean.weight[290];
    hit.remainder[290] = clean.remainder[290];
    for (int s : {0, 1}) hit.codes[s][290] = clean.codes[s][290];
    hit.ExpectSameBits(clean);
  });
}

struct SgdConfig {
  double learning_rate = 1e-3, momentum = 0, dampening = 0, weight_decay = 0;
  bool nesterov = false;
};

// torch.optim.SGD by its definition, in fp64, over one element's gradients.
struct SgdModel {
  double p;
  double buffer = 0;
  void Step(const SgdConfig& c, bool first, double g) {
    g += c.weight_decay * p;
    if (c.momentum != 0) {
      buffer = first ? g : c.momentum * buffer + (1 - c.dampening) * g;
      g = c.nesterov ? g + c.momentum * buffer : buffer;
    }
    p -= c.learning_rate * g;
  }
};

TEST(SgdFp32, FollowsTorchsDefinition) {
  for (const SgdConfig& config :
       {SgdConfig{0.1}, SgdConfig{0.1, 0.9}, SgdConfig{0.1, 0.9, 0.3, 0.01},
        SgdConfig{0.1, 0.9, 0, 0.01, true}, SgdConfig{0.1, 0, 0, 0.01}}) {
    Source source(67);
    const std::vector<float> start = source.Floats(1000, Hostility::kTame);
    Range range = NewRange("sgd", kFp32, start);
    const std::vector<double> values = {config.learning_rate, config.momentum, config.dampening,
                                        config.weight_decay, config.nesterov ? 1.0 : 0.0};
    std::vector<SgdModel> exact;
    exact.reserve(start.size());
    for (const float value : start) exact.push_back({value});
    for (int step = 0; step < 20; ++step) {
      const std::vector<float> gradient = source.Floats(start.size(), Hostility::kTame);
      for (size_t i = 0; i < start.size(); ++i) exact[i].Step(config, step == 0, gradient[i]);
      Take(range, values, step, gradient);
    }
    const std::vector<float> actual = range.Master();
    for (size_t i = 0; i < start.size(); ++i) {
      ASSERT_NEAR(actual[i], exact[i].p, 1e-6 + 1e-5 * std::fabs(exact[i].p)) << "seed 67";
    }
  }
}

TEST(Sgd8Bit, StaysNearFp32) {
  Source source(68);
  const std::vector<float> start(2000, 0.0f);
  Range fp32 = NewRange("sgd", kFp32, start), codes = NewRange("sgd", k8Bit, start);
  for (int step = 0; step < 50; ++step) {
    const std::vector<float> gradient = source.Floats(2000, Hostility::kTame);
    Take(fp32, {0.1, 0.9, 0, 0, 0}, step, gradient);
    Take(codes, {0.1, 0.9, 0, 0, 0}, step, gradient);
  }
  EXPECT_LT(RelativeDifference(codes.Master(), fp32.Master(), start), 0.03) << "seed 68";
}

TEST(Sgd, WithoutMomentumLeavesTheBufferAlone) {
  Range range = NewRange("sgd", k8Bit, std::vector<float>(300, 1.0f));
  const StepScalars scalars = range.optimizer->Prepare({0.1, 0, 0, 0, 0}, 0, 1.0f);
  RangeStep step = range.StepOf(scalars, Span(std::vector<float>(300, 1.0f)));
  const std::vector<float> gradient(300, 1.0f);
  step.gradient = Span(gradient);
  step.states[0] = {};  // SGD without momentum needs no state
  ASSERT_TRUE(Step(step).ok());
  EXPECT_FLOAT_EQ(range.Master()[299], 0.9f);
}

// For all numbers of both signs, subnormals and the largest, the exact master is the pushed value.
TEST(Store, KeepsTheBitsOfWhatIsPushed) {
  Source source(69);
  std::vector<float> pushed = source.Floats(100'000, Hostility::kAnyBits);
  for (float& value : pushed) value = std::isfinite(value) ? value : -0.0f;
  pushed[0] = std::numeric_limits<float>::max();
  pushed[1] = std::numeric_limits<float>::denorm_min();
  ForEachTarget([&] {
    for (const StateFormat state : {StateFormat::kFp32, StateFormat::k8Bit, StateFormat::k4Bit}) {
      Range range = NewRange("store", {state}, source.Floats(pushed.size(), Hostility::kTame));
      Take(range, {}, 0, pushed);
      EXPECT_TRUE(SameBits(range.Master(), pushed)) << "seed 69";
    }
  });
}

TEST(Prepare, ComputesBiasCorrectionsFromTheAppliedCount) {
  const Optimizer* adamw = Find("adamw");
  const std::vector<double> values = Values(AdamWConfig{});
  const auto scalar = [&](int64_t applied, size_t i) {
    return adamw->Prepare(values, applied, 0.5f).values[i];
  };
  constexpr size_t kStepSize = 7, kCorrection2 = 8, kDecay = 9;
  EXPECT_EQ(adamw->scalar_count, 10u);
  EXPECT_EQ(scalar(0, 0), 0.5f);
  EXPECT_EQ(scalar(0, 1), 0.0f);
  EXPECT_EQ(scalar(0, 5), 0.001f);         // 1 - beta2, from fp64
  EXPECT_EQ(scalar(0, kStepSize), 1e-2f);  // 1e-3 / (1 - 0.9)
  EXPECT_EQ(scalar(0, kCorrection2), static_cast<float>(1 / std::sqrt(1 - 0.999)));
  EXPECT_EQ(scalar(0, kDecay), 1e-5f);
  EXPECT_EQ(scalar(2, kStepSize), static_cast<float>(1e-3 / (1 - 0.9 * 0.9 * 0.9)));
  EXPECT_EQ(scalar(10'000'000, kStepSize), 1e-3f);
  EXPECT_EQ(scalar(10'000'000, kCorrection2), 1.0f);
}

TEST(Prepare, NamesTheStatesThatNearestRoundingWouldFreeze) {
  EXPECT_EQ(Find("adamw")->Prepare(Values(AdamWConfig{1e-3, 0.9, 0.9995}), 0, 1).values[1], 2);
  EXPECT_EQ(Find("adamw")->Prepare(Values(AdamWConfig{1e-3, 0.9, 0.9994}), 0, 1).values[1], 0);
  const Optimizer* ademamix = Find("ademamix");
  EXPECT_EQ(ademamix->Prepare(testing::Values(*ademamix), 0, 1).values[1], 2);
}

TEST(Prepare, ClipsTheAveragedUnscaledNorm) {
  // A raw sum of 4 contributors at loss scale 8: norm 160 / 32 = 5.
  const GradientScale free = PrepareGradientScale(160.0 * 160.0, 1.0 / 8, 4, 0);
  EXPECT_EQ(free.norm, 5.0);
  EXPECT_EQ(free.factor, 1.0f / 32);
  const GradientScale loose = PrepareGradientScale(160.0 * 160.0, 1.0 / 8, 4, 6);
  EXPECT_EQ(loose.factor, 1.0f / 32);
  const GradientScale clipped = PrepareGradientScale(160.0 * 160.0, 1.0 / 8, 4, 1);
  EXPECT_EQ(clipped.norm, 5.0);
  EXPECT_EQ(clipped.factor, static_cast<float>(1 / (5 + 1e-6) / 32));
}

TEST(Validate, NamesTheFieldItsValueAndTheLimit) {
  const auto message = [](const char* optimizer, const std::vector<double>& values) {
    const absl::Status status = Find(optimizer)->Validate(values);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_TRUE(Find("adamw")->Validate(Values(AdamWConfig{})).ok());
  EXPECT_TRUE(Find("adamw")->Validate({0, 0, 0, 0, 0}).ok());
  EXPECT_THAT(message("adamw", Values(AdamWConfig{-0.5})), HasSubstr("lr is -0.5, must be from 0"));
  EXPECT_THAT(message("adamw", Values(AdamWConfig{std::nan("")})), HasSubstr("lr is nan"));
  EXPECT_THAT(message("adamw", Values(AdamWConfig{1e-3, 1.0})),
              HasSubstr("beta1 is 1, must be from 0 to 1, which is excluded"));
  EXPECT_THAT(message("adamw", Values(AdamWConfig{1e-3, 0.9, -0.1})), HasSubstr("beta2 is -0.1"));
  EXPECT_THAT(message("adamw", {1e-3, 0.9}), HasSubstr("takes 5 hyper-parameters, not 2"));
  EXPECT_THAT(message("sgd", {0.1, 0, 0, -1, 0}), HasSubstr("weight_decay is -1"));
  EXPECT_THAT(message("sgd", {0.1, 0.9, 0.5, 0, 1}),
              HasSubstr("nesterov needs momentum > 0 and dampening 0"));
  EXPECT_THAT(message("rmsprop_full", {0.1, 0.9, 0, 0, 0, 0.5}),
              HasSubstr("centered is 0.5, must be 0 or 1"));
  EXPECT_EQ(FindOptimizer("adamwx"), nullptr);
  EXPECT_THAT(OptimizerNames(), HasSubstr("adamw, "));
}

TEST(Optimizer, RefusesWhatDoesNotFitAndWritesNothing) {
  Range range = NewRange("adamw", k8Bit, std::vector<float>(300, 1.0f));
  const Range before = range;
  const std::vector<float> gradient(300, 1.0f);
  const StepScalars scalars = range.optimizer->Prepare(Values(AdamWConfig{}), 0, 1.0f);
  const auto message = [&](auto spoil) {
    RangeStep step = range.StepOf(scalars, Span(gradient));
    spoil(step);
    const absl::Status status = Step(step);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    range.ExpectSameBits(before);
    return std::string(status.message());
  };
  EXPECT_THAT(message([](RangeStep& s) { s.weight = nullptr; }), HasSubstr("weight is missing"));
  EXPECT_THAT(message([](RangeStep& s) { s.states[1].absmax = nullptr; }),
              HasSubstr("absmax is missing"));
  EXPECT_THAT(message([](RangeStep& s) { s.remainder = static_cast<char*>(s.remainder) + 1; }),
              HasSubstr("remainder is not aligned to 2 bytes"));
  EXPECT_THAT(message([](RangeStep& s) { s.remainder = s.new_weight + 299; }),
              HasSubstr("remainder overlaps weight"));
  EXPECT_THAT(message([](RangeStep& s) { s.new_weight += 1; }),
              HasSubstr("new_weight overlaps weight"));
  EXPECT_THAT(message([](RangeStep& s) { s.scalars.remove_suffix(1); }),
              HasSubstr("adamw takes 10 scalars, not 9"));
  StepScalars bad = scalars;
  bad.values[3] = std::numeric_limits<float>::infinity();
  EXPECT_THAT(message([&](RangeStep& s) { s.scalars = bad.span(); }), HasSubstr("is inf"));
  Optimizer other = *range.optimizer;
  EXPECT_THAT(message([&](RangeStep& s) { s.optimizer = &other; }), HasSubstr("unknown optimizer"));
}

}  // namespace
}  // namespace orlop::kernels
