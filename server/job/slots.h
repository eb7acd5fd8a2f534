// What a job's shards are made of: plain structs, slots and their stored formats (ARCHITECTURE.md,
// arithmetic). Pure; any thread.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/box.h"
#include "kernels/optimizer.h"
#include "orlop/v1/types.pb.h"

namespace orlop::server {

// Kinds of state of a shard that are stored, in the order in which they stay in memory: the last is
// spilled first. Every state of every optimizer (kernels/optimizers.cmake) has two: its values, and
// the absmax of its blocks. These are the common ones; StateSlot names the others.
enum class Slot : uint8_t {
  kWeight,
  kRemainder,
  kExpAvg,
  kExpAvgAbsmax,
  kExpAvgSq,
  kExpAvgSqAbsmax,
  kMomentumBuffer,
  kMomentumBufferAbsmax,
  kMaster = 255,  // a view: weight and remainder joined, fp32; never stored
};
inline constexpr Slot kFirstState = Slot::kExpAvg;
inline constexpr size_t kStoredSlotCount = 26;  // room for twelve names of states
const char* SlotName(Slot slot);                // "weight", "exp_avg_absmax", ...
// Empty means "weight". InvalidArgument naming an unknown slot.
absl::StatusOr<Slot> ParseSlot(absl::string_view name);
constexpr size_t SlotIndex(Slot stored) { return static_cast<size_t>(stored); }
// The values of an optimizer's state. `name` is one of kernels::StateSpec.
Slot StateSlot(absl::string_view name);
// The absmax of the blocks of a state's values.
constexpr Slot AbsmaxSlot(Slot values) { return static_cast<Slot>(SlotIndex(values) + 1); }
// Adafactor's averages over rows ("row_var") and columns ("col_var").
Slot RowSlot();
Slot ColumnSlot();
// Of a state's values.
kernels::CodeBook CodeBookOf(Slot state);

// Of one tensor, as configured. Buffers and parameters in no group are frozen: no optimizer.
struct TensorOptimizer {
  const kernels::Optimizer* optimizer = nullptr;
  kernels::StateFormat state = kernels::StateFormat::kFp32;
  kernels::MasterFormat master = kernels::MasterFormat::kExact;
  kernels::Rounding rounding = kernels::Rounding::kNoZero;
  bool frozen() const { return optimizer == nullptr; }
  friend bool operator==(const TensorOptimizer&, const TensorOptimizer&) = default;
};

struct Tensor {
  std::string name;
  bool is_parameter = true;
  std::vector<uint64_t> shape;
  v1::DType dtype = v1::DTYPE_F32;
  uint64_t element_count = 0;
};

// The state format of a tensor that asks for `wanted`: fp32 if it is small, has one dimension, or
// is listed. Decided per global tensor, so that sharding changes no number.
kernels::StateFormat StateFormatOf(const Tensor& tensor, kernels::StateFormat wanted,
                                   bool listed_as_fp32);

// A shard of which this server holds a copy. `id` is its place in manifest order among all shards
// of the job.
struct OwnedShard {
  int32_t id = 0;
  uint32_t tensor = 0;
  uint64_t index = 0;  // in the tensor
  Range range;         // of the flattened tensor
};

// The shards of a job that this server holds.
struct OwnedShards {
  std::string job;
  std::vector<Tensor> tensors;     // of the whole job
  std::vector<OwnedShard> shards;  // ascending id
};

// How one slot of a tensor is stored.
struct SlotFormat {
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;  // UNSPECIFIED: the tensor has no such slot
  // Elements of the tensor to one stored element: 1, 2 (4-bit codes), or a block (absmax).
  uint32_t elements_per = 1;
  uint8_t initial_byte = 0;  // every byte of a fresh slot (127: the signed code of zero)

  // Averages over rows or columns (Adafactor): one stored element for each row of the tensor that
  // the shard touches, or for each column of each matrix. They are read and set by boxes of the
  // first column or row. Shards that share one hold it each; the one that has the first element of
  // the row or column is believed.
  enum class Axis : uint8_t { kElements, kRows, kColumns };
  Axis axis = Axis::kElements;
  uint64_t rows = 1, columns = 1;           // of a matrix
  uint64_t axis_begin = 0, axis_count = 0;  // of those of the tensor, the shard's

  bool exists() const { return dtype != v1::DTYPE_UNSPECIFIED; }
  // A byte holds two 4-bit codes.
  bool is_four_bit() const { return elements_per == 2; }
  // Of an element of the flattened tensor, the place of its row or column among those of the
  // tensor.
  uint64_t AxisIndex(uint64_t element) const;
  // InvalidArgument unless the box lies in the first column or row.
  absl::Status CheckBox(const std::vector<uint64_t>& shape, const Box& box, Slot slot) const;
  uint64_t ElementCount(uint64_t shard_elements) const;
  uint64_t Bytes(uint64_t shard_elements) const;
  friend bool operator==(const SlotFormat&, const SlotFormat&) = default;
};
// A parameter that trains, or whose dtype bf16 cannot hold, keeps a remainder, unless its optimizer
// has another master. `range`: the shard's.
SlotFormat FormatOf(const Tensor& tensor, const TensorOptimizer& optimizer, Slot slot, Range range);
// The formats of all stored slots of one shard, by SlotIndex.
using SlotFormats = std::array<SlotFormat, kStoredSlotCount>;

}  // namespace orlop::server
