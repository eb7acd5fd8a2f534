// A range of a tensor in any format, for the tests of kernels::Step.
#pragma once
#include <string>
#include <vector>

#include "kernels/casts.h"
#include "kernels/code_books4.h"
#include "kernels/optimizer.h"
#include "kernels/reference.h"
#include "kernels/testing/test_data.h"

namespace orlop::kernels::testing {

struct Formats {
  StateFormat state = StateFormat::kFp32;
  MasterFormat master = MasterFormat::kExact;
  Rounding rounding = Rounding::kNoZero;
};

inline std::string NameOf(const Formats& formats) {
  static constexpr const char* kStates[] = {"fp32", "8bit", "4bit"};
  static constexpr const char* kMasters[] = {"exact", "24bit", "bf16"};
  static constexpr const char* kRoundings[] = {"no_zero", "nearest", "stochastic"};
  return std::string(kStates[static_cast<int>(formats.state)]) + "/" +
         kMasters[static_cast<int>(formats.master)] + "/" +
         kRoundings[static_cast<int>(formats.rounding)];
}

inline const std::vector<Formats>& AllFormats() {
  static const std::vector<Formats> all = [] {
    std::vector<Formats> list;
    for (const StateFormat state : {StateFormat::kFp32, StateFormat::k8Bit, StateFormat::k4Bit}) {
      for (const MasterFormat master :
           {MasterFormat::kExact, MasterFormat::k24Bit, MasterFormat::kBF16Only}) {
        for (const Rounding rounding :
             {Rounding::kNoZero, Rounding::kNearest, Rounding::kStochastic}) {
          if (state == StateFormat::kFp32 && rounding != Rounding::kNoZero) continue;
          list.push_back({state, master, rounding});
        }
      }
    }
    return list;
  }();
  return all;
}

// Returns an optimizer's default values, with `changes` by name.
inline std::vector<double> Values(const Optimizer& optimizer,
                                  const std::vector<std::pair<std::string, double>>& changes = {}) {
  std::vector<double> values;
  for (const HyperParameter& parameter : optimizer.hyper_parameters) {
    values.push_back(parameter.default_value);
    for (const auto& [name, value] : changes) {
      if (name == parameter.name) values.back() = value;
    }
  }
  EXPECT_TRUE(optimizer.Validate(values).ok());
  return values;
}

// A shape of 3 x 7 matrices with at least `count` elements.
inline MatrixShape ShapeFor(size_t count) { return {count / 21 + 1, 3, 7, true}; }

// The scalars of a step of a range of `count` elements, including those that depend on the whole
// tensor. For Adafactor, an odd count means a tensor of one dimension.
inline StepScalars ScalarsFor(const Optimizer& optimizer, const std::vector<double>& values,
                              size_t count, float gradient_scale = 0.37f) {
  StepScalars scalars = optimizer.Prepare(values, static_cast<int64_t>(count % 5), gradient_scale);
  MatrixShape shape = ShapeFor(count);
  shape.is_matrix = count % 2 == 0;
  optimizer.begin(shape, scalars.values);
  constexpr double kSquares[] = {2, 3};
  optimizer.complete(kSquares, shape, scalars.values);
  return scalars;
}

struct Range {
  Range(const Optimizer* optimizer, Formats formats, const std::vector<float>& master)
      : optimizer(optimizer),
        formats(formats),
        count(master.size()),
        weight(count),
        new_weight(count),
        remainder(count) {
    reference::SplitMaster(master, absl::MakeSpan(weight), absl::MakeSpan(remainder));
    if (formats.master == MasterFormat::k24Bit) {
      for (size_t i = 0; i < count; ++i) bytes().at(i) = static_cast<int8_t>(remainder[i] >> 8);
    }
    for (size_t s = 0; s < kMaxStates; ++s) {
      const bool is_signed =
          s < optimizer->states.size() && optimizer->states[s].code_book == CodeBook::kSigned;
      fp32[s].assign(count, 0);
      codes[s].assign(count, formats.state == StateFormat::k8Bit
                                 ? (is_signed ? kSignedZeroCode : kUnsignedZeroCode)
                                 : (is_signed ? kSigned4ZeroCode * 0x11 : 0));
      absmax[s].assign(FourBitBlockCount(count), 0);
    }
    if (optimizer->scope == Scope::kMatrix) input.assign(count, 0);
    if (optimizer->scope == Scope::kFactored) {
      const MatrixShape shape = ShapeFor(count);
      row_factors.assign(shape.matrices * shape.rows, 1);
      column_factors.assign(shape.matrices * shape.columns, 1);
    }
  }

