#include "kernels/optimizer.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/casts.h"
#include "kernels/test_data.h"

namespace orlop::kernels {
namespace {

using testing::BitsOf;
using testing::FloatOf;
using testing::ForEachTarget;
using ::testing::HasSubstr;
using testing::Hostility;
using testing::SameBits;
using testing::Source;

// What a server holds for one tensor, in every state format.
struct Tensor {
  explicit Tensor(const std::vector<float>& master)
      : weight(master.size()),
        remainder(master.size()),
        exp_avg(master.size()),
        exp_avg_sq(master.size()),
        exp_avg_codes(master.size(), kSignedZeroCode),
        exp_avg_sq_codes(master.size(), kUnsignedZeroCode),
        exp_avg_absmax(BlockCount(master.size())),
        exp_avg_sq_absmax(BlockCount(master.size())) {
    EXPECT_TRUE(SplitMaster(master, absl::MakeSpan(weight), absl::MakeSpan(remainder)).ok());
  }
  MasterSpans master() { return {weight, absl::MakeSpan(remainder), absl::MakeSpan(weight)}; }
  AdamWFp32State fp32() { return {absl::MakeSpan(exp_avg), absl::MakeSpan(exp_avg_sq)}; }
  AdamW8BitState codes(Rounding rounding = Rounding::kNoZero) {
    return {absl::MakeSpan(exp_avg_codes), absl::MakeSpan(exp_avg_absmax),
            absl::MakeSpan(exp_avg_sq_codes), absl::MakeSpan(exp_avg_sq_absmax), rounding};
  }
  std::vector<float> Master() const {
    std::vector<float> values(weight.size());
    EXPECT_TRUE(JoinMaster(weight, remainder, absl::MakeSpan(values)).ok());
    return values;
  }

  std::vector<uint16_t> weight;
  std::vector<int16_t> remainder;
  std::vector<float> exp_avg, exp_avg_sq;
  std::vector<uint8_t> exp_avg_codes, exp_avg_sq_codes;
  std::vector<float> exp_avg_absmax, exp_avg_sq_absmax;
};

TypedSpan Span(const std::vector<float>& values) {
  return {DType::kF32, values.data(), values.size()};
}

// AdamW by its definition in the number type Real, over one element's gradients. With Real = float
// it rounds where torch.optim.AdamW's CPU tensors round.
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
  Tensor tensor(start);
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
    const AdamWScalars scalars = PrepareAdamW(config, t - 1, 1.0f);
    ASSERT_TRUE(AdamWFp32(scalars, Span(gradient), tensor.master(), tensor.fp32()).ok());
  }
  std::vector<double> exact_values, torch_values;
  for (size_t i = 0; i < start.size(); ++i) {
    exact_values.push_back(exact[i].p);
    torch_values.push_back(torch[i].p);
  }
  const Error ours = ErrorOf(tensor.Master(), exact_values);
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
  Tensor fused(start), separate(start);
  ASSERT_TRUE(
      AdamWFp32(PrepareAdamW({}, 0, 0.25f), Span(gradient), fused.master(), fused.fp32()).ok());
  ASSERT_TRUE(
      AdamWFp32(PrepareAdamW({}, 0, 1.0f), Span(quarter), separate.master(), separate.fp32()).ok());
  EXPECT_TRUE(SameBits(fused.Master(), separate.Master()));
  EXPECT_FALSE(SameBits(fused.Master(), start));
}

