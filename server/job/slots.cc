#include "server/job/slots.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "base/box.h"
#include "kernels/blocks.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "kernels/tensor_pass.h"
#include "kernels/types.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"

namespace orlop::server {
namespace {

constexpr uint64_t kLeastQuantisedElements = 4096;
constexpr char kAbsmaxSuffix[] = "_absmax";
constexpr char kRows[] = "row_var", kColumns[] = "col_var";

struct State {
  std::string name, absmax_name;
  kernels::CodeBook code_book;
};

// Returns the states of all optimizers by name, each name once. The common ones are first, in the
// order of the enumerators of Slot.
const std::vector<State>& States() {
  static const auto* const states = [] {
    auto* list = new std::vector<State>;
    const auto add = [&](const char* name, kernels::CodeBook code_book) {
      for (const State& state : *list)
        if (state.name == name) return;
      list->push_back({name, absl::StrCat(name, kAbsmaxSuffix), code_book});
    };
    add("exp_avg", kernels::CodeBook::kSigned);
    add("exp_avg_sq", kernels::CodeBook::kUnsigned);
    add("momentum_buffer", kernels::CodeBook::kSigned);
    for (const kernels::OptimizerUnit& unit : kernels::OptimizerUnits())
      for (const kernels::StateSpec& state : unit.optimizer.states)
        add(state.name, state.code_book);
    for (const char* average : {kRows, kColumns}) add(average, kernels::CodeBook::kUnsigned);
    return list;
  }();
  return *states;
}

size_t StateIndex(Slot slot) { return (SlotIndex(slot) - SlotIndex(kFirstState)) / 2; }
bool IsAbsmax(Slot slot) { return SlotIndex(slot) % 2 == 1; }
static_assert(SlotIndex(kFirstState) % 2 == 0);

// Returns the optimizer's state whose values or absmax are in `slot`; null if it has no such state.
const kernels::StateSpec* StateOf(const TensorOptimizer& optimizer, Slot slot) {
  if (optimizer.frozen() || StateIndex(slot) >= States().size()) return nullptr;
  for (const kernels::StateSpec& state : optimizer.optimizer->states)
    if (States()[StateIndex(slot)].name == state.name) return &state;
  return nullptr;
}

SlotFormat ValuesOf(kernels::StateFormat state, kernels::CodeBook code_book) {
  const bool is_signed = code_book == kernels::CodeBook::kSigned;
  switch (state) {
    case kernels::StateFormat::kFp32:
      return {v1::DTYPE_F32};
    case kernels::StateFormat::k8Bit:
      return {v1::DTYPE_U8, 1, is_signed ? kernels::kSignedZeroCode : kernels::kUnsignedZeroCode};
    case kernels::StateFormat::k4Bit:
      return {v1::DTYPE_U8, 2,
              static_cast<uint8_t>(is_signed ? kernels::kSigned4ZeroCode * 0x11 : 0)};
  }
  return {};
}
SlotFormat AbsmaxOf(kernels::StateFormat state) {
  switch (state) {
    case kernels::StateFormat::kFp32:
      return {};
    case kernels::StateFormat::k8Bit:
      return {v1::DTYPE_F32, kernels::kQuantBlock};
    case kernels::StateFormat::k4Bit:
      return {v1::DTYPE_F32, kernels::kFourBitBlock};
  }
  return {};
}

SlotFormat RemainderOf(const Tensor& tensor, const TensorOptimizer& optimizer) {
  if (optimizer.frozen())
    return tensor.dtype == v1::DTYPE_BF16 ? SlotFormat{} : SlotFormat{v1::DTYPE_I16};
  switch (optimizer.master) {
    case kernels::MasterFormat::kExact:
      return {v1::DTYPE_I16};
    case kernels::MasterFormat::k24Bit:
      return {v1::DTYPE_I8};
    case kernels::MasterFormat::kBF16Only:
      return {};
  }
  return {};
}

// Returns the format of the averages over the rows (or columns) that `range` touches. A range
// within one row touches some columns; any other is taken to touch all columns of its matrices.
SlotFormat AveragesOf(const kernels::MatrixShape& shape, bool rows, Range range) {
  SlotFormat format{v1::DTYPE_F32};
  format.axis = rows ? SlotFormat::Axis::kRows : SlotFormat::Axis::kColumns;
  format.rows = shape.rows;
  format.columns = shape.columns;
  if (rows) {
    format.axis_begin = range.begin / shape.columns;
    format.axis_count = (range.end - 1) / shape.columns + 1 - format.axis_begin;
  } else {
    const uint64_t matrix = shape.rows * shape.columns;
    if (range.begin / shape.columns == (range.end - 1) / shape.columns) {
      format.axis_begin = range.begin / matrix * shape.columns + range.begin % shape.columns;
      format.axis_count = range.count();
      return format;
    }
    format.axis_begin = range.begin / matrix * shape.columns;
    format.axis_count = ((range.end - 1) / matrix + 1) * shape.columns - format.axis_begin;
  }
  return format;
}

}  // namespace

const char* SlotName(Slot slot) {
  if (slot == Slot::kWeight) return "weight";
  if (slot == Slot::kRemainder) return "remainder";
  if (slot == Slot::kMaster) return "master";
  if (StateIndex(slot) >= States().size()) return "unused";
  const State& state = States()[StateIndex(slot)];
  return IsAbsmax(slot) ? state.absmax_name.c_str() : state.name.c_str();
}

Slot StateSlot(absl::string_view name) {
  for (size_t i = 0; i < States().size(); ++i)
    if (States()[i].name == name) return static_cast<Slot>(SlotIndex(kFirstState) + 2 * i);
  return Slot::kMaster;
}

absl::StatusOr<Slot> ParseSlot(absl::string_view name) {
  if (name.empty()) return Slot::kWeight;
  for (const Slot slot : {Slot::kWeight, Slot::kRemainder, Slot::kMaster})
    if (name == SlotName(slot)) return slot;
  absl::string_view state = name;
  const bool absmax = absl::ConsumeSuffix(&state, kAbsmaxSuffix);
  const Slot slot = StateSlot(state);
  if (slot == Slot::kMaster)
    return absl::InvalidArgumentError(absl::StrCat("unknown slot '", name, "'"));
  return absmax ? AbsmaxSlot(slot) : slot;
}

Slot RowSlot() { return StateSlot(kRows); }
Slot ColumnSlot() { return StateSlot(kColumns); }

kernels::CodeBook CodeBookOf(Slot state) { return States()[StateIndex(state)].code_book; }

kernels::StateFormat StateFormatOf(const Tensor& tensor, kernels::StateFormat wanted,
                                   bool listed_as_fp32) {
  const bool quantised =
      !listed_as_fp32 && tensor.element_count >= kLeastQuantisedElements && tensor.shape.size() > 1;
  return quantised ? wanted : kernels::StateFormat::kFp32;
}

uint64_t SlotFormat::AxisIndex(uint64_t element) const {
  const uint64_t row = element / columns;
  return axis == Axis::kRows ? row : row / rows * columns + element % columns;
}

absl::Status SlotFormat::CheckBox(const std::vector<uint64_t>& shape, const Box& box,
                                  Slot slot) const {
  if (axis == Axis::kElements) return absl::OkStatus();
  const size_t dimension = shape.size() - (axis == Axis::kRows ? 1 : 2);
  const uint64_t first = box.offset[0], count = box.extent[0];
  bool inside;
  if (!box.flat) {
    inside = box.offset[dimension] == 0 && box.extent[dimension] == 1;
  } else if (axis == Axis::kRows) {
    inside = columns == 1 || (first % columns == 0 && count == 1);
  } else {
    inside = rows == 1 || first % (rows * columns) + count <= columns;
  }
  if (inside) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(SlotName(slot), " has offset 0 and extent 1 in dimension ", dimension,
                   ", one number for each ", axis == Axis::kRows ? "row" : "column", "; box ",
                   ToString(box), " has not"));
}

