// One optimizer's rule over 256 elements, for the instruction set at hand, and, once, for the
// scalar reference, with its registration. ORLOP_OPTIMIZER_* are those of optimizer_unit.cc.in.
#include "kernels/codec-inl.h"
#include "kernels/master-inl.h"
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

// What the rule reads of a vector's elements (kReads); an array that is not there is zeros.
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

// Two vectors: what the exact master is joined and split by.
template <DType kType>
HWY_INLINE void UpdateTwo(const ORLOP_OPTIMIZER_STRUCT::Rule<VectorArithmetic>& rule, VF scale,
                          const FusedBlock& block, size_t i, hn::Vec<DU>* largest) {
  using O = ORLOP_OPTIMIZER_STRUCT;
  constexpr size_t kStates = std::size(O::kStates);
  const auto* gradient = static_cast<const uint8_t*>(block.gradient);
  VF master[2];
  JoinTwo(block.weight + i, block.remainder + i, &master[0], &master[1]);
  ORLOP_UNROLL
  for (size_t j = 0; j < 2; ++j) {
    const size_t at = i + j * FloatLanes();
    VF state[kStates] = {};
    ORLOP_UNROLL
    for (size_t s = 0; s < kStates; ++s) state[s] = hn::LoadU(DF(), block.values[s] + at);
    const VF g = hn::Mul(LoadTyped<kType>(gradient + at * SizeOf(kType)), scale);
    master[j] = rule(g, master[j], state);
    ORLOP_UNROLL
    for (size_t s = 0; s < kStates; ++s) {
      hn::StoreU(state[s], DF(), block.values[s] + at);
      largest[s] = O::kStates[s].code_book == CodeBook::kSigned
                       ? Map<CodeBook::kSigned>::Larger(largest[s], state[s])
                       : Map<CodeBook::kUnsigned>::Larger(largest[s], state[s]);
    }
  }
  SplitTwo(master[0], master[1], block.new_weight + i, block.remainder + i);
}

template <DType kType>
HWY_INLINE void UpdateFused(const float* scalars, FusedBlock* block) {
  using O = ORLOP_OPTIMIZER_STRUCT;
  constexpr size_t kStates = std::size(O::kStates);
  ORLOP_UNROLL
  for (size_t s = 0; s < kStates; ++s) {
    const auto* codes = static_cast<const uint8_t*>(block->states[s].values);
    if (O::kStates[s].code_book == CodeBook::kSigned) {
      DecodeBlock<CodeBook::kSigned>(codes, *block->states[s].absmax, block->values[s]);
    } else {
      DecodeBlock<CodeBook::kUnsigned>(codes, *block->states[s].absmax, block->values[s]);
    }
  }
  const O::Rule<VectorArithmetic> rule(ScalarsOf<O>(scalars));
  const VF scale = hn::Set(DF(), scalars[0]);
  hn::Vec<DU> largest[kStates];
  ORLOP_UNROLL
  for (size_t s = 0; s < kStates; ++s) largest[s] = hn::Zero(DU());
  for (size_t i = 0; i < kQuantBlock; i += 2 * FloatLanes()) {
    UpdateTwo<kType>(rule, scale, *block, i, largest);
  }
  ORLOP_UNROLL
  for (size_t s = 0; s < kStates; ++s) {
    block->largest_bits[s] = hn::GetLane(hn::MaxOfLanes(DU(), largest[s]));
  }
}

void Fused(const float* scalars, FusedBlock* block) {
  if (block->dtype == DType::kBF16) return UpdateFused<DType::kBF16>(scalars, block);
  UpdateFused<DType::kF32>(scalars, block);
}

template <class O>
Updates UpdatesOfRule() {
  constexpr bool kHasInput = kReads < O >> std::size(O::kStates);
  Updates updates{Update, kHasInput ? nullptr : Fused, nullptr};
  if constexpr (ScopeOf<O>() != Scope::kElement) updates.measure = MeasureBlock<O>;
  return updates;
}
Updates UpdatesOf() { return UpdatesOfRule<ORLOP_OPTIMIZER_STRUCT>(); }

#else
Updates UpdatesOf() { return {}; }  // the reference runs
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