TEST(AdamW8Bit, PartsOfWholeBlocksGiveTheBitsOfOneCall) {
  Source source(63);
  const std::vector<float> start = source.Floats(1300, Hostility::kTame);
  Tensor whole(start), parts(start);
  for (int step = 0; step < 3; ++step) {
    const std::vector<float> gradient = source.Floats(1300, Hostility::kHeavyTailed);
    const AdamWScalars scalars = PrepareAdamW({}, step, 0.5f);
    ASSERT_TRUE(AdamW8Bit(scalars, Span(gradient), whole.master(), whole.codes()).ok());
    for (const auto& [begin, count] : {std::pair<size_t, size_t>{512, 788}, {0, 512}}) {
      MasterSpans master = parts.master();
      AdamW8BitState state = parts.codes();
      const size_t block = begin / kQuantBlock, blocks = BlockCount(count);
      ASSERT_TRUE(
          AdamW8Bit(
              scalars, Slice(Span(gradient), begin, count),
              {master.weight.subspan(begin, count), master.remainder.subspan(begin, count),
               master.new_weight.subspan(begin, count)},
              {state.exp_avg.subspan(begin, count), state.exp_avg_absmax.subspan(block, blocks),
               state.exp_avg_sq.subspan(begin, count),
               state.exp_avg_sq_absmax.subspan(block, blocks)})
              .ok());
    }
  }
  EXPECT_TRUE(SameBits(parts.Master(), whole.Master()));
  EXPECT_TRUE(SameBits(parts.exp_avg_codes, whole.exp_avg_codes));
  EXPECT_TRUE(SameBits(parts.exp_avg_sq_codes, whole.exp_avg_sq_codes));
  EXPECT_TRUE(SameBits(parts.exp_avg_sq_absmax, whole.exp_avg_sq_absmax));
}

TEST(AdamW8Bit, ReadersOfTheOldWeightGoOnUndisturbed) {
  Source source(64);
  const std::vector<float> start = source.Floats(600, Hostility::kTame);
  const std::vector<float> gradient = source.Floats(600, Hostility::kTame);
  Tensor in_place(start), apart(start);
  const std::vector<uint16_t> old_weight = apart.weight;
  std::vector<uint16_t> new_weight(600);
  const AdamWScalars scalars = PrepareAdamW({}, 0, 1.0f);
  ASSERT_TRUE(AdamW8Bit(scalars, Span(gradient), in_place.master(), in_place.codes()).ok());
  ASSERT_TRUE(AdamW8Bit(scalars, Span(gradient),
                        {apart.weight, absl::MakeSpan(apart.remainder), absl::MakeSpan(new_weight)},
                        apart.codes())
                  .ok());
  EXPECT_TRUE(SameBits(apart.weight, old_weight));
  EXPECT_TRUE(SameBits(new_weight, in_place.weight));
  EXPECT_TRUE(SameBits(apart.remainder, in_place.remainder));
}

// Relative L2 error of 8-bit AdamW's weight change against fp32 state. Each element's gradients
// keep one scale, lognormal(sigma) inside a block.
double WeightChangeError(double sigma, Rounding rounding, uint64_t seed) {
  Source source(seed);
  const size_t count = 4096;
  std::vector<double> scale(count);
  for (double& value : scale) value = std::exp(sigma * source.Normal());
  const std::vector<float> start(count, 0.0f);
  Tensor fp32(start), codes(start);
  const AdamWConfig config{1e-3, 0.9, 0.999, 1e-8, 0};
  for (int step = 0; step < 300; ++step) {
    std::vector<float> gradient(count);
    for (size_t i = 0; i < count; ++i) {
      gradient[i] = static_cast<float>(scale[i] * (0.3 + source.Normal()));
    }
    const AdamWScalars scalars = PrepareAdamW(config, step, 1.0f);
    EXPECT_TRUE(AdamWFp32(scalars, Span(gradient), fp32.master(), fp32.fp32()).ok());
    EXPECT_TRUE(AdamW8Bit(scalars, Span(gradient), codes.master(), codes.codes(rounding)).ok());
  }
  const std::vector<float> expected = fp32.Master(), actual = codes.Master();
  double difference = 0, change = 0;
  for (size_t i = 0; i < count; ++i) {
    difference += std::pow(static_cast<double>(actual[i]) - expected[i], 2);
    change += std::pow(static_cast<double>(expected[i]), 2);
  }
  return std::sqrt(difference / change);
}

TEST(AdamW8Bit, FollowsFp32OnOrdinaryGradients) {
  EXPECT_LT(WeightChangeError(0.5, Rounding::kNoZero, 65), 0.1);
  EXPECT_LT(WeightChangeError(0.5, Rounding::kNearest, 65), 0.1);
}