uint64_t SlotFormat::ElementCount(uint64_t shard_elements) const {
  if (axis != Axis::kElements) return axis_count;
  return (shard_elements + elements_per - 1) / elements_per;
}
uint64_t SlotFormat::Bytes(uint64_t shard_elements) const {
  return exists() ? ElementCount(shard_elements) * ElementBytes(dtype) : 0;
}

SlotFormat FormatOf(const Tensor& tensor, const TensorOptimizer& optimizer, Slot slot,
                    Range range) {
  if (!tensor.is_parameter) return slot == Slot::kWeight ? SlotFormat{tensor.dtype} : SlotFormat{};
  if (slot == Slot::kWeight) return {v1::DTYPE_BF16};
  if (slot == Slot::kRemainder) return RemainderOf(tensor, optimizer);
  if (slot == Slot::kMaster) return {};
  const auto shape = kernels::MatrixShape::Of(tensor.shape);
  if (!optimizer.frozen() && kernels::TensorPass::IsFactored(*optimizer.optimizer, shape))
    return slot == RowSlot() || slot == ColumnSlot() ? AveragesOf(shape, slot == RowSlot(), range)
                                                     : SlotFormat{};
  const kernels::StateSpec* state = StateOf(optimizer, slot);
  if (state == nullptr) return {};
  return IsAbsmax(slot) ? AbsmaxOf(optimizer.state) : ValuesOf(optimizer.state, state->code_book);
}

}  // namespace orlop::server
