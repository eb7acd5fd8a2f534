#include "proto/dtype.h"

#include <string_view>

#include "orlop/v1/types.pb.h"

namespace orlop {

std::string_view DTypeName(v1::DType dtype) {
  switch (dtype) {
    case v1::DTYPE_F32:
      return "float32";
    case v1::DTYPE_BF16:
      return "bfloat16";
    case v1::DTYPE_F16:
      return "float16";
    case v1::DTYPE_U8:
      return "uint8";
    case v1::DTYPE_I16:
      return "int16";
    case v1::DTYPE_F64:
      return "float64";
    case v1::DTYPE_I8:
      return "int8";
    case v1::DTYPE_I32:
      return "int32";
    case v1::DTYPE_I64:
      return "int64";
    case v1::DTYPE_BOOL:
      return "bool";
    case v1::DTYPE_I8_BLOCK:
      return "int8 with block scales";  // torch has no such dtype
    default:
      return "unspecified";
  }
}

}  // namespace orlop
