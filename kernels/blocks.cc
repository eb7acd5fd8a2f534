// The operations of a fused step in vectors (blocks.h).
#include "kernels/blocks.h"

#include "kernels/reference.h"  // IWYU pragma: keep (the version without fused multiply-add)
#include "kernels/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/blocks.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/codec-inl.h"
#include "kernels/codec4-inl.h"
#include "kernels/master-inl.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

void Widen(DType dtype, const void* from, float* to) {
  WidenBlock(dtype, static_cast<const uint8_t*>(from), to);
}

void Join(MasterFormat format, const uint16_t* weight, const void* remainder, float* master) {
  switch (format) {
    case MasterFormat::kExact:
      return JoinExact(weight, static_cast<const int16_t*>(remainder), master);
    case MasterFormat::k24Bit:
      return Join24(weight, static_cast<const int8_t*>(remainder), master);
    case MasterFormat::kBF16Only:
      return WidenBlock<DType::kBF16>(reinterpret_cast<const uint8_t*>(weight), master);
  }
}

void SplitBlock(MasterFormat format, const float* master, BlockRandom random, uint16_t* weight,
                void* remainder) {
  switch (format) {
    case MasterFormat::kExact:
      return SplitExact(master, weight, static_cast<int16_t*>(remainder));
    case MasterFormat::k24Bit:
      return Split24(master, random, weight, static_cast<int8_t*>(remainder));
    case MasterFormat::kBF16Only:
      return SplitBF16(master, random, weight);
  }
}

void Decode(StateFormat format, CodeBook code_book, StateSpan from, float* to) {
  const auto* codes = static_cast<const uint8_t*>(from.values);
  const bool is_signed = code_book == CodeBook::kSigned;
  if (format == StateFormat::k4Bit) return Decode4(is_signed, codes, from.absmax, to);
  if (is_signed) return DecodeBlock<CodeBook::kSigned>(codes, *from.absmax, to);
  DecodeBlock<CodeBook::kUnsigned>(codes, *from.absmax, to);
}

void Encode(StateFormat format, CodeBook code_book, Rounding rounding, const float* from,
            BlockRandom random, StateSpan to) {
  auto* codes = static_cast<uint8_t*>(to.values);
  const bool is_signed = code_book == CodeBook::kSigned;
  if (format == StateFormat::k4Bit) {
    return Encode4(is_signed, rounding, from, random, codes, to.absmax);
  }
  *to.absmax = is_signed ? EncodeBlock<CodeBook::kSigned>(rounding, from, random, codes)
                         : EncodeBlock<CodeBook::kUnsigned>(rounding, from, random, codes);
}

void EncodeFound(CodeBook code_book, Rounding rounding, const float* from, uint32_t largest_bits,
                 BlockRandom random, StateSpan to) {
  auto* codes = static_cast<uint8_t*>(to.values);
  *to.absmax = code_book == CodeBook::kSigned
                   ? EncodeBlock<CodeBook::kSigned>(rounding, from, largest_bits, random, codes)
                   : EncodeBlock<CodeBook::kUnsigned>(rounding, from, largest_bits, random, codes);
}

const BlockKernels& Table() {
  static constexpr BlockKernels kTable = {Widen,  Join,           SplitBlock, Decode,
                                          Encode, ReduceGradient, EncodeFound};
  return kTable;
}

#else
const BlockKernels& Table() { return reference::kBlockKernels; }
#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace orlop::kernels {

HWY_EXPORT(Table);
const BlockKernels& ActiveBlockKernels() { return HWY_DYNAMIC_DISPATCH(Table)(); }

}  // namespace orlop::kernels
#endif  // HWY_ONCE
