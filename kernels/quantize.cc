#include "kernels/quantize.h"

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/checks.h"
#include "kernels/reference.h"
#include "kernels/simd_targets.h"
#include "kernels/types.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quantize.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/codec-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

template <CodeBook kBook>
HWY_INLINE void Quantize(Rounding rounding, const float* values, size_t count, uint8_t* codes,
                         float* absmax) {
  for (; count >= kQuantBlock; count -= kQuantBlock) {
    *absmax++ = EncodeBlock<kBook>(rounding, values, {}, codes);
    values += kQuantBlock;
    codes += kQuantBlock;
  }
  if (count == 0) return;
  PaddedBlock<float> tail(values, count, 0);
  PaddedBlock<uint8_t> tail_codes(0);
  *absmax = EncodeBlock<kBook>(rounding, tail.get(), {}, tail_codes.get());
  tail_codes.CopyTo(codes, count);
}

template <CodeBook kBook>
HWY_INLINE void Dequantize(const uint8_t* codes, size_t count, const float* absmax, float* values) {
  for (; count >= kQuantBlock; count -= kQuantBlock) {
    DecodeBlock<kBook>(codes, *absmax++, values);
    codes += kQuantBlock;
    values += kQuantBlock;
  }
  if (count == 0) return;
  PaddedBlock<uint8_t> tail_codes(codes, count, 0);
  PaddedBlock<float> tail(0);
  DecodeBlock<kBook>(tail_codes.get(), *absmax, tail.get());
  tail.CopyTo(values, count);
}

void QuantizeBlocks(CodeBook code_book, Rounding rounding, absl::Span<const float> values,
                    absl::Span<uint8_t> codes, absl::Span<float> absmax) {
  if (code_book == CodeBook::kSigned) {
    Quantize<CodeBook::kSigned>(rounding, values.data(), values.size(), codes.data(),
                                absmax.data());
  } else {
    Quantize<CodeBook::kUnsigned>(rounding, values.data(), values.size(), codes.data(),
                                  absmax.data());
  }
}

void DequantizeBlocks(CodeBook code_book, absl::Span<const uint8_t> codes,
                      absl::Span<const float> absmax, absl::Span<float> values) {
  if (code_book == CodeBook::kSigned) {
    Dequantize<CodeBook::kSigned>(codes.data(), codes.size(), absmax.data(), values.data());
  } else {
    Dequantize<CodeBook::kUnsigned>(codes.data(), codes.size(), absmax.data(), values.data());
  }
}

#else
using reference::DequantizeBlocks;
using reference::QuantizeBlocks;
#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace orlop::kernels {

HWY_EXPORT(QuantizeBlocks);
HWY_EXPORT(DequantizeBlocks);

absl::Status QuantizeBlocks(CodeBook code_book, Rounding rounding, absl::Span<const float> values,
                            absl::Span<uint8_t> codes, absl::Span<float> absmax) {
  absl::Status status = CheckCounts(values.size(), {{"codes", codes.size()}});
  status.Update(CheckCounts(BlockCount(values.size()), {{"absmax", absmax.size()}}));
  if (status.ok()) {
    HWY_DYNAMIC_DISPATCH(QuantizeBlocks)
    (code_book, Deterministic(rounding), values, codes, absmax);
  }
  return status;
}

absl::Status DequantizeBlocks(CodeBook code_book, absl::Span<const uint8_t> codes,
                              absl::Span<const float> absmax, absl::Span<float> values) {
  absl::Status status = CheckCounts(codes.size(), {{"values", values.size()}});
  status.Update(CheckCounts(BlockCount(codes.size()), {{"absmax", absmax.size()}}));
  if (status.ok()) HWY_DYNAMIC_DISPATCH(DequantizeBlocks)(code_book, codes, absmax, values);
  return status;
}

}  // namespace orlop::kernels
#endif  // HWY_ONCE
