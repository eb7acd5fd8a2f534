#include "client/lanes/pieces.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "client/link/manifest.h"
#include "orlop/v1/types.pb.h"
#include "proto/convert.h"
#include "proto/dtype.h"
#include "proto/status.h"

namespace orlop::client {
namespace {

constexpr uint64_t kBlock = 256, kFourBitBlock = 128;  // elements that share an absmax

absl::Status PartError(const std::string& tensor, std::string_view field, std::string actual,
                       std::string limit) {
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::BAD_REQUEST);
  detail.set_tensor(tensor);
  detail.set_field(std::string(field));
  detail.set_actual(actual);
  detail.set_limit(limit);
  return MakeError(absl::StatusCode::kInvalidArgument,
                   absl::StrCat("tensor ", tensor, ": ", std::string(field), " is ", actual,
                                "; expected ", limit),
                   detail);
}

// Returns how many elements of the tensor one stored element of a quantised slot covers
// (types.proto, Region): 2 for two 4-bit codes in a byte, the block size for an absmax, else 1. The
// client does not know the slot's format, so the size of the data decides.
uint64_t ElementsPer(const PartView& part, const Box& box, v1::DType dtype) {
  constexpr std::string_view kAbsmax = "_absmax";
  if (!box.flat || box.offset[0] % kBlock != 0) return 1;
  std::array<uint64_t, 2> sizes = {kFourBitBlock, kBlock};
  if (dtype == v1::DTYPE_U8 && !part.slot.empty() && part.slot != "weight")
    sizes = {1, 2};
  else if (dtype != v1::DTYPE_F32 || !part.slot.ends_with(kAbsmax))
    return 1;
  for (const uint64_t per : sizes)
    if (part.bytes == (box.extent[0] + per - 1) / per * ElementBytes(dtype)) return per;
  return sizes[1];
}

// Returns the first and the last shard that a valid box can meet.
std::pair<uint64_t, uint64_t> ShardsOf(const Box& box, const std::vector<uint64_t>& shape,
                                       uint64_t shard_elements) {
  const std::vector<uint64_t>& bounds = box.flat ? box.extent : shape;
  uint64_t first = 0, last = 0;
  for (size_t i = 0; i < box.offset.size(); ++i) {
    const uint64_t stride = box.flat ? 1 : bounds[i];
    first = first * stride + box.offset[i];
    last = last * stride + box.offset[i] + box.extent[i] - 1;
  }
  return {first / shard_elements, last / shard_elements};
}

}  // namespace

std::optional<Box> FlatSlice(uint64_t element_count, uint32_t rank, uint32_t world_size) {
  const uint64_t each = (element_count + world_size - 1) / world_size;
  const uint64_t slice = (each + kBlock - 1) / kBlock * kBlock;
  const uint64_t begin = std::min(rank * slice, element_count),
                 end = std::min(begin + slice, element_count);
  if (begin == end) return std::nullopt;
  return Box{{begin}, {end - begin}, true};
}

absl::Status SplitPart(const PartView& part, const Manifest& manifest, std::vector<Piece>* pieces) {
  if (part.tensor >= manifest.size())
    return PartError(absl::StrCat("#", part.tensor), "index", absl::StrCat(part.tensor),
                     absl::StrCat("below ", manifest.size()));
  const v1::TensorSpec& tensor = manifest.tensor(part.tensor);
  const std::vector<uint64_t> shape(tensor.shape().begin(), tensor.shape().end());
  const uint64_t count = manifest.element_count(part.tensor);
  const Box box = part.box->value_or(WholeTensor(count));
  if (absl::Status status = ValidateBox(box, shape, count); !status.ok())
    return PartError(tensor.name(), "box", ToString(box), std::string(status.message()));
  const v1::DType dtype = part.dtype == v1::DTYPE_UNSPECIFIED ? tensor.dtype() : part.dtype;
  if (PieceBytes(dtype, 1) == 0)
    return PartError(tensor.name(), "dtype", absl::StrCat(dtype), "a known type");
  const uint64_t per = ElementsPer(part, box, dtype);
  const auto [first, last] = ShardsOf(box, shape, manifest.shard_elements());
  std::vector<Piece> cut;
  uint64_t bytes = 0;
  for (uint64_t shard = first; shard <= last; ++shard) {
    const Range range = BoxPart(box, shape, ShardRange(shard, count, manifest.shard_elements()));
    if (range.empty()) continue;
    Piece piece;
    piece.tensor = part.tensor;
    piece.region.set_tensor(tensor.name());
    piece.region.set_slot(std::string(part.slot));
    piece.region.set_dtype(dtype);
    piece.region.set_shard(shard);
    if (part.box->has_value()) ToWire(box, piece.region.mutable_box());
    piece.data = part.data + bytes;
    piece.bytes = PieceBytes(dtype, (range.count() + per - 1) / per);
    piece.applied_count = part.applied_count;
    bytes += piece.bytes;
    cut.push_back(std::move(piece));
  }
  if (part.bytes != bytes)
    return PartError(tensor.name(), "size of data", absl::StrCat(part.bytes, " bytes"),
                     absl::StrCat((BoxElementCount(box) + per - 1) / per, " elements of ",
                                  std::string(DTypeName(dtype)), ", ", bytes, " bytes"));
  std::move(cut.begin(), cut.end(), std::back_inserter(*pieces));
  return absl::OkStatus();
}

}  // namespace orlop::client
