// Checks the arguments of a step, and computes the sizes of its arrays.
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/blocks.h"
#include "kernels/code_books4.h"
#include "kernels/optimizer.h"
#include "kernels/types.h"

namespace orlop::kernels {

size_t ValueBytes(StateFormat format, size_t count) {
  switch (format) {
    case StateFormat::kFp32:
      return 4 * count;
    case StateFormat::k8Bit:
      return count;
    case StateFormat::k4Bit:
      return (count + 1) / 2;
  }
  return 0;
}
size_t ScaleCount(StateFormat format, size_t count) {
  return format == StateFormat::kFp32   ? 0
         : format == StateFormat::k8Bit ? BlockCount(count)
                                        : FourBitBlockCount(count);
}
size_t RemainderBytes(MasterFormat format, size_t count) {
  return format == MasterFormat::kExact ? 2 * count : format == MasterFormat::k24Bit ? count : 0;
}

namespace {

struct Array {
  const char* name;
  const void* begin;
  size_t bytes;
  size_t alignment;
};

absl::Status Refuse(const Array& array, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(array.name, " ", what));
}

// Checks that every array is present, aligned, and does not overlap another.
absl::Status CheckArrays(const RangeStep& step) {
  const size_t count = step.gradient.count;
  Array arrays[4 + 2 * kMaxStates];
  size_t n = 0;
  arrays[n++] = {"gradient", step.gradient.data, count * SizeOf(step.gradient.dtype), 1};
  arrays[n++] = {"weight", step.weight, 2 * count, 2};
  if (step.new_weight != step.weight) arrays[n++] = {"new_weight", step.new_weight, 2 * count, 2};
  if (const size_t bytes = RemainderBytes(step.master, count); bytes > 0)
    arrays[n++] = {"remainder", step.remainder, bytes, bytes / count};
  if (step.optimizer->KeepsState(step.scalars)) {
    for (size_t i = 0; i < step.optimizer->states.size(); ++i) {
      const bool fp32 = step.format == StateFormat::kFp32;
      arrays[n++] = {step.optimizer->states[i].name, step.states[i].values,
                     ValueBytes(step.format, count), fp32 ? size_t{4} : size_t{1}};
      if (!fp32)
        arrays[n++] = {"absmax", step.states[i].absmax, 4 * ScaleCount(step.format, count), 4};
    }
  }
  for (size_t i = 0; i < n; ++i) {
    const auto begin = reinterpret_cast<uintptr_t>(arrays[i].begin);
    if (begin == 0) return Refuse(arrays[i], "is missing");
    if (begin % arrays[i].alignment != 0)
      return Refuse(arrays[i], absl::StrCat("is not aligned to ", arrays[i].alignment, " bytes"));
    for (size_t j = 0; j < i; ++j) {
      const auto other = reinterpret_cast<uintptr_t>(arrays[j].begin);
      if (begin < other + arrays[j].bytes && other < begin + arrays[i].bytes)
        return Refuse(arrays[i], absl::StrCat("overlaps ", arrays[j].name));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<const OptimizerUnit*> UnitOf(const RangeStep& step) {
  for (const OptimizerUnit& unit : OptimizerUnits()) {
    if (&unit.optimizer != step.optimizer) continue;
    if (step.scalars.size() != unit.optimizer.scalar_count)
      return absl::InvalidArgumentError(absl::StrCat("optimizer ", unit.optimizer.name, " takes ",
                                                     unit.optimizer.scalar_count, " scalars, not ",
                                                     step.scalars.size()));
    for (const float scalar : step.scalars) {
      if (!std::isfinite(scalar))
        return absl::InvalidArgumentError(
            absl::StrCat("a scalar of ", unit.optimizer.name, " is ", scalar));
    }
    return &unit;
  }
  return absl::InvalidArgumentError("an unknown optimizer");
}

absl::Status CheckStep(const RangeStep& step, bool measures) {
  if (absl::Status status = UnitOf(step).status(); !status.ok()) return status;
  const Scope scope = step.optimizer->scope;
  const bool takes_input = (scope == Scope::kMatrix && !measures) ||
                           (scope == Scope::kFactored && !step.optimizer->KeepsState(step.scalars));
  if (takes_input && step.gradient.count > 0 && !step.input.exists())
    return absl::InvalidArgumentError(
        absl::StrCat("input of ", step.optimizer->name, " is missing"));
  return step.gradient.count == 0 ? absl::OkStatus() : CheckArrays(step);
}

}  // namespace orlop::kernels
