// Random numbers for stochastic rounding. A number is a function of (job seed, tensor, step,
// element, use), so shards, threads and instruction sets do not change it, and a step can be
// replayed.
//   Source    the 64-bit mix is SplitMix64's finaliser (Steele et al., 2014); the 32-bit one is
//             Wellons' lowbias32 (nullprogram.com/blog/2018/07/31).
#pragma once
#include <cstdint>

#include "kernels/arithmetic.h"

namespace orlop::kernels {

ORLOP_DEVICE inline uint64_t Mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The key of one tensor in one step.
struct RandomKey {
  uint64_t bits = 0;
  static RandomKey Of(uint64_t seed, uint64_t tensor, uint64_t step) {
    constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
    return {Mix64(Mix64(Mix64(seed + kGolden) + tensor + kGolden) + step + kGolden)};
  }
};

// `use` tells apart the numbers of one element: each state of a tensor, and its master, has its
// own.
inline constexpr uint32_t kMasterUse = 15;

// The random words of one 256-block and one use.
struct BlockRandom {
  uint32_t low, high;
};
ORLOP_DEVICE inline BlockRandom BlockRandomOf(RandomKey key, uint64_t block, uint32_t use) {
  const uint64_t bits = Mix64(key.bits + (block * 16 + use) * 0x9e3779b97f4a7c15u);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

ORLOP_DEVICE inline uint32_t Mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
ORLOP_DEVICE inline uint32_t RandomBits(BlockRandom block, uint32_t element) {
  return Mix32(Mix32(element ^ block.low) + block.high);
}
// Returns a number in [0, 1), a multiple of 2^-24.
ORLOP_DEVICE inline float RandomUnit(BlockRandom block, uint32_t element) {
  return static_cast<float>(RandomBits(block, element) >> 8) * 0x1p-24f;
}

}  // namespace orlop::kernels
