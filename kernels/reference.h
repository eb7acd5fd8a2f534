// The specification: every kernel in plain scalar C++, written to be read. Same contracts as the
// public functions of the same name, but inputs are not checked. Tests compare bits against these;
// machines without fused multiply-add run them.
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

// Element i of a typed span, widened.
float Load(TypedSpan span, size_t i);

// The code of x. `unit` (0..1) is what kStochastic rounds by.
uint8_t Encode(CodeBook code_book, Rounding rounding, float x, float absmax, float unit);
float Decode(CodeBook code_book, uint8_t code, float absmax);
// The same of the 4-bit maps.
uint8_t Encode4(CodeBook code_book, Rounding rounding, float x, float absmax, float unit);
float Decode4(CodeBook code_book, uint8_t code, float absmax);
// Largest magnitude of what is coded for these values.
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

// One block of at most 256 elements, by any rounding.
void QuantizeBlock(CodeBook code_book, Rounding rounding, const float* values, size_t count,
                   BlockRandom random, uint8_t* codes, float* absmax);
void QuantizeBlocks(CodeBook code_book, Rounding rounding, absl::Span<const float> values,
                    absl::Span<uint8_t> codes, absl::Span<float> absmax);
void DequantizeBlocks(CodeBook code_book, absl::Span<const uint8_t> codes,
                      absl::Span<const float> absmax, absl::Span<float> values);

void EncodeInt8(TypedSpan source, const ErrorFeedback* feedback, absl::Span<uint8_t> wire);
void DecodeInt8(absl::Span<const uint8_t> wire, absl::Span<uint16_t> values);

// The sums of one block (at most 256 elements) alone.
BlockSums ReduceBlock(TypedSpan block);
void ReduceGradient(TypedSpan gradient, BlockSums* sums);
void CopyAndReduce(void* destination, TypedSpan gradient, BlockSums* sums);
void AccumulateToF32(TypedSpan contribution, absl::Span<float> accumulator);

// As kernels::Step and kernels::Measure.
void Step(const RangeStep& step);
void Measure(const RangeStep& step, Measured* measured, float* first);

}  // namespace orlop::kernels::reference