TEST(AdamW8Bit, NoZeroBoundsTheErrorOnHeavyTails) {
  const double no_zero = WeightChangeError(2.0, Rounding::kNoZero, 66);
  const double nearest = WeightChangeError(2.0, Rounding::kNearest, 66);
  std::printf("relative error on heavy tails: no-zero %.3g, nearest %.3g\n", no_zero, nearest);
  EXPECT_LT(no_zero, 0.6);
  EXPECT_GT(nearest, 5 * no_zero);
}

TEST(AdamW8Bit, OneOverflowingElementLeavesTheOthersAlone) {
  ForEachTarget([] {
    std::vector<float> gradient(300, 1e-3f);
    Tensor clean(std::vector<float>(300, 1.0f)), hit = clean;
    const AdamWScalars scalars = PrepareAdamW({}, 0, 1.0f);
    ASSERT_TRUE(AdamW8Bit(scalars, Span(gradient), clean.master(), clean.codes()).ok());
    gradient[290] = FloatOf(0x7FC00000);
    ASSERT_TRUE(AdamW8Bit(scalars, Span(gradient), hit.master(), hit.codes()).ok());
    EXPECT_EQ(hit.weight[290], 0x7FC0);
    EXPECT_EQ(hit.remainder[290], 0);
    EXPECT_EQ(hit.exp_avg_codes[290], kSignedZeroCode);
    EXPECT_EQ(hit.exp_avg_sq_codes[290], kUnsignedZeroCode);
    hit.weight[290] = clean.weight[290];
    hit.remainder[290] = clean.remainder[290];
    hit.exp_avg_codes[290] = clean.exp_avg_codes[290];
    hit.exp_avg_sq_codes[290] = clean.exp_avg_sq_codes[290];
    EXPECT_TRUE(SameBits(hit.Master(), clean.Master()));
    EXPECT_TRUE(SameBits(hit.exp_avg_codes, clean.exp_avg_codes));
    EXPECT_TRUE(SameBits(hit.exp_avg_sq_absmax, clean.exp_avg_sq_absmax));
  });
}

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
    Tensor tensor(start);
    std::vector<SgdModel> exact;
    for (const float value : start) exact.push_back({value});
    for (int step = 0; step < 20; ++step) {
      const std::vector<float> gradient = source.Floats(start.size(), Hostility::kTame);
      for (size_t i = 0; i < start.size(); ++i) exact[i].Step(config, step == 0, gradient[i]);
      SgdFp32State state;
      if (config.momentum != 0) state.momentum_buffer = absl::MakeSpan(tensor.exp_avg);
      const SgdScalars scalars = PrepareSgd(config, step, 1.0f);
      ASSERT_TRUE(SgdFp32(scalars, Span(gradient), tensor.master(), state).ok());
    }
    const std::vector<float> actual = tensor.Master();
    for (size_t i = 0; i < start.size(); ++i) {
      ASSERT_NEAR(actual[i], exact[i].p, 1e-6 + 1e-5 * std::fabs(exact[i].p)) << "seed 67";
    }
  }
}

TEST(Sgd8Bit, StaysNearFp32) {
  Source source(68);
  Tensor fp32(std::vector<float>(2000, 0.0f)), codes = fp32;
  for (int step = 0; step < 50; ++step) {
    const std::vector<float> gradient = source.Floats(2000, Hostility::kTame);
    const SgdScalars scalars = PrepareSgd({0.1, 0.9}, step, 1.0f);
    ASSERT_TRUE(
        SgdFp32(scalars, Span(gradient), fp32.master(), {absl::MakeSpan(fp32.exp_avg)}).ok());
    ASSERT_TRUE(Sgd8Bit(scalars, Span(gradient), codes.master(),
                        {absl::MakeSpan(codes.exp_avg_codes), absl::MakeSpan(codes.exp_avg_absmax)})
                    .ok());
  }
  const std::vector<float> expected = fp32.Master(), actual = codes.Master();
  double difference = 0, change = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(static_cast<double>(actual[i]) - expected[i], 2);
    change += std::pow(static_cast<double>(expected[i]), 2);
  }
  EXPECT_LT(std::sqrt(difference / change), 0.03) << "seed 68";
}

