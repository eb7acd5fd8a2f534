// Sizes and names of the wire's element types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/status/statusor.h"
#include "orlop/v1/types.pb.h"

namespace orlop {

// Returns the bytes of one element. 0 for UNSPECIFIED, for unknown values, and for I8_BLOCK, whose
// elements have no size of their own.
constexpr size_t ElementBytes(v1::DType dtype) {
  switch (dtype) {
    case v1::DTYPE_F64:
    case v1::DTYPE_I64:
      return 8;
    case v1::DTYPE_F32:
    case v1::DTYPE_I32:
      return 4;
    case v1::DTYPE_BF16:
    case v1::DTYPE_F16:
    case v1::DTYPE_I16:
      return 2;
    case v1::DTYPE_U8:
    case v1::DTYPE_I8:
    case v1::DTYPE_BOOL:
      return 1;
    default:
      return 0;
  }
}

// Returns whether a parameter, its gradient or its exported state may have this type on the wire.
constexpr bool IsFloat(v1::DType dtype) {
  return dtype == v1::DTYPE_F32 || dtype == v1::DTYPE_BF16 || dtype == v1::DTYPE_F16;
}

// Returns whether a gradient may have this type on the wire.
constexpr bool IsGradient(v1::DType dtype) { return IsFloat(dtype) || dtype == v1::DTYPE_I8_BLOCK; }

// Returns the bytes of a piece of `count` elements.
constexpr uint64_t PieceBytes(v1::DType dtype, uint64_t count) {
  return dtype == v1::DTYPE_I8_BLOCK ? count + (count + 255) / 256 * sizeof(float)
                                     : count * ElementBytes(dtype);
}

// Returns torch's name: "float32", "bfloat16", ...; "unspecified" for other values.
std::string_view DTypeName(v1::DType dtype);

}  // namespace orlop
