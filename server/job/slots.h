// What a job's shards are made of: tensors, ranges of their elements, and the slots that hold each
// kind of state, with the stored format of each (ARCHITECTURE.md, "Arithmetic").
//   Threads  The functions are pure and safe from any thread.
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

// The kinds of state of a shard. If memory is short, the last slot is spilled first. Every state of
// an optimizer (kernels/optimizers.cmake) has two slots: its values, and the absmax (the scale) of
// each block of quantised values. The enumerators are the common slots; StateSlot returns others.
enum class Slot : uint8_t {
  kWeight,
  kRemainder,
  kExpAvg,
  kExpAvgAbsmax,
  kExpAvgSq,
  kExpAvgSqAbsmax,
  kMomentumBuffer,
  kMomentumBufferAbsmax,
  kMaster = 255,  // weight and remainder joined to fp32 when it is read; not stored
};
inline constexpr Slot kFirstState = Slot::kExpAvg;
// Weight, remainder, and two slots for each of at most twelve names of states. A flush has an entry
// for each of them.
inline constexpr size_t kStoredSlotCount = 26;
// Returns "weight", "exp_avg_absmax", ...; "unused" if no state has the slot.
const char* SlotName(Slot slot);
// Returns the slot of that name; kWeight if the name is empty.
//   Status  InvalidArgument, naming an unknown slot.
absl::StatusOr<Slot> ParseSlot(absl::string_view name);
// The place of a stored slot in arrays of kStoredSlotCount. Not for kMaster.
constexpr size_t SlotIndex(Slot stored) { return static_cast<size_t>(stored); }
// Returns the slot of the values of the optimizer state that has this name
// (kernels::StateSpec::name); kMaster if none has.
Slot StateSlot(absl::string_view name);
// Returns the slot of the absmax that belongs to the slot of a state's values.
constexpr Slot AbsmaxSlot(Slot values) { return static_cast<Slot>(SlotIndex(values) + 1); }
// Return the slots of Adafactor's averages over rows ("row_var") and columns ("col_var").
Slot RowSlot();
Slot ColumnSlot();
// Returns the code book of a state, given either of its slots.
kernels::CodeBook CodeBookOf(Slot state);

// The optimizer and the formats of one tensor. Buffers, and parameters in no group, are frozen:
// they have no optimizer.
struct TensorOptimizer {
  const kernels::Optimizer* optimizer = nullptr;  // of the process's registry; null: frozen
  kernels::StateFormat state = kernels::StateFormat::kFp32;
  kernels::MasterFormat master = kernels::MasterFormat::kExact;
  kernels::Rounding rounding = kernels::Rounding::kNoZero;
  bool frozen() const { return optimizer == nullptr; }
  friend bool operator==(const TensorOptimizer&, const TensorOptimizer&) = default;
};

// A tensor of the manifest.
struct Tensor {
  std::string name;
  bool is_parameter = true;
  std::vector<uint64_t> shape;  // of the whole tensor; empty: a scalar
  v1::DType dtype = v1::DTYPE_F32;
  uint64_t element_count = 0;
  bool may_be_unset = false;  // TensorSpec.may_be_unset
};

// Returns the state format of a tensor whose group asks for `wanted`. It is fp32 if the tensor has
// fewer than 4,096 elements, has fewer than two dimensions, or is listed as fp32 in its group. Only
// the whole tensor counts, so that sharding does not change any number.
kernels::StateFormat StateFormatOf(const Tensor& tensor, kernels::StateFormat wanted,
                                   bool listed_as_fp32);

// A shard that this server owns.
struct OwnedShard {
  int32_t id = 0;       // index in manifest order among all shards of the job
  uint32_t tensor = 0;  // index in the manifest
  uint64_t index = 0;   // among the tensor's shards
  Range range;          // elements of the flattened tensor
};

// The shards of a job that this server owns.
struct OwnedShards {
  std::string job;
  std::vector<Tensor> tensors;     // of the whole job
  std::vector<OwnedShard> shards;  // ascending id
};

// How one slot of one shard is stored.
struct SlotFormat {
  // Of a stored element. UNSPECIFIED: the shard has no such slot.
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  // How many elements of the tensor a stored element covers: 1; 2 if it is a byte of 4-bit codes;
  // the elements of a block if it is an absmax.
  uint32_t elements_per = 1;
  // The value of every byte of a new slot. It makes each element zero; 127 is the signed 8-bit code
  // of zero.
  uint8_t initial_byte = 0;

  // What a stored element belongs to: elements of the tensor, or a row or column of a matrix. Only
  // Adafactor's averages have rows and columns. They have one fp32 for each row of the tensor that
  // the shard touches, or for each column of each matrix that it touches. Clients read and set them
  // by boxes of the first column or the first row (CheckBox). If several shards touch a row or
  // column, each stores its average; a read takes it from the shard with its first element.
  enum class Axis : uint8_t { kElements, kRows, kColumns };
  Axis axis = Axis::kElements;
  // kRows and kColumns: the shape of a matrix (kernels::MatrixShape).
  uint64_t rows = 1, columns = 1;
  // kRows and kColumns: the shard's rows or columns, as a range of all those of the tensor.
  uint64_t axis_begin = 0, axis_count = 0;

  bool exists() const { return dtype != v1::DTYPE_UNSPECIFIED; }
  // Returns whether a stored byte has two 4-bit codes.
  bool is_four_bit() const { return elements_per == 2; }
  // Returns the row or column of an element of the flattened tensor, as an index among all those of
  // the tensor. Only for kRows and kColumns.
  uint64_t AxisIndex(uint64_t element) const;
  // Checks that a box addresses this slot of a tensor of `shape`: for kRows it must be inside the
  // first column, for kColumns inside the first row. `slot` is for the message.
  //   Status  InvalidArgument.
  absl::Status CheckBox(const std::vector<uint64_t>& shape, const Box& box, Slot slot) const;
  // Return the stored elements, and the bytes, of a shard of `shard_elements` elements. The bytes
  // are 0 if there is no such slot.
  uint64_t ElementCount(uint64_t shard_elements) const;
  uint64_t Bytes(uint64_t shard_elements) const;
  friend bool operator==(const SlotFormat&, const SlotFormat&) = default;
};
// Returns the format of a slot of the shard that has the elements `range` of the tensor. A trained
// parameter has the remainder of its master format. A frozen one has an int16 remainder, unless its
// dtype is bf16, which the weight holds exactly.
SlotFormat FormatOf(const Tensor& tensor, const TensorOptimizer& optimizer, Slot slot, Range range);
// The formats of all slots of one shard, by SlotIndex.
using SlotFormats = std::array<SlotFormat, kStoredSlotCount>;

}  // namespace orlop::server
