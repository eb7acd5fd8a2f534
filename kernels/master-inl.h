// How the fused optimizers walk a range: one 256-element block of gradient and master at a time,
// short blocks on padded copies. Compiled once per instruction set.
#if defined(ORLOP_KERNELS_MASTER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORLOP_KERNELS_MASTER_INL_H_
#undef ORLOP_KERNELS_MASTER_INL_H_
#else
#define ORLOP_KERNELS_MASTER_INL_H_
#endif

#include "kernels/optimizer.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

// One block as a kernel sees it: always 256 elements.
struct MasterBlock {
  const float* gradient;  // raw, widened
  const uint16_t* weight;
  int16_t* remainder;
  uint16_t* new_weight;
};

// Runs rule.Whole(begin, block) on every whole block of the range and rule.Short(begin, count,
// block) on a short last one. `begin` is the block's first element; rules index their state by it.
template <class Rule>
HWY_INLINE void ForEachBlock(TypedSpan gradient, MasterSpans master, const Rule& rule) {
  HWY_ALIGN_MAX float widened[kQuantBlock];
  const size_t tail = gradient.count % kQuantBlock;
  const size_t whole = gradient.count - tail;
  for (size_t begin = 0; begin < whole; begin += kQuantBlock) {
    WidenPaddedBlock(gradient, begin, widened);
    rule.Whole(begin,
               MasterBlock{widened, master.weight.data() + begin, master.remainder.data() + begin,
                           master.new_weight.data() + begin});
  }
  if (tail == 0) return;
  WidenPaddedBlock(gradient, whole, widened);
  PaddedBlock<uint16_t> weight(master.weight.data() + whole, tail, 0);
  PaddedBlock<int16_t> remainder(master.remainder.data() + whole, tail, 0);
  rule.Short(whole, tail, MasterBlock{widened, weight.get(), remainder.get(), weight.get()});
  weight.CopyTo(master.new_weight.data() + whole, tail);
  remainder.CopyTo(master.remainder.data() + whole, tail);
}

#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
