// One fused step of one 256-element block by 256 CUDA threads, one element each (kernels::Step
// defines it). It consists of phases with barriers between them. An Execution runs the phases: on
// the device each thread runs its own (device_execution.h); in the tests one host thread runs all
// 256 (host_execution.h).
//
//   Execution  Registers& holds the values that a thread keeps from phase to phase.
//     Each(body)          calls body(thread, registers) for every thread
//     Barrier()
//     Raise(word, value)  *word = max(*word, value), called by all threads of a warp for the same
//                         word
//   Maximum    absmax is the largest bit pattern of a magnitude, so the order does not matter.
#pragma once
#include <iterator>

#include "kernels/cuda/codec.h"
#include "kernels/cuda/geometry.h"
#include "kernels/optimizer_rule.h"

namespace orlop::kernels::cuda {

#ifdef __CUDACC__
#pragma nv_diag_suppress 186  // "pointless comparison" of loops over no states
#define ORLOP_UNROLL_STATES _Pragma("unroll")
#else
#define ORLOP_UNROLL_STATES
#endif

// The values that a thread keeps, and those that all threads share. Device code forbids empty
// arrays.
constexpr size_t AtLeastOne(size_t states) { return states > 0 ? states : 1; }
template <size_t kReads>
struct Registers {
  float state[AtLeastOne(kReads)];  // the states, then the input
};
template <size_t kStates>
struct SharedMemory {
  uint32_t largest[AtLeastOne(kStates)][2];  // of each half, as fp32 bits
  uint8_t codes[AtLeastOne(kStates)][kQuantBlock];
};

// O: an optimizer's struct (kernels/optimizer_rule.h).
template <class O, class Execution>
class BlockStep {
 public:
  static constexpr uint32_t kStates = std::size(O::kStates);
  static_assert(kStates <= kMaxStates);
  using Shared = SharedMemory<kStates>;
  using Kept = Registers<kReads<O>>;

  // `block`: index in the batch.
  ORLOP_BLOCK BlockStep(const Batch& batch, uint64_t block, Shared& shared, Execution& execution)
      : BlockStep(batch, FindRange(batch.first_block, batch.range_count, block), block, shared,
                  execution) {}

  ORLOP_BLOCK void Run() {
    const bool quantised = range_.keeps_state && range_.format != StateFormat::kFp32;
    if (quantised) {
      execution_.Each([&](uint32_t thread, Kept&) {
        if (thread < 2 * kStates) shared_.largest[thread / 2][thread % 2] = 0;
      });
      execution_.Barrier();
    }
    execution_.Each([&](uint32_t thread, Kept& kept) { Update(thread, kept); });
    if (!quantised) return;
    execution_.Barrier();
    execution_.Each([&](uint32_t thread, Kept& kept) { Encode(thread, kept); });
    if (range_.format == StateFormat::k8Bit) return;
    execution_.Barrier();
    execution_.Each([&](uint32_t thread, Kept&) { StorePair(thread); });
  }

 private:
  ORLOP_BLOCK BlockStep(const Batch& batch, uint32_t range, uint64_t block, Shared& shared,
                        Execution& execution)
      : range_(batch.ranges[range]),
        place_(PlaceOf(block - batch.first_block[range], range_.count)),
        shared_(shared),
        execution_(execution) {}

  // The states that use the signed book, as a constant, because device code cannot index
  // O::kStates.
  static constexpr uint32_t SignedStates() {
    uint32_t bits = 0;
    for (uint32_t s = 0; s < kStates; ++s) {
      if (O::kStates[s].code_book == CodeBook::kSigned) bits |= 1u << s;
    }
    return bits;
  }
  static constexpr uint32_t kSignedStates = SignedStates();
  static constexpr CodeBook kSigned = CodeBook::kSigned, kUnsigned = CodeBook::kUnsigned;

  // For 4-bit states the two 128-element halves are blocks.
  ORLOP_BLOCK uint32_t Half(uint32_t thread) const {
    return range_.format == StateFormat::k4Bit ? thread / kFourBitBlock : 0;
  }
  ORLOP_BLOCK float* Absmax(uint32_t s, uint32_t half) const {
    return range_.absmax[s] +
           (range_.format == StateFormat::k4Bit ? 2 * place_.block + half : place_.block);
  }
  ORLOP_BLOCK BlockRandom RandomOf(uint32_t use) const {
    return BlockRandomOf(range_.random, range_.first_block + place_.block, use);
  }

