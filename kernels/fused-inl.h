// The fused pass: one step of one optimizer over 256-element blocks. States are 8-bit codes; the
// master is exact (an fp32 value, stored as a bf16 weight and an int16 remainder). The pass decodes
// the states of a block, joins its masters, applies the optimizer's rule and splits the masters
// again. While it steps one block, it encodes the new states of the block before, so that divisions
// and square roots overlap with work that does not wait for them. This file is compiled once per
// instruction set and optimizer. Instruction sets without FMA use the scalar reference.
#if defined(ORLOP_KERNELS_FUSED_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORLOP_KERNELS_FUSED_INL_H_
#undef ORLOP_KERNELS_FUSED_INL_H_
#else
#define ORLOP_KERNELS_FUSED_INL_H_
#endif

#include <algorithm>
#include <bit>
#include <iterator>

#include "kernels/blocks.h"
#include "kernels/codec-inl.h"
#include "kernels/master-inl.h"
#include "kernels/optimizer_rule.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

// `O` is the optimizer's struct (optimizer_rule.h), `kType` the gradient's dtype: kBF16 or kF32.
template <class O, DType kType>
class FusedPass {
 public:
  // Steps all blocks of `range`. `scalars` are those of StepScalars: scalars[0] multiplies the
  // gradient, and the optimizer's own begin at kCommonScalars. Threads may run disjoint ranges at
  // the same time.
  static void Run(const float* scalars, const FusedRange& range) {
    const Rule rule(ScalarsOf<O>(scalars));
    const VF scale = hn::Set(DF(), scalars[0]);
    // Block b is in stepped[b % 2], so that it is still there while block b + 1 is stepped.
    Stepped stepped[2];
    for (size_t block = 0; block < range.blocks; ++block) {
      Stepped& now = stepped[block % 2];
      const Stepped& before = stepped[1 - block % 2];
      if (block > 0 && IsPlain(range, before)) {
        StepBlock<true>(rule, scale, range, block, &now, before);
      } else {
        if (block > 0) EncodeAny(range, block - 1, before);
        StepBlock<false>(rule, scale, range, block, &now, before);
      }
    }
    if (range.blocks > 0) EncodeAny(range, range.blocks - 1, stepped[1 - range.blocks % 2]);
  }

 private:
  using Rule = typename O::template Rule<VectorArithmetic>;
  static constexpr size_t kStates = std::size(O::kStates);
  // Length of the arrays with one element per state. An optimizer may have no state, but an array
  // has at least one element.
  static constexpr size_t kRooms = std::max<size_t>(kStates, 1);
  // Distance of the prefetch in blocks. A prefetch beyond the end of an array is harmless.
  static constexpr size_t kBlocksAhead = 4;
  static constexpr bool IsSigned(size_t s) { return O::kStates[s].code_book == CodeBook::kSigned; }

  // The new states of one block. `values` has the elements of every two vectors as a Pair
  // (simd-inl.h): one vector of the even elements, then one of the odd elements.
  struct Stepped {
    HWY_ALIGN_MAX float values[kRooms][kQuantBlock];
    // The fp32 bits of each state's largest magnitude (Map::Larger).
    uint32_t largest_bits[kRooms];
  };

  // Returns whether StepBlock can encode these states: they are rounded by kNoZero, every value can
  // be coded as it is, and absmax needs no power-of-two factor (quantize.h).
  static HWY_INLINE bool IsPlain(const FusedRange& range, const Stepped& stepped) {
    bool is_plain = true;
    for (size_t s = 0; s < kStates; ++s) {
      const BlockScale scale(stepped.largest_bits[s]);
      is_plain &= range.rounding[s] == Rounding::kNoZero && scale.is_number && scale.before == 1;
    }
    return is_plain;
  }

  // Returns the codes and the absmax of a block of state `s`.
  static StateSpan StateAt(const FusedRange& range, size_t s, size_t block) {
    return {static_cast<uint8_t*>(range.states[s].values) + block * kQuantBlock,
            range.states[s].absmax + block};
  }

  // Encodes the states of a block, with any rounding and any values.
  static HWY_INLINE void EncodeAny(const FusedRange& range, size_t block, const Stepped& stepped) {
    for (size_t s = 0; s < kStates; ++s) {
      HWY_ALIGN_MAX float values[kQuantBlock];
      for (size_t i = 0; i < kQuantBlock; i += PairLanes()) {
        const float* const pair = stepped.values[s] + i;
        StorePair({hn::Load(DF(), pair), hn::Load(DF(), pair + FloatLanes())}, values + i);
      }
      range.encode(O::kStates[s].code_book, range.rounding[s], values, stepped.largest_bits[s],
                   BlockRandomOf(range.random, range.first_block + block, static_cast<uint32_t>(s)),
                   StateAt(range, s, block));
    }
  }