TEST(Prepare, ComputesBiasCorrectionsFromTheAppliedCount) {
  const AdamWConfig config{1e-3, 0.9, 0.999, 1e-8, 1e-2};
  const AdamWScalars first = PrepareAdamW(config, 0, 0.5f);
  EXPECT_EQ(first.step_size, 1e-2f);  // 1e-3 / (1 - 0.9)
  EXPECT_EQ(first.inverse_sqrt_bias_correction2, static_cast<float>(1 / std::sqrt(1 - 0.999)));
  EXPECT_EQ(first.gradient_scale, 0.5f);
  EXPECT_EQ(first.one_minus_beta2, 0.001f);
  EXPECT_EQ(first.decay, 1e-5f);
  const AdamWScalars third = PrepareAdamW(config, 2, 0.5f);
  EXPECT_EQ(third.step_size, static_cast<float>(1e-3 / (1 - 0.9 * 0.9 * 0.9)));
  const AdamWScalars late = PrepareAdamW(config, 10'000'000, 0.5f);
  EXPECT_EQ(late.step_size, 1e-3f);
  EXPECT_EQ(late.inverse_sqrt_bias_correction2, 1.0f);
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
  EXPECT_TRUE(Validate(AdamWConfig{}).ok());
  EXPECT_TRUE(Validate(AdamWConfig{0, 0, 0, 0, 0}).ok());
  EXPECT_TRUE(Validate(SgdConfig{}).ok());
  const auto message = [](const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(message(Validate(AdamWConfig{-0.5})), HasSubstr("lr is -0.5, must be from 0"));
  EXPECT_THAT(message(Validate(AdamWConfig{std::nan("")})), HasSubstr("lr is nan"));
  EXPECT_THAT(message(Validate(AdamWConfig{1e-3, 1.0})),
              HasSubstr("betas[0] is 1, must be from 0 to 1, which is excluded"));
  EXPECT_THAT(message(Validate(AdamWConfig{1e-3, 0.9, -0.1})), HasSubstr("betas[1] is -0.1"));
  EXPECT_THAT(message(Validate(AdamWConfig{1e-3, 0.9, 0.99, -1})), HasSubstr("eps is -1"));
  EXPECT_THAT(message(Validate(SgdConfig{0.1, 0, 0, -1})), HasSubstr("weight_decay is -1"));
  EXPECT_THAT(message(Validate(SgdConfig{0.1, 0.9, 0.5, 0, true})),
              HasSubstr("nesterov needs momentum > 0 and dampening 0"));
}

TEST(Optimizer, RefusesSpansThatDoNotFitAndWritesNothing) {
  Tensor tensor(std::vector<float>(300, 1.0f));
  const Tensor before = tensor;
  const std::vector<float> gradient(300, 1.0f);
  const auto message = [](const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  const AdamWScalars scalars = PrepareAdamW({}, 0, 1.0f);
  MasterSpans short_weight = tensor.master();
  short_weight.new_weight = short_weight.new_weight.first(299);
  EXPECT_THAT(message(AdamWFp32(scalars, Span(gradient), short_weight, tensor.fp32())),
              HasSubstr("new_weight has 299 elements, expected 300"));
  AdamW8BitState short_absmax = tensor.codes();
  short_absmax.exp_avg_sq_absmax = short_absmax.exp_avg_sq_absmax.first(1);
  EXPECT_THAT(message(AdamW8Bit(scalars, Span(gradient), tensor.master(), short_absmax)),
              HasSubstr("exp_avg_sq_absmax has 1 elements, expected 2"));
  EXPECT_THAT(message(SgdFp32(PrepareSgd({0.1}, 0, 1), Span(gradient), tensor.master(),
                              {absl::MakeSpan(tensor.exp_avg)})),
              HasSubstr("momentum_buffer has 300 elements, expected 0"));
  EXPECT_THAT(message(Sgd8Bit(PrepareSgd({0.1, 0.9}, 0, 1), Span(gradient), tensor.master(), {})),
              HasSubstr("momentum_buffer has 0 elements, expected 300"));
  EXPECT_TRUE(SameBits(tensor.Master(), before.Master()));
}

}  // namespace
}  // namespace orlop::kernels
