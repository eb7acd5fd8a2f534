// The instruction sets for which Highway compiles the kernels. Include this before any Highway
// header.
//
// The arithmetic requires every product-and-sum to be one fused multiply-add. x86 before AVX2 has
// none, so it has no vector version and runs the scalar reference. SVE machines run the NEON
// version, because kernels keep vectors in arrays (reduce.cc, DecodeFour) and structs (every Rule),
// whose size the compiler must know.
#pragma once
// Permutes bytes of whole vectors: Ice Lake, Zen 4 and later.
#define HWY_WANT_AVX3_DL
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
