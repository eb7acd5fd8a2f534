// RequantizeBlocks is the inverse of DequantizeBlocks where one exists, else QuantizeBlocks. Also
// the 4-bit blocks that LOADs and reads use outside the fused steps.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/checks.h"
#include "kernels/code_books4.h"
#include "kernels/quantize.h"
#include "kernels/reference.h"
#include "kernels/types.h"

namespace orlop::kernels {
namespace {

// A format of codes: 256-blocks of bytes or 128-blocks of nibbles.
struct Format {
  size_t block;
  float lowest;  // magnitude of the signed code 0
  uint8_t (*encode)(CodeBook, Rounding, float, float, float);
  float (*decode)(CodeBook, uint8_t, float);
};
const Format k8BitFormat = {kQuantBlock, -kSignedCodeBook[0], reference::Encode, reference::Decode};
const Format k4BitFormat = {kFourBitBlock, -kSigned4CodeBook[0], reference::Encode4,
                            reference::Decode4};

// Finds codes that decode to exactly these signed values with this absmax. Returns false if there
// are none.
bool EncodeExactly(const Format& format, absl::Span<const float> values, float absmax,
                   uint8_t* codes) {
  for (size_t i = 0; i < values.size(); ++i) {
    codes[i] = format.encode(CodeBook::kSigned, Rounding::kNoZero, values[i], absmax, 0);
    const float decoded = format.decode(CodeBook::kSigned, codes[i], absmax);
    if (std::bit_cast<uint32_t>(decoded) != std::bit_cast<uint32_t>(values[i])) return false;
  }
  return true;
}

// Finds the codes and absmax of a block whose largest value got code 0. Changes neither if there
// are none.
void RecoverScale(const Format& format, absl::Span<const float> values, uint8_t* codes,
                  float* absmax) {
  const bool negative = std::find(values.begin(), values.end(), -*absmax) != values.end();
  if (*absmax <= 0 || !negative) return;
  const float nearest = *absmax / format.lowest;
  std::array<uint8_t, kQuantBlock> exact;
  for (const float candidate :
       {nearest, std::nextafter(nearest, 0.0f), std::nextafter(nearest, INFINITY)}) {
    if (!std::isfinite(candidate) || format.lowest * candidate != *absmax) continue;
    if (!EncodeExactly(format, values, candidate, exact.data())) continue;
    std::copy_n(exact.begin(), values.size(), codes);
    *absmax = candidate;
    return;
  }
}

}  // namespace

absl::Status RequantizeBlocks(CodeBook code_book, Rounding rounding, absl::Span<const float> values,
                              absl::Span<uint8_t> codes, absl::Span<float> absmax) {
  absl::Status status = QuantizeBlocks(code_book, rounding, values, codes, absmax);
  if (!status.ok() || code_book == CodeBook::kUnsigned) return status;
  for (size_t block = 0; block < absmax.size(); ++block) {
    RecoverScale(k8BitFormat, values.subspan(block * kQuantBlock, kQuantBlock),
                 codes.data() + block * kQuantBlock, &absmax[block]);
  }
  return absl::OkStatus();
}

absl::Status RequantizeBlocks4(CodeBook code_book, Rounding rounding,
                               absl::Span<const float> values, absl::Span<uint8_t> codes,
                               absl::Span<float> absmax) {
  absl::Status status = CheckCounts((values.size() + 1) / 2, {{"codes", codes.size()}});
  status.Update(CheckCounts(FourBitBlockCount(values.size()), {{"absmax", absmax.size()}}));
  if (!status.ok()) return status;
  for (size_t block = 0; block < absmax.size(); ++block) {
    const auto part = values.subspan(block * kFourBitBlock, kFourBitBlock);
    std::array<uint8_t, kFourBitBlock> wide;
    wide.fill(code_book == CodeBook::kSigned ? kSigned4ZeroCode : kUnsigned4LeastCode);
    absmax[block] = reference::AbsmaxOf(code_book, part);
    for (size_t i = 0; i < part.size(); ++i) {
      wide[i] = reference::Encode4(code_book, Deterministic(rounding), part[i], absmax[block], 0);
    }
    if (code_book == CodeBook::kSigned)
      RecoverScale(k4BitFormat, part, wide.data(), &absmax[block]);
    for (size_t i = 0; i < part.size(); i += 2) {
      codes[(block * kFourBitBlock + i) / 2] = static_cast<uint8_t>(wide[i] | wide[i + 1] << 4);
    }
  }
  return absl::OkStatus();
}

absl::Status DequantizeBlocks4(CodeBook code_book, absl::Span<const uint8_t> codes,
                               absl::Span<const float> absmax, absl::Span<float> values) {
  absl::Status status = CheckCounts((values.size() + 1) / 2, {{"codes", codes.size()}});
  status.Update(CheckCounts(FourBitBlockCount(values.size()), {{"absmax", absmax.size()}}));
  for (size_t i = 0; i < values.size() && status.ok(); ++i) {
    const uint8_t code = i % 2 == 0 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
    values[i] = reference::Decode4(code_book, code, absmax[i / kFourBitBlock]);
  }
  return status;
}

}  // namespace orlop::kernels
