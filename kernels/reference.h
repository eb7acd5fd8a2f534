// The specification: every kernel in plain scalar C++, written to be read. Contracts are those of
// the public functions of the same name, but inputs are not checked. Tests compare bits against
// these functions, and machines without fused multiply-add run them.
#pragma once
#include "kernels/blocks.h"
#include "kernels/casts.h"
#include "kernels/int8_blocks.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "kernels/reduce.h"

namespace orlop::kernels::reference {

float BF16ToF32(uint16_t bits);
float F16ToF32(uint16_t bits);
uint16_t F32ToBF16(float value);
uint16_t F32ToF16(float value);

struct SplitValue {
  uint16_t weight;
  int16_t remainder;
};
SplitValue Split(float master);
float Join(uint16_t weight, int16_t remainder);

// Returns element i of a typed span as fp32.
float Load(TypedSpan span, size_t i);

// Returns the code of x. `unit` (0..1) is the random number of kStochastic.
uint8_t Encode(CodeBook code_book, Rounding rounding, float x, float absmax, float unit);
float Decode(CodeBook code_book, uint8_t code, float absmax);
// The same for the 4-bit maps.
uint8_t Encode4(CodeBook code_book, Rounding rounding, float x, float absmax, float unit);
float Decode4(CodeBook code_book, uint8_t code, float absmax);
// Returns the largest magnitude of the values after Special (quantize.h): a block's absmax.
float AbsmaxOf(CodeBook code_book, absl::Span<const float> values);

void WidenToF32(TypedSpan source, absl::Span<float> destination);
void RoundToBF16(absl::Span<const float> source, absl::Span<uint16_t> destination);
void RoundToF16(absl::Span<const float> source, absl::Span<uint16_t> destination);
void SplitMaster(absl::Span<const float> master, absl::Span<uint16_t> weight,
                 absl::Span<int16_t> remainder);
void JoinMaster(absl::Span<const uint16_t> weight, absl::Span<const int16_t> remainder,
                absl::Span<float> master);
void JoinMasterToF16(absl::Span<const uint16_t> weight, absl::Span<const int16_t> remainder,
                     absl::Span<uint16_t> destination, F16Overflow* overflow);

// Encodes one block of at most 256 elements, with any rounding.
void QuantizeBlock(CodeBook code_book, Rounding rounding, const float* values, size_t count,
                   BlockRandom random, uint8_t* codes, float* absmax);
void QuantizeBlocks(CodeBook code_book, Rounding rounding, absl::Span<const float> values,
                    absl::Span<uint8_t> codes, absl::Span<float> absmax);
void DequantizeBlocks(CodeBook code_book, absl::Span<const uint8_t> codes,
                      absl::Span<const float> absmax, absl::Span<float> values);

void EncodeInt8(TypedSpan source, const ErrorFeedback* feedback, absl::Span<uint8_t> wire);
void DecodeInt8(absl::Span<const uint8_t> wire, absl::Span<uint16_t> values);

// Returns the sums of one block (at most 256 elements), from zero.
BlockSums ReduceBlock(TypedSpan block);
void ReduceGradient(TypedSpan gradient, BlockSums* sums);
void CopyAndReduce(void* destination, TypedSpan gradient, BlockSums* sums);
void AccumulateToF32(TypedSpan contribution, absl::Span<float> accumulator);

// Like kernels::Step and kernels::Measure.
void Step(const RangeStep& step);
void Measure(const RangeStep& step, Measured* measured, float* first);

}  // namespace orlop::kernels::reference
