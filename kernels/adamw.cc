// One push, 8 of 8 (ARCHITECTURE.md)
#include "kernels/checks.h"
#include "kernels/optimizer.h"
#include "kernels/reference.h"
#include "kernels/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/adamw.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/master-inl.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

// from + (to - from) * (1 - beta), in the form that the reference's Lerp chooses.
struct LerpWeights {
  LerpWeights(float beta, float one_minus_beta)
      : from_first(one_minus_beta < 0.5f),
        weight(hn::Set(DF(), from_first ? one_minus_beta : -beta)) {}
  HWY_INLINE VF operator()(VF from, VF to) const {
    return hn::MulAdd(weight, hn::Sub(to, from), from_first ? from : to);
  }
  bool from_first;
  VF weight;
};

// AdamWScalars in vectors, and the rule of one vector of elements.
struct AdamWVectors {
  explicit AdamWVectors(const AdamWScalars& s)
      : gradient_scale(hn::Set(DF(), s.gradient_scale)),
        exp_avg(s.beta1, s.one_minus_beta1),
        exp_avg_sq(s.beta2, s.one_minus_beta2),
        eps(hn::Set(DF(), s.eps)),
        step_size(hn::Set(DF(), s.step_size)),
        inverse_sqrt_bias_correction2(hn::Set(DF(), s.inverse_sqrt_bias_correction2)),
        decay(hn::Set(DF(), s.decay)) {}

  // Updates lanes i .. of the block's master and of the moments at m and v.
  HWY_INLINE void Update(const MasterBlock& block, size_t i, float* m_at, float* v_at) const {
    const DF df;
    const VF g = hn::Mul(hn::LoadU(df, block.gradient + i), gradient_scale);
    const VF p = JoinLanes(block.weight + i, block.remainder + i);
    const VF m = exp_avg(hn::LoadU(df, m_at), g);
    const VF v = exp_avg_sq(hn::LoadU(df, v_at), hn::Mul(g, g));
    const VF denominator = hn::MulAdd(hn::Sqrt(v), inverse_sqrt_bias_correction2, eps);
    const VF change = hn::MulAdd(decay, p, hn::Mul(step_size, hn::Div(m, denominator)));
    hn::StoreU(CanonicalIfNaN(m), df, m_at);
    hn::StoreU(CanonicalIfNaN(v), df, v_at);
    SplitLanes(hn::Sub(p, change), block.new_weight + i, block.remainder + i);
  }

  HWY_INLINE void UpdateBlock(const MasterBlock& block, float* m, float* v) const {
    for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) Update(block, i, m + i, v + i);
  }

  VF gradient_scale;
  LerpWeights exp_avg, exp_avg_sq;
  VF eps, step_size, inverse_sqrt_bias_correction2, decay;
};

struct AdamWFp32Rule {
  HWY_INLINE void Whole(size_t begin, const MasterBlock& block) const {
    vectors.UpdateBlock(block, state.exp_avg.data() + begin, state.exp_avg_sq.data() + begin);
  }
  HWY_INLINE void Short(size_t begin, size_t count, const MasterBlock& block) const {
    PaddedBlock<float> m(state.exp_avg.data() + begin, count, 0);
    PaddedBlock<float> v(state.exp_avg_sq.data() + begin, count, 0);
    vectors.UpdateBlock(block, m.get(), v.get());
    m.CopyTo(state.exp_avg.data() + begin, count);
    v.CopyTo(state.exp_avg_sq.data() + begin, count);
  }
  AdamWVectors vectors;
  AdamWFp32State state;
};

struct AdamW8BitRule {
  HWY_INLINE void Codes(size_t begin, const MasterBlock& block, uint8_t* m_codes,
                        uint8_t* v_codes) const {
    HWY_ALIGN_MAX float m[kQuantBlock];
    HWY_ALIGN_MAX float v[kQuantBlock];
    float& m_absmax = state.exp_avg_absmax[begin / kQuantBlock];
    float& v_absmax = state.exp_avg_sq_absmax[begin / kQuantBlock];
    DecodeBlock<CodeBook::kSigned>(m_codes, m_absmax, m);
    DecodeBlock<CodeBook::kUnsigned>(v_codes, v_absmax, v);
    vectors.UpdateBlock(block, m, v);
    m_absmax = EncodeBlock<CodeBook::kSigned>(Rounding::kNearest, m, m_codes);
    v_absmax = EncodeBlock<CodeBook::kUnsigned>(state.exp_avg_sq_rounding, v, v_codes);
  }
  HWY_INLINE void Whole(size_t begin, const MasterBlock& block) const {
    Codes(begin, block, state.exp_avg.data() + begin, state.exp_avg_sq.data() + begin);
  }
  HWY_INLINE void Short(size_t begin, size_t count, const MasterBlock& block) const {
    PaddedBlock<uint8_t> m(state.exp_avg.data() + begin, count, kSignedZeroCode);
    PaddedBlock<uint8_t> v(state.exp_avg_sq.data() + begin, count, kUnsignedZeroCode);
    Codes(begin, block, m.get(), v.get());
    m.CopyTo(state.exp_avg.data() + begin, count);
    v.CopyTo(state.exp_avg_sq.data() + begin, count);
  }
  AdamWVectors vectors;
  AdamW8BitState state;
};

void AdamWFp32(const AdamWScalars& scalars, TypedSpan gradient, MasterSpans master,
               AdamWFp32State state) {
  ForEachBlock(gradient, master, AdamWFp32Rule{AdamWVectors(scalars), state});
}

void AdamW8Bit(const AdamWScalars& scalars, TypedSpan gradient, MasterSpans master,
               AdamW8BitState state) {
  ForEachBlock(gradient, master, AdamW8BitRule{AdamWVectors(scalars), state});
}

#else
using reference::AdamW8Bit;
using reference::AdamWFp32;
#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace orlop::kernels {

HWY_EXPORT(AdamWFp32);
HWY_EXPORT(AdamW8Bit);

absl::Status AdamWFp32(const AdamWScalars& scalars, TypedSpan gradient, MasterSpans master,
                       AdamWFp32State state) {
  absl::Status status = CheckCounts(gradient.count, {{"weight", master.weight.size()},
                                                     {"remainder", master.remainder.size()},
                                                     {"new_weight", master.new_weight.size()},
                                                     {"exp_avg", state.exp_avg.size()},
                                                     {"exp_avg_sq", state.exp_avg_sq.size()}});
  if (status.ok()) HWY_DYNAMIC_DISPATCH(AdamWFp32)(scalars, gradient, master, state);
  return status;
}

absl::Status AdamW8Bit(const AdamWScalars& scalars, TypedSpan gradient, MasterSpans master,
                       AdamW8BitState state) {
  absl::Status status = CheckCounts(gradient.count, {{"weight", master.weight.size()},
                                                     {"remainder", master.remainder.size()},
                                                     {"new_weight", master.new_weight.size()},
                                                     {"exp_avg", state.exp_avg.size()},
                                                     {"exp_avg_sq", state.exp_avg_sq.size()}});
  status.Update(CheckCounts(BlockCount(gradient.count),
                            {{"exp_avg_absmax", state.exp_avg_absmax.size()},
                             {"exp_avg_sq_absmax", state.exp_avg_sq_absmax.size()}}));
  if (status.ok()) HWY_DYNAMIC_DISPATCH(AdamW8Bit)(scalars, gradient, master, state);
  return status;
}

}  // namespace orlop::kernels
#endif  // HWY_ONCE
