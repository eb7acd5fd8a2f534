// Which instruction sets Highway compiles the kernels for. Included before any Highway header.
//
// Every product-and-sum of the arithmetic is one fused multiply-add, so x86 before AVX2 has no
// vector version: it runs the scalar reference. SVE machines run the NEON version, since kernels
// keep vectors in arrays (reduce.cc, DecodeFour) and structs (every Rule), whose size the compiler
// must know.
#pragma once
#define HWY_WANT_AVX3_DL  // byte permutes of whole vectors: Ice Lake, Zen 4 and later
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
