// The interface that an optimizer's file implements. kernels/optimizers/NAME.h has one struct with
//
//   kHyperParameters   names, defaults and ranges, in the order of Prepare's argument
//   kStates            up to three StateSpec. If there are none, here or above: an empty std::array
//   Scalars            a struct of floats, the scalars of one step
//   Prepare(h, t)      computes Scalars in fp64 for the t-th update, t from 1
//   Rule<A>            is constructed from Scalars; operator()(gradient, master, states) returns
//                      the new master and updates the states, with the operations of arithmetic.h
//   Validate(h)        optional: checks that the ranges cannot express
//   KeepsState(s)      optional: false if this step uses no state
//   kTakesWeights      optional: true if pushed values are new weights (Optimizer::takes_weights)
//
// An optimizer that reads the whole tensor first (Scope in optimizer.h) also has
//
//   kScope
//   Begin(shape, s)    optional: sets the scalars that depend on the tensor's shape
//   Complete(squares, shape, s)
//                      sets the scalars that depend on the measured sums; only + - * / and sqrt
//   Rule<A>::Measure(gradient, master, states, out)
//                      computes the two vectors whose norms are taken; for kMatrix, the update in
//                      out[0]. May change `states`, which are copies
//   Averaging(s)       kFactored: returns FactorAverage
//   Iteration(s)       kMatrix: returns NewtonSchulz
//
// and gets the element's input as the entry after its states.
//
// The file is included inside the namespace of each instruction set, of the scalar reference and of
// CUDA, so it includes nothing and opens no namespace.
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
// For measured values: the step can no longer be refused, so the result must be finite.
inline float FiniteFp32(double value) { return Fp32(std::clamp(value, -3e38, 3e38)); }

// The scalars of every optimizer begin with these two.
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
// Values that a rule reads of an element besides gradient and master: its states and its input.
template <class O>
inline constexpr size_t kReads = std::size(O::kStates) + (ScopeOf<O>() >= Scope::kFactored ? 1 : 0);

// Calls change(own) on the optimizer's own scalars.
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
