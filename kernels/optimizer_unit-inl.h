// One optimizer's rule over 256 elements, for the current instruction set. The last part, compiled
// once, is the rule for the scalar reference and the registration. optimizer_unit.cc.in defines
// ORLOP_OPTIMIZER_*.
#include "kernels/fused-inl.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
namespace {
#if HWY_NATIVE_FMA

#undef ORLOP_RULE
#define ORLOP_RULE HWY_INLINE
#include "kernels/optimizers/lerp.h"
#include ORLOP_OPTIMIZER_HEADER

// Reads the rule's inputs (kReads) for one vector of elements; a null array counts as zeros.
HWY_INLINE void Read(float* const* states, size_t i, VF* state) {
  ORLOP_UNROLL
  for (size_t s = 0; s < kReads<ORLOP_OPTIMIZER_STRUCT>; ++s) {
    state[s] = states[s] != nullptr ? hn::LoadU(DF(), states[s] + i) : hn::Zero(DF());
  }
}

void Update(const float* scalars, const float* gradient, float* master, float* const* states) {
  using O = ORLOP_OPTIMIZER_STRUCT;
  const DF df;
  const O::Rule<VectorArithmetic> rule(ScalarsOf<O>(scalars));
  const VF scale = hn::Set(df, scalars[0]);
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    VF state[kReads<O>];
    Read(states, i, state);
    const VF g = hn::Mul(hn::LoadU(df, gradient + i), scale);
    hn::StoreU(rule(g, hn::LoadU(df, master + i), state), df, master + i);
    ORLOP_UNROLL
    for (size_t s = 0; s < std::size(O::kStates); ++s) {
      if (states[s] != nullptr) hn::StoreU(CanonicalIfNaN(state[s]), df, states[s] + i);
    }
  }
}

template <class O>
void MeasureBlock(const float* scalars, const float* gradient, const float* master,
                  float* const* states, float* const* out) {
  const DF df;
  const typename O::template Rule<VectorArithmetic> rule(ScalarsOf<O>(scalars));
  const VF scale = hn::Set(df, scalars[0]);
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    VF state[kReads<O>], measured[kMeasures];
    Read(states, i, state);
    const VF g = hn::Mul(hn::LoadU(df, gradient + i), scale);
    rule.Measure(g, hn::LoadU(df, master + i), state, measured);
    ORLOP_UNROLL
    for (size_t m = 0; m < kMeasures; ++m) {
      hn::StoreU(CanonicalIfNaN(measured[m]), df, out[m] + i);
    }
  }
}

template <class O>
void Fused(const float* scalars, const FusedRange& range) {
  if (range.dtype == DType::kBF16) return FusedPass<O, DType::kBF16>::Run(scalars, range);
  FusedPass<O, DType::kF32>::Run(scalars, range);
}

template <class O>
Updates UpdatesOfRule() {
  Updates updates{Update, nullptr, nullptr};
  if constexpr (kReads<O> == std::size(O::kStates)) updates.fused = Fused<O>;  // no input
  if constexpr (ScopeOf<O>() != Scope::kElement) updates.measure = MeasureBlock<O>;
  return updates;
}
Updates UpdatesOf() { return UpdatesOfRule<ORLOP_OPTIMIZER_STRUCT>(); }

#else
Updates UpdatesOf() { return {}; }  // the reference runs instead
#endif  // HWY_NATIVE_FMA
}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace orlop::kernels {
namespace reference {
namespace {

#undef ORLOP_RULE
#define ORLOP_RULE
#include "kernels/optimizers/lerp.h"
#include ORLOP_OPTIMIZER_HEADER

using O = ORLOP_OPTIMIZER_STRUCT;

void Read(float* const* states, size_t i, float* state) {
  for (size_t s = 0; s < kReads<O>; ++s) state[s] = states[s] != nullptr ? states[s][i] : 0;
}

void Update(const float* scalars, const float* gradient, float* master, float* const* states) {
  const O::Rule<ScalarArithmetic> rule(ScalarsOf<O>(scalars));
  for (size_t i = 0; i < kQuantBlock; ++i) {
    float state[kReads<O>];
    Read(states, i, state);
    master[i] = rule(gradient[i] * scalars[0], master[i], state);
    for (size_t s = 0; s < std::size(O::kStates); ++s) {
      if (states[s] != nullptr) states[s][i] = Canonical(state[s]);
    }
  }
}

template <class Rule>
void MeasureBlock(const float* scalars, const float* gradient, const float* master,
                  float* const* states, float* const* out) {
  const Rule rule(ScalarsOf<O>(scalars));
  for (size_t i = 0; i < kQuantBlock; ++i) {
    float state[kReads<O>], measured[kMeasures];
    Read(states, i, state);
    rule.Measure(gradient[i] * scalars[0], master[i], state, measured);
    for (size_t m = 0; m < kMeasures; ++m) out[m][i] = Canonical(measured[m]);
  }
}

template <class Optimizer>
constexpr Updates UpdatesOfRule() {
  Updates updates{Update, nullptr, nullptr};
  if constexpr (ScopeOf<Optimizer>() != Scope::kElement)
    updates.measure = MeasureBlock<typename Optimizer::template Rule<ScalarArithmetic>>;
  return updates;
}

}  // namespace
}  // namespace reference

HWY_EXPORT(UpdatesOf);

OptimizerUnit ORLOP_OPTIMIZER_UNIT() {
  static constexpr Updates kReference = reference::UpdatesOfRule<reference::O>();
  return MakeUnit<reference::O>(ORLOP_OPTIMIZER_NAME, kReference, [] {
    const Updates updates = HWY_DYNAMIC_DISPATCH(UpdatesOf)();
    return updates.update != nullptr ? updates : kReference;
  });
}

}  // namespace orlop::kernels
#endif  // HWY_ONCE
