// The operations with which an optimizer's rule is written, for one fp32 element: the scalar
// reference and each CUDA thread use these. simd-inl.h has the same operations for vectors, so that
// a rule is written once and instantiated for all three.
//
//   F           a number, or a vector of numbers
//   Set(x)      the number, in every lane
//   MulAdd      a * b + c with one rounding;  NegMulAdd: c - a * b with one rounding
//   Max         a > b ? a : b;  Sign: 1, -1 or 0 (for zeros and NaN)
//
// A rule never writes a * b + c itself: compilers may not contract it (types.h), and the two forms
// round differently.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define ORLOP_DEVICE __host__ __device__
#else
#define ORLOP_DEVICE
#endif

namespace orlop::kernels {

struct ScalarArithmetic {
  using F = float;
  ORLOP_DEVICE static F Set(float x) { return x; }
  ORLOP_DEVICE static F Add(F a, F b) { return a + b; }
  ORLOP_DEVICE static F Sub(F a, F b) { return a - b; }
  ORLOP_DEVICE static F Mul(F a, F b) { return a * b; }
  ORLOP_DEVICE static F Div(F a, F b) { return a / b; }
  ORLOP_DEVICE static F Sqrt(F a) { return sqrtf(a); }
  ORLOP_DEVICE static F MulAdd(F a, F b, F c) { return fmaf(a, b, c); }
  ORLOP_DEVICE static F NegMulAdd(F a, F b, F c) { return fmaf(-a, b, c); }
  ORLOP_DEVICE static F Max(F a, F b) { return a > b ? a : b; }
  ORLOP_DEVICE static F Sign(F a) { return a > 0 ? 1.0f : a < 0 ? -1.0f : 0.0f; }
};

// The one NaN that kernels write.
ORLOP_DEVICE inline float CanonicalNaN() { return __builtin_nanf(""); }
ORLOP_DEVICE inline float Canonical(float value) { return value == value ? value : CanonicalNaN(); }

}  // namespace orlop::kernels
