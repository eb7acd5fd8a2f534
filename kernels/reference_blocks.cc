// The reference of blocks.h and int8_blocks.h: the operations of a fused step and of the int8 wire
// in plain scalar C++.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "absl/types/span.h"
#include "kernels/arithmetic.h"
#include "kernels/blocks.h"
#include "kernels/code_books4.h"
#include "kernels/int8_blocks.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "kernels/random.h"
#include "kernels/reference.h"
#include "kernels/types.h"

namespace orlop::kernels::reference {
namespace {

void EncodeBlock4(CodeBook code_book, Rounding rounding, const float* values, BlockRandom random,
                  uint8_t* codes, float* absmax) {
  for (size_t i = 0; i < kQuantBlock; i += kFourBitBlock) {
    absmax[i / kFourBitBlock] = AbsmaxOf(code_book, {values + i, kFourBitBlock});
  }
  for (size_t i = 0; i < kQuantBlock; ++i) {
    const float unit = RandomUnit(random, static_cast<uint32_t>(i));
    const uint8_t code = Encode4(code_book, rounding, values[i], absmax[i / kFourBitBlock], unit);
    codes[i / 2] = static_cast<uint8_t>(i % 2 == 0 ? code : codes[i / 2] | code << 4);
  }
}

// Adds the low `bit_count` random bits to fp32 bits, so that cutting those bits off rounds up with
// a probability equal to the part cut off.
uint32_t Dithered(float master, int bit_count, BlockRandom random, size_t i) {
  const uint32_t bits = std::bit_cast<uint32_t>(Canonical(master));
  if (!std::isfinite(master)) return bits;
  return bits + (RandomBits(random, static_cast<uint32_t>(i)) >> (32 - bit_count));
}

void WidenOfBlock(DType dtype, const void* from, float* to) {
  for (size_t i = 0; i < kQuantBlock; ++i) to[i] = Load({dtype, from, kQuantBlock}, i);
}

void JoinOfBlock(MasterFormat format, const uint16_t* weight, const void* remainder,
                 float* master) {
  for (size_t i = 0; i < kQuantBlock; ++i) {
    int16_t low = 0;
    if (format == MasterFormat::kExact) {
      low = static_cast<const int16_t*>(remainder)[i];
    } else if (format == MasterFormat::k24Bit) {
      low = static_cast<int16_t>(static_cast<const int8_t*>(remainder)[i] * 256);
    }
    master[i] = Join(weight[i], low);
  }
}

void SplitOfBlock(MasterFormat format, const float* master, BlockRandom random, uint16_t* weight,
                  void* remainder) {
  for (size_t i = 0; i < kQuantBlock; ++i) {
    if (format == MasterFormat::kExact) {
      const SplitValue split = Split(master[i]);
      weight[i] = split.weight;
      static_cast<int16_t*>(remainder)[i] = split.remainder;
    } else if (format == MasterFormat::k24Bit) {
      const uint32_t bits = Dithered(master[i], 8, random, i);
      weight[i] = static_cast<uint16_t>((bits + 0x8000) >> 16);
      static_cast<int8_t*>(remainder)[i] = static_cast<int8_t>(bits >> 8);
    } else {
      weight[i] = static_cast<uint16_t>(Dithered(master[i], 16, random, i) >> 16);
    }
  }
}

void DecodeOfBlock(StateFormat format, CodeBook code_book, StateSpan from, float* to) {
  const auto* codes = static_cast<const uint8_t*>(from.values);
  for (size_t i = 0; i < kQuantBlock; ++i) {
    if (format == StateFormat::k8Bit) {
      to[i] = Decode(code_book, codes[i], *from.absmax);
      continue;
    }
    const uint8_t code = i % 2 == 0 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
    to[i] = Decode4(code_book, code, from.absmax[i / kFourBitBlock]);
  }
}

void EncodeOfBlock(StateFormat format, CodeBook code_book, Rounding rounding, const float* from,
                   BlockRandom random, StateSpan to) {
  auto* codes = static_cast<uint8_t*>(to.values);
  if (format == StateFormat::k4Bit)
    return EncodeBlock4(code_book, rounding, from, random, codes, to.absmax);
  QuantizeBlock(code_book, rounding, from, kQuantBlock, random, codes, to.absmax);
}

}  // namespace

void EncodeInt8(TypedSpan source, const ErrorFeedback* feedback, absl::Span<uint8_t> wire) {
  for (size_t begin = 0; begin < source.count; begin += kQuantBlock) {
    const size_t count = std::min(kQuantBlock, source.count - begin);
    float x[kQuantBlock];
    float absmax = 0;
    bool finite = true;
    for (size_t i = 0; i < count; ++i) {
      x[i] = Load(source, begin + i);
      if (feedback != nullptr)
        x[i] = std::fma(BF16ToF32(feedback->residual[begin + i]), feedback->loss_scale, x[i]);
      absmax = std::max(absmax, std::fabs(x[i]));
      finite = finite && std::isfinite(x[i]);
    }
    const float scale = finite ? absmax / 127 : CanonicalNaN();
    uint8_t* const to = wire.data() + begin / kQuantBlock * kInt8BlockBytes;
    std::memcpy(to, &scale, sizeof scale);
    for (size_t i = 0; i < count; ++i) {
      const float nearest = std::nearbyint(std::clamp(x[i] / scale, -127.0f, 127.0f));
      const auto code = static_cast<int8_t>(scale > 0 ? nearest : 0);
      to[sizeof scale + i] = static_cast<uint8_t>(code);
      if (feedback == nullptr) continue;
      const float decoded = BF16ToF32(F32ToBF16(code * scale));
      feedback->next[begin + i] = F32ToBF16((x[i] - decoded) * (1 / feedback->loss_scale));
    }
  }
}

void DecodeInt8(absl::Span<const uint8_t> wire, absl::Span<uint16_t> values) {
  for (size_t i = 0; i < values.size(); ++i) {
    const uint8_t* const block = wire.data() + i / kQuantBlock * kInt8BlockBytes;
    float scale;
    std::memcpy(&scale, block, sizeof scale);
    const auto code = static_cast<int8_t>(block[sizeof scale + i % kQuantBlock]);
    values[i] = F32ToBF16(std::isfinite(scale) ? code * scale : CanonicalNaN());
  }
}

const BlockKernels kBlockKernels = {WidenOfBlock,  JoinOfBlock,   SplitOfBlock,
                                    DecodeOfBlock, EncodeOfBlock, reference::ReduceGradient,
                                    nullptr};

}  // namespace orlop::kernels::reference