  // Applies the rule to one vector of elements, whose states are decoded[s][j]. Returns the new
  // masters. Stores each new state at now->values[s] + at, and updates largest[s], the bits of the
  // largest magnitude per lane.
  static HWY_INLINE VF Step(const Rule& rule, VF gradient, VF master, const VF (*decoded)[4],
                            size_t j, size_t at, Stepped* now, hn::Vec<DU>* largest) {
    VF state[kRooms];
    ORLOP_UNROLL
    for (size_t s = 0; s < kStates; ++s) state[s] = decoded[s][j];
    master = rule(gradient, master, state);
    ORLOP_UNROLL
    for (size_t s = 0; s < kStates; ++s) {
      hn::Store(state[s], DF(), now->values[s] + at);
      largest[s] = IsSigned(s) ? Map<CodeBook::kSigned>::Larger(largest[s], state[s])
                               : Map<CodeBook::kUnsigned>::Larger(largest[s], state[s]);
    }
    return master;
  }

  // Returns the numbers k (code_books.h) of one vector of values of state `s`, by kNoZero.
  static HWY_INLINE VI Number(size_t s, const Positions& positions, const float* value) {
    const VF x = hn::Load(DF(), value);
    return IsSigned(s) ? NoZeroNumber<CodeBook::kSigned>(positions, x)
                       : NoZeroNumber<CodeBook::kUnsigned>(positions, x);
  }

  // Steps block `block` into *now. If kEncodes, also encodes the block before it, for which IsPlain
  // must be true.
  template <bool kEncodes>
  static HWY_INLINE void StepBlock(const Rule& rule, VF scale, const FusedRange& range,
                                   size_t block, Stepped* now, const Stepped& before) {
    const size_t begin = block * kQuantBlock, lanes = FloatLanes();
    const auto* const gradient = static_cast<const uint8_t*>(range.gradient);
    StateSpan states[kRooms], states_before[kRooms];
    VF absmax[kRooms];
    hn::Vec<DU> largest[kRooms];
    Positions positions[kRooms];
    ORLOP_UNROLL
    for (size_t s = 0; s < kStates; ++s) {
      states[s] = StateAt(range, s, block);
      absmax[s] = hn::Set(DF(), *states[s].absmax);
      largest[s] = hn::Zero(DU());
      if (!kEncodes) continue;
      states_before[s] = StateAt(range, s, block - 1);
      *states_before[s].absmax = std::bit_cast<float>(before.largest_bits[s]);
      positions[s] =
          Positions(O::kStates[s].code_book, Rounding::kNoZero, 1 / *states_before[s].absmax);
    }
    for (size_t i = 0; i < kQuantBlock; i += FourLanes()) {
      const size_t ahead = begin + i + kBlocksAhead * kQuantBlock;
      Prefetch(gradient + ahead * SizeOf(kType), FourLanes() * SizeOf(kType));
      Prefetch(range.weight + ahead, FourLanes() * sizeof(*range.weight));
      Prefetch(range.remainder + ahead, FourLanes() * sizeof(*range.remainder));
      for (size_t s = 0; s < kStates; ++s)
        Prefetch(static_cast<const uint8_t*>(range.states[s].values) + ahead, FourLanes());
      VF decoded[kRooms][4];
      VI numbers[kRooms][4];
      ORLOP_UNROLL
      for (size_t s = 0; s < kStates; ++s) {
        const auto* const codes = static_cast<const uint8_t*>(states[s].values) + i;
        if (IsSigned(s)) {
          DecodeFour<CodeBook::kSigned>(codes, absmax[s], decoded[s]);
        } else {
          DecodeFour<CodeBook::kUnsigned>(codes, absmax[s], decoded[s]);
        }
      }
      ORLOP_UNROLL
      for (size_t j = 0; j < 4; j += 2) {
        const size_t in_block = i + j * lanes, at = begin + in_block;
        const Pair g = LoadTypedPair<kType>(gradient + at * SizeOf(kType));
        Pair master = JoinPair(range.weight + at, range.remainder + at);
        master.even =
            Step(rule, hn::Mul(g.even, scale), master.even, decoded, j, in_block, now, largest);
        master.odd = Step(rule, hn::Mul(g.odd, scale), master.odd, decoded, j + 1, in_block + lanes,
                          now, largest);
        ORLOP_UNROLL
        for (size_t s = 0; s < kStates; ++s) {
          if (!kEncodes) continue;
          numbers[s][j] = Number(s, positions[s], before.values[s] + in_block);
          numbers[s][j + 1] = Number(s, positions[s], before.values[s] + in_block + lanes);
        }
        SplitPair(master, range.new_weight + at, range.remainder + at);
      }
      ORLOP_UNROLL
      for (size_t s = 0; s < kStates; ++s) {
        if (!kEncodes) continue;
        auto* const codes = static_cast<uint8_t*>(states_before[s].values) + i;
        if (IsSigned(s)) {
          StoreNumbers<CodeBook::kSigned>(numbers[s], codes);
        } else {
          StoreNumbers<CodeBook::kUnsigned>(numbers[s], codes);
        }
      }
    }
    ORLOP_UNROLL
    for (size_t s = 0; s < kStates; ++s) {
      now->largest_bits[s] = hn::GetLane(hn::MaxOfLanes(DU(), largest[s]));
    }
  }
};

#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
