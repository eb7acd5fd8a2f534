#include "kernels/checks.h"
#include "kernels/optimizer.h"
#include "kernels/reference.h"
#include "kernels/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/sgd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/master-inl.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

// SgdScalars in vectors, and the rule of one block.
struct SgdVectors {
  explicit SgdVectors(const SgdScalars& s)
      : gradient_scale(hn::Set(DF(), s.gradient_scale)),
        minus_learning_rate(hn::Set(DF(), -s.learning_rate)),
        momentum(hn::Set(DF(), s.momentum)),
        one_minus_dampening(hn::Set(DF(), s.one_minus_dampening)),
        weight_decay(hn::Set(DF(), s.weight_decay)),
        nesterov(s.nesterov),
        first_step(s.first_step) {}

  // What momentum turns g into; updates the buffer's lanes.
  HWY_INLINE VF Direction(VF g, float* buffer) const {
    const DF df;
    VF b = g;
    if (!first_step) {
      b = hn::MulAdd(momentum, hn::LoadU(df, buffer), hn::Mul(one_minus_dampening, g));
    }
    hn::StoreU(CanonicalIfNaN(b), df, buffer);
    return nesterov ? hn::MulAdd(momentum, b, g) : b;
  }

  // `buffer` is null without momentum.
  HWY_INLINE void UpdateBlock(const MasterBlock& block, float* buffer) const {
    const DF df;
    for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
      const VF p = JoinLanes(block.weight + i, block.remainder + i);
      const VF scaled = hn::Mul(hn::LoadU(df, block.gradient + i), gradient_scale);
      const VF g = hn::MulAdd(weight_decay, p, scaled);
      const VF direction = buffer == nullptr ? g : Direction(g, buffer + i);
      SplitLanes(hn::MulAdd(minus_learning_rate, direction, p), block.new_weight + i,
                 block.remainder + i);
    }
  }

  VF gradient_scale, minus_learning_rate, momentum, one_minus_dampening, weight_decay;
  bool nesterov, first_step;
};

struct SgdPlainRule {
  HWY_INLINE void Whole(size_t begin, const MasterBlock& block) const {
    vectors.UpdateBlock(block, nullptr);
  }
  HWY_INLINE void Short(size_t begin, size_t count, const MasterBlock& block) const {
    vectors.UpdateBlock(block, nullptr);
  }
  SgdVectors vectors;
};

struct SgdFp32Rule {
  HWY_INLINE void Whole(size_t begin, const MasterBlock& block) const {
    vectors.UpdateBlock(block, state.momentum_buffer.data() + begin);
  }
  HWY_INLINE void Short(size_t begin, size_t count, const MasterBlock& block) const {
    PaddedBlock<float> buffer(state.momentum_buffer.data() + begin, count, 0);
    vectors.UpdateBlock(block, buffer.get());
    buffer.CopyTo(state.momentum_buffer.data() + begin, count);
  }
  SgdVectors vectors;
  SgdFp32State state;
};

struct Sgd8BitRule {
  HWY_INLINE void Codes(size_t begin, const MasterBlock& block, uint8_t* codes) const {
    HWY_ALIGN_MAX float buffer[kQuantBlock];
    float& absmax = state.momentum_buffer_absmax[begin / kQuantBlock];
    DecodeBlock<CodeBook::kSigned>(codes, absmax, buffer);
    vectors.UpdateBlock(block, buffer);
    absmax = EncodeBlock<CodeBook::kSigned>(Rounding::kNearest, buffer, codes);
  }
  HWY_INLINE void Whole(size_t begin, const MasterBlock& block) const {
    Codes(begin, block, state.momentum_buffer.data() + begin);
  }
  HWY_INLINE void Short(size_t begin, size_t count, const MasterBlock& block) const {
    PaddedBlock<uint8_t> codes(state.momentum_buffer.data() + begin, count, kSignedZeroCode);
    Codes(begin, block, codes.get());
    codes.CopyTo(state.momentum_buffer.data() + begin, count);
  }
  SgdVectors vectors;
  Sgd8BitState state;
};

void SgdFp32(const SgdScalars& scalars, TypedSpan gradient, MasterSpans master,
             SgdFp32State state) {
  const SgdVectors vectors(scalars);
  if (scalars.momentum == 0) return ForEachBlock(gradient, master, SgdPlainRule{vectors});
  ForEachBlock(gradient, master, SgdFp32Rule{vectors, state});
}

void Sgd8Bit(const SgdScalars& scalars, TypedSpan gradient, MasterSpans master,
             Sgd8BitState state) {
  const SgdVectors vectors(scalars);
  if (scalars.momentum == 0) return ForEachBlock(gradient, master, SgdPlainRule{vectors});
  ForEachBlock(gradient, master, Sgd8BitRule{vectors, state});
}

#else
using reference::Sgd8Bit;
using reference::SgdFp32;
#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace orlop::kernels {

HWY_EXPORT(SgdFp32);
HWY_EXPORT(Sgd8Bit);

namespace {

absl::Status CheckMaster(TypedSpan gradient, const MasterSpans& master) {
  return CheckCounts(gradient.count, {{"weight", master.weight.size()},
                                      {"remainder", master.remainder.size()},
                                      {"new_weight", master.new_weight.size()}});
}

}  // namespace

absl::Status SgdFp32(const SgdScalars& scalars, TypedSpan gradient, MasterSpans master,
                     SgdFp32State state) {
  const size_t kept = scalars.momentum == 0 ? 0 : gradient.count;
  absl::Status status = CheckMaster(gradient, master);
  status.Update(CheckCounts(kept, {{"momentum_buffer", state.momentum_buffer.size()}}));
  if (status.ok()) HWY_DYNAMIC_DISPATCH(SgdFp32)(scalars, gradient, master, state);
  return status;
}

absl::Status Sgd8Bit(const SgdScalars& scalars, TypedSpan gradient, MasterSpans master,
                     Sgd8BitState state) {
  const size_t kept = scalars.momentum == 0 ? 0 : gradient.count;
  absl::Status status = CheckMaster(gradient, master);
  status.Update(CheckCounts(kept, {{"momentum_buffer", state.momentum_buffer.size()}}));
  status.Update(CheckCounts(BlockCount(kept),
                            {{"momentum_buffer_absmax", state.momentum_buffer_absmax.size()}}));
  if (status.ok()) HWY_DYNAMIC_DISPATCH(Sgd8Bit)(scalars, gradient, master, state);
  return status;
}

}  // namespace orlop::kernels
#endif  // HWY_ONCE
