// RequantizeBlocks: the inverse of DequantizeBlocks where there is one, else QuantizeBlocks.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "kernels/quantize.h"
#include "kernels/reference.h"

namespace orlop::kernels {
namespace {

// Writes codes that decode to exactly these signed values with this absmax; false if none do.
bool EncodeExactly(absl::Span<const float> values, float absmax, uint8_t* codes) {
  for (size_t i = 0; i < values.size(); ++i) {
    codes[i] = reference::Encode(CodeBook::kSigned, Rounding::kNearest, values[i], absmax);
    const float decoded = reference::Decode(CodeBook::kSigned, codes[i], absmax);
    if (std::bit_cast<uint32_t>(decoded) != std::bit_cast<uint32_t>(values[i])) return false;
  }
  return true;
}

// The absmax of a block whose largest value was coded 0; `absmax` stays if there is none.
void RecoverScale(absl::Span<const float> values, uint8_t* codes, float* absmax) {
  const float lowest = -kSignedCodeBook[0];
  const float nearest = *absmax / lowest;
  std::array<uint8_t, kQuantBlock> exact;
  for (const float candidate :
       {nearest, std::nextafter(nearest, 0.0f), std::nextafter(nearest, INFINITY)}) {
    if (!std::isfinite(candidate) || lowest * candidate != *absmax) continue;
    if (!EncodeExactly(values, candidate, exact.data())) continue;
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
    const auto part = values.subspan(block * kQuantBlock, kQuantBlock);
    const bool negative = std::find(part.begin(), part.end(), -absmax[block]) != part.end();
    if (absmax[block] > 0 && negative)
      RecoverScale(part, codes.data() + block * kQuantBlock, &absmax[block]);
  }
  return absl::OkStatus();
}

}  // namespace orlop::kernels
