// What an optimizer's file is written with. kernels/optimizers/NAME.h holds one struct:
//
//   kHyperParameters   names, defaults and ranges, in the order in which Prepare gets them
//   kStates            up to three states (StateSpec); where there are none, here and above, a
//                      std::array of no elements
//   Scalars            floats: what one step needs, and
//   Prepare(h, t)      computes them in fp64 for the t-th update, t from 1
//   Rule<A>            built of Scalars; operator()(gradient, master, states) returns the new
//   master
//                      and updates the states, in the words of arithmetic.h
//   Validate(h)        optional: what the ranges do not say
//   KeepsState(s)      optional: false if this step uses no state
//   kTakesWeights      optional: true where the gradient is new weights (Optimizer::takes_weights)
//
// An optimizer that looks at the whole tensor first (Scope in optimizer.h) also has
//
//   kScope
//   Begin(shape, s)           optional: scalars that depend on the tensor's shape
//   Complete(squares, shape, s)  scalars made of what was measured; + - * / and sqrt alone
//   Rule<A>::Measure(gradient, master, states, out)  the two vectors whose norms are taken, of
//   kMatrix the update in out[0]; may change `states`, which are copies
//   Averaging(s)              kFactored: FactorAverage
//   Iteration(s)              kMatrix: NewtonSchulz
//
// and finds the element's input after its states.
//
// The file is included inside the namespace of each instruction set, the scalar reference's and
// CUDA's, so it includes nothing and has no namespace of its own.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/arithmetic.h"
#include "kernels/blocks.h"
#include "kernels/optimizer.h"

namespace orlop::kernels {

constexpr HyperParameter Positive(const char* name, double value) { return {name, value}; }
constexpr HyperParameter AnySign(const char* name, double value) { return {name, value, -1e30}; }
constexpr HyperParameter Lr(double value) { return Positive("lr", value); }
constexpr HyperParameter Eps(double value) { return Positive("eps", value); }
constexpr HyperParameter WeightDecay(double value) { return Positive("weight_decay", value); }
constexpr HyperParameter Beta(const char* name, double value) {
  return {name, value, 0, 1, /*limit_allowed=*/false};
}
constexpr HyperParameter Flag(const char* name) { return {name, 0, 0, 1, true, /*whole=*/true}; }

inline float Fp32(double value) { return static_cast<float>(value); }
// Of what was measured: a step cannot be refused any more, so that it is kept finite.
inline float FiniteFp32(double value) { return Fp32(std::clamp(value, -3e38, 3e38)); }

// Scalars that every optimizer has come first.
inline constexpr size_t kCommonScalars = 2;  // gradient_scale, states to round stochastically

template <class O>
ORLOP_DEVICE typename O::Scalars ScalarsOf(const float* scalars) {
  typename O::Scalars own;
  if constexpr (!std::is_empty_v<typename O::Scalars>)
    std::memcpy(&own, scalars + kCommonScalars, sizeof(own));
  return own;
}

template <class O>
constexpr Scope ScopeOf() {
  if constexpr (requires { O::kScope; }) return O::kScope;
  return Scope::kElement;
}
// What a rule reads of an element beside gradient and master: its states and its input.
template <class O>
inline constexpr size_t kReads = std::size(O::kStates) + (ScopeOf<O>() >= Scope::kFactored ? 1 : 0);

// Calls change(own), of the optimizer's own scalars.
template <class O, class Change>
void ChangeScalars(float* scalars, Change change) {
  typename O::Scalars own = ScalarsOf<O>(scalars);
  change(&own);
  std::memcpy(scalars + kCommonScalars, &own, sizeof(own));
}

template <class O>
OptimizerUnit MakeUnit(const char* name, Updates reference, Updates (*active)()) {
  constexpr size_t kScalarCount = kCommonScalars + sizeof(typename O::Scalars) / sizeof(float);
  static_assert(kScalarCount <= kMaxScalars && std::size(O::kStates) <= kMaxStates);
  OptimizerUnit unit{{name, O::kHyperParameters, O::kStates, kScalarCount}, reference, active};
  if constexpr (requires { O::kTakesWeights; }) unit.optimizer.takes_weights = O::kTakesWeights;
  unit.optimizer.scope = ScopeOf<O>();
  unit.optimizer.begin = [](const MatrixShape& shape, float* scalars) {
    if constexpr (requires(typename O::Scalars * s) { O::Begin(shape, s); })
      ChangeScalars<O>(scalars, [&](typename O::Scalars* own) { O::Begin(shape, own); });
  };
  unit.optimizer.complete = [](const double* squares, const MatrixShape& shape, float* scalars) {
    if constexpr (requires(typename O::Scalars * s) { O::Complete(squares, shape, s); })
      ChangeScalars<O>(scalars,
                       [&](typename O::Scalars* own) { O::Complete(squares, shape, own); });
  };
  if constexpr (ScopeOf<O>() == Scope::kFactored)
    unit.optimizer.averaging = [](const float* scalars) {
      return O::Averaging(ScalarsOf<O>(scalars));
    };
  if constexpr (ScopeOf<O>() == Scope::kMatrix)
    unit.optimizer.iteration = [](const float* scalars) {
      return O::Iteration(ScalarsOf<O>(scalars));
    };
  unit.optimizer.prepare = [](const double* values, double t, float* scalars) {
    const typename O::Scalars own = O::Prepare(values, t);
    if constexpr (!std::is_empty_v<typename O::Scalars>)
      std::memcpy(scalars + kCommonScalars, &own, sizeof(own));
  };
  unit.optimizer.validate = [](const double* values) {
    if constexpr (requires { O::Validate(values); }) return O::Validate(values);
    return absl::OkStatus();
  };
  unit.optimizer.keeps_state = [](const float* scalars) {
    if constexpr (requires { O::KeepsState(ScalarsOf<O>(scalars)); })
      return O::KeepsState(ScalarsOf<O>(scalars));
    return true;
  };
  return unit;
}

}  // namespace orlop::kernels