  // Returns the element of a state for `thread`. Beyond the end it is the value of zero's code.
  // step.cc pads a short block likewise: such elements are stepped, and count for absmax.
  ORLOP_BLOCK float LoadState(uint32_t s, uint32_t thread) const {
    const bool is_signed = (kSignedStates >> s & 1) != 0, present = thread < place_.count;
    const uint64_t i = place_.begin + thread;
    if (range_.format == StateFormat::kFp32) {
      return present ? static_cast<const float*>(range_.values[s])[i] : 0;
    }
    const auto* codes = static_cast<const uint8_t*>(range_.values[s]);
    if (range_.format == StateFormat::k8Bit) {
      const uint32_t zero = is_signed ? kSignedZeroCode : kUnsignedZeroCode;
      const uint32_t code = present ? codes[i] : zero;
      const float absmax = *Absmax(s, 0);
      return is_signed ? Decode8<kSigned>(code, absmax) : Decode8<kUnsigned>(code, absmax);
    }
    const uint32_t half = Half(thread);
    const float absmax = half * kFourBitBlock < place_.count ? *Absmax(s, half) : 0;
    const uint32_t zero = is_signed ? kSigned4ZeroCode : kUnsigned4LeastCode;
    const uint32_t code = present ? codes[i / 2] >> (i % 2 * 4) & 15 : zero;
    return is_signed ? Decode4<kSigned>(code, absmax) : Decode4<kUnsigned>(code, absmax);
  }

  ORLOP_BLOCK void Update(uint32_t thread, Kept& kept) {
    const bool present = thread < place_.count;
    const uint64_t i = place_.begin + thread;
    float gradient = 0, master = 0;
    if (present) {
      gradient = LoadGradient(range_.dtype, range_.gradient, i);
      master = LoadMaster(range_.master, range_.weight, range_.remainder, i);
    }
    ORLOP_UNROLL_STATES
    for (uint32_t s = 0; s < kStates; ++s) {
      kept.state[s] = range_.keeps_state ? LoadState(s, thread) : 0;
    }
    if constexpr (kReads < O >> kStates)
      kept.state[kStates] = present ? InputOf(range_.input, i) : 0;
    const typename O::template Rule<ScalarArithmetic> rule(ScalarsOf<O>(range_.scalars));
    master = rule(gradient * range_.scalars[0], master, kept.state);
    if (present) {
      const uint32_t bits =
          range_.master == MasterFormat::kExact ? 0 : RandomBits(RandomOf(kMasterUse), thread);
      StoreMaster(range_.master, master, bits, range_.new_weight, range_.remainder, i);
    }
    if (!range_.keeps_state) return;
    ORLOP_UNROLL_STATES
    for (uint32_t s = 0; s < kStates; ++s) {
      if (range_.format == StateFormat::kFp32) {
        if (present) static_cast<float*>(range_.values[s])[i] = Canonical(kept.state[s]);
        continue;
      }
      const bool is_signed = (kSignedStates >> s & 1) != 0;
      kept.state[s] =
          is_signed ? Codable<kSigned>(kept.state[s]) : Codable<kUnsigned>(kept.state[s]);
      execution_.Raise(&shared_.largest[s][Half(thread)], BitsOf(fabsf(kept.state[s])));
    }
  }

  ORLOP_BLOCK void Encode(uint32_t thread, Kept& kept) {
    const uint32_t half = Half(thread);
    const bool first =
        thread == 0 || (range_.format == StateFormat::k4Bit && thread == kFourBitBlock);
    ORLOP_UNROLL_STATES
    for (uint32_t s = 0; s < kStates; ++s) {
      const float absmax = FloatOf(shared_.largest[s][half]);
      if (first && thread < place_.count) *Absmax(s, half) = absmax;
      const Rounding rounding = range_.rounding[s];
      const float unit = rounding == Rounding::kStochastic ? RandomUnit(RandomOf(s), thread) : 0;
      const float x = kept.state[s];
      const bool is_signed = (kSignedStates >> s & 1) != 0;
      if (range_.format == StateFormat::k8Bit) {
        const uint32_t code = is_signed ? Encode8<kSigned>(rounding, x, absmax, unit)
                                        : Encode8<kUnsigned>(rounding, x, absmax, unit);
        auto* codes = static_cast<uint8_t*>(range_.values[s]);
        if (thread < place_.count) codes[place_.begin + thread] = static_cast<uint8_t>(code);
      } else {
        const uint32_t code = is_signed ? Encode4<kSigned>(rounding, x, absmax, unit)
                                        : Encode4<kUnsigned>(rounding, x, absmax, unit);
        shared_.codes[s][thread] = static_cast<uint8_t>(code);
      }
    }
  }

  // Stores two 4-bit codes in a byte, the even element in the low half.
  ORLOP_BLOCK void StorePair(uint32_t thread) {
    if (2 * thread >= place_.count) return;
    ORLOP_UNROLL_STATES
    for (uint32_t s = 0; s < kStates; ++s) {
      const uint8_t* codes = &shared_.codes[s][2 * thread];
      static_cast<uint8_t*>(range_.values[s])[place_.begin / 2 + thread] =
          static_cast<uint8_t>(codes[0] | codes[1] << 4);
    }
  }

  const RangeDescriptor& range_;
  const BlockPlace place_;
  Shared& shared_;
  Execution& execution_;
};

}  // namespace orlop::kernels::cuda
