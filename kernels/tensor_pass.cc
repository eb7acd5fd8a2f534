#include "kernels/tensor_pass.h"

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/optimizer.h"
#include "kernels/orthogonalize.h"
#include "kernels/whole_tensor.h"

namespace orlop::kernels {

bool TensorPass::IsFactored(const Optimizer& optimizer, const MatrixShape& shape) {
  return optimizer.scope == Scope::kFactored && shape.is_matrix;
}

uint64_t PassMemory::Bytes(const Optimizer& optimizer, const MatrixShape& shape) {
  const uint64_t rows = shape.matrices * shape.rows, columns = shape.matrices * shape.columns;
  if (TensorPass::IsFactored(optimizer, shape))
    return (rows + columns) * sizeof(double) + (2 * rows + columns) * sizeof(float);
  if (optimizer.scope != Scope::kMatrix) return 0;
  return (shape.count() + OrthogonalizeWorkspace(shape.rows, shape.columns)) * sizeof(float);
}

PassMemory::PassMemory(const Optimizer& optimizer, const MatrixShape& shape, void* memory) {
  if (optimizer.scope == Scope::kMatrix) {
    matrix = static_cast<float*>(memory);
    workspace = matrix + shape.count();
  } else if (TensorPass::IsFactored(optimizer, shape)) {
    const uint64_t row_count = shape.matrices * shape.rows;
    const uint64_t column_count = shape.matrices * shape.columns;
    sums = {static_cast<double*>(memory), row_count + column_count};
    rows = {reinterpret_cast<float*>(sums.data() + sums.size()), row_count};
    columns = {rows.data() + row_count, column_count};
    row_factors = {columns.data() + column_count, row_count};
  }
}

TensorPass::TensorPass(const Optimizer& optimizer, const MatrixShape& shape,
                       const StepScalars& scalars, const PassMemory& memory)
    : optimizer_(optimizer), shape_(shape), memory_(memory), scalars_(scalars) {
  optimizer_.begin(shape_, scalars_.values);
  if (IsFactored(optimizer_, shape_)) factors_.emplace(shape_, memory.sums);
  measures_ = !factors_.has_value();
}

void TensorPass::Finish(uint64_t begin, RangeStep* range) const {
  range->scalars = scalars_.span();
  if (memory_.matrix != nullptr) {
    range->input.values = memory_.matrix + begin;
  } else if (factors_.has_value()) {
    range->input = {nullptr, memory_.row_factors.data(), memory_.columns.data(), shape_, begin};
  }
}

absl::Status TensorPass::Add(RangeStep range, uint64_t begin) {
  if (!measures_) {
    factors_->Add(range.gradient, scalars_.values[0]);
    return absl::OkStatus();
  }
  Finish(begin, &range);
  if (optimizer_.scope != Scope::kMatrix) return Measure(range, &measured_, nullptr);
  range.input = {};
  return Measure(range, &measured_, memory_.matrix + begin);
}

void TensorPass::EndRound() {
  if (!measures_) {
    const FactorAverage average = optimizer_.averaging(scalars_.values);
    factors_->Average(average, memory_.rows, memory_.columns);
    RowFactors(shape_, memory_.rows, average.least, memory_.row_factors);
    measures_ = true;
    return;
  }
  const double squares[] = {measured_.sums[0].sum_squares, measured_.sums[1].sum_squares};
  optimizer_.complete(squares, shape_, scalars_.values);
  if (optimizer_.scope == Scope::kMatrix)
    Orthogonalize(optimizer_.iteration(scalars_.values), shape_.rows, shape_.columns,
                  memory_.matrix, memory_.workspace);
}

}  // namespace orlop::kernels