  // The step of elements begin .. begin + n; `begin` is on a block boundary.
  RangeStep StepOf(const StepScalars& scalars, TypedSpan gradient, uint64_t seed, size_t begin,
                   size_t n, bool in_place = true) {
    RangeStep step;
    step.optimizer = optimizer;
    step.scalars = {scalars.values, scalars.count};
    step.gradient = Slice(gradient, begin, n);
    step.weight = weight.data() + begin;
    step.new_weight = (in_place ? weight : new_weight).data() + begin;
    step.remainder = formats.master == MasterFormat::kExact
                         ? static_cast<void*>(remainder.data() + begin)
                         : reinterpret_cast<int8_t*>(remainder.data()) + begin;
    step.master = formats.master;
    step.format = formats.state;
    step.rounding = formats.rounding;
    for (size_t s = 0; s < kMaxStates; ++s) {
      switch (formats.state) {
        case StateFormat::kFp32:
          step.states[s] = {fp32[s].data() + begin, nullptr};
          break;
        case StateFormat::k8Bit:
          step.states[s] = {codes[s].data() + begin, absmax[s].data() + begin / kQuantBlock};
          break;
        case StateFormat::k4Bit:
          step.states[s] = {codes[s].data() + begin / 2, absmax[s].data() + begin / kFourBitBlock};
          break;
      }
    }
    if (optimizer->scope == Scope::kMatrix) step.input.values = input.data() + begin;
    if (optimizer->scope == Scope::kFactored && !optimizer->KeepsState(step.scalars))
      step.input = {nullptr, row_factors.data(), column_factors.data(), ShapeFor(count), begin};
    step.random = RandomKey::Of(seed, 3, 7);
    step.first_block = begin / kQuantBlock;
    return step;
  }
  RangeStep StepOf(const StepScalars& scalars, TypedSpan gradient, uint64_t seed = 1) {
    return StepOf(scalars, gradient, seed, 0, count);
  }

  std::vector<float> Master() const {
    std::vector<float> values(count);
    for (size_t i = 0; i < count; ++i) {
      const int16_t low =
          formats.master == MasterFormat::kExact ? remainder[i]
          : formats.master == MasterFormat::k24Bit
              ? static_cast<int16_t>(reinterpret_cast<const int8_t*>(remainder.data())[i] * 256)
              : int16_t{0};
      values[i] = reference::Join(weight[i], low);
    }
    return values;
  }

  void ExpectSameBits(const Range& expected) const {
    EXPECT_TRUE(SameBits(weight, expected.weight));
    EXPECT_TRUE(SameBits(new_weight, expected.new_weight));
    EXPECT_TRUE(SameBits(remainder, expected.remainder));
    for (size_t s = 0; s < optimizer->states.size(); ++s) {
      EXPECT_TRUE(SameBits(fp32[s], expected.fp32[s])) << optimizer->states[s].name;
      EXPECT_TRUE(SameBits(codes[s], expected.codes[s])) << optimizer->states[s].name;
      EXPECT_TRUE(SameBits(absmax[s], expected.absmax[s])) << optimizer->states[s].name;
    }
  }

  const Optimizer* optimizer;
  Formats formats;
  size_t count;
  std::vector<uint16_t> weight, new_weight;
  std::vector<int16_t> remainder;  // k24Bit: int8 in the first half
  std::vector<float> fp32[kMaxStates];
  std::vector<uint8_t> codes[kMaxStates];
  std::vector<float> absmax[kMaxStates];
  std::vector<float> input, row_factors, column_factors;

 private:
  absl::Span<int8_t> bytes() { return {reinterpret_cast<int8_t*>(remainder.data()), count}; }
};

// A range of `hostility` values, as a damaged server could also have.
inline Range HostileRange(Source& source, const Optimizer* optimizer, Formats formats, size_t count,
                          Hostility hostility) {
  Range range(optimizer, formats, source.Floats(count, hostility));
  if (hostility == Hostility::kAnyBits) {
    range.weight = source.Integers<uint16_t>(count);
    range.remainder = source.Integers<int16_t>(count);
  }
  for (size_t s = 0; s < optimizer->states.size(); ++s) {
    const bool is_signed = optimizer->states[s].code_book == CodeBook::kSigned;
    range.fp32[s] = is_signed ? source.Floats(count, hostility) : source.Absmax(count, hostility);
    range.codes[s] = source.Integers<uint8_t>(count);
    range.absmax[s] = source.Absmax(FourBitBlockCount(count), hostility);
  }
  range.input = source.Floats(range.input.size(), hostility);
  range.row_factors = source.Floats(range.row_factors.size(), hostility);
  range.column_factors = source.Floats(range.column_factors.size(), hostility);
  return range;
}

// Hyper-parameter values that take every branch of an optimizer's rule.
inline std::vector<std::vector<double>> Variants(const Optimizer& optimizer) {
  std::vector<std::vector<double>> variants = {Values(optimizer, {{"weight_decay", 0.1}})};
  const absl::string_view name = optimizer.name;
  if (name == "adamw") {  // both forms of Lerp, and frozen averages
    variants.push_back(Values(optimizer, {{"beta1", 0.3}, {"beta2", 0.0}}));
    variants.push_back(Values(optimizer, {{"beta2", 0.9999}, {"eps", 0.0}}));
  } else if (name == "sgd") {
    variants.push_back(Values(optimizer, {{"momentum", 0.9}, {"dampening", 0.2}}));
    variants.push_back(Values(optimizer, {{"momentum", 0.9}, {"nesterov", 1}}));
  } else if (name == "rmsprop_full") {
    variants.push_back(Values(optimizer, {{"momentum", 0.9}, {"centered", 1}}));
    variants.push_back(Values(optimizer, {{"centered", 1}}));
    variants.push_back(Values(optimizer, {{"momentum", 0.9}}));
  } else if (name == "adagrad") {
    variants.push_back(Values(optimizer, {{"initial_accumulator_value", 0.1}, {"lr_decay", 0.1}}));
  } else if (name == "ademamix") {
    variants.push_back(Values(optimizer, {{"warmup", 100}}));
  } else if (name == "muon") {
    variants.push_back(Values(optimizer, {{"nesterov", 0}, {"adjust_lr", 1}}));
  }
  return variants;
}

inline TypedSpan Span(const std::vector<float>& values) {
  return {DType::kF32, values.data(), values.size()};
}

}  // namespace orlop::kernels::testing
