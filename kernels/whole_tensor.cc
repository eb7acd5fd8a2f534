// Sums over rows and columns in plain C++. The order of additions is fixed for every column and for
// every lane of a row, so any compiler's vectors give the same bits.
#include "kernels/whole_tensor.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "kernels/arithmetic.h"
#include "kernels/casts.h"
#include "kernels/optimizer.h"
#include "kernels/types.h"

namespace orlop::kernels {
namespace {

#define ORLOP_RULE
#include "kernels/optimizers/lerp.h"
#undef ORLOP_RULE

constexpr size_t kLanes = 16;

// Adds the lanes of a row in the order of reduce.h.
double SumOf(const double* lanes) {
  double sums[kLanes];
  std::copy(lanes, lanes + kLanes, sums);
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  return sums[0];
}

// Returns the square, or 0 if the value is not finite.
double SquareOf(float value) {
  const double wide = value;
  return std::isfinite(value) ? wide * wide : 0;
}

}  // namespace

MatrixShape MatrixShape::Of(absl::Span<const uint64_t> shape) {
  MatrixShape of;
  of.is_matrix = shape.size() >= 2;
  if (!shape.empty()) of.columns = shape.back();
  if (of.is_matrix) of.rows = shape[shape.size() - 2];
  for (size_t i = 0; i + 2 < shape.size(); ++i) of.matrices *= shape[i];
  return of;
}

FactorSums::FactorSums(const MatrixShape& shape, absl::Span<double> sums)
    : shape_(shape),
      rows_(sums.subspan(0, shape.matrices * shape.rows)),
      columns_(sums.subspan(shape.matrices * shape.rows)) {
  std::fill(sums.begin(), sums.end(), 0.0);
}

void FactorSums::AddRow(const float* values, uint64_t column, uint64_t count) {
  const uint64_t row = next_ / shape_.columns;
  double* columns = columns_.data() + row / shape_.rows * shape_.columns + column;
  for (uint64_t i = 0; i < count; ++i) {
    const double square = SquareOf(values[i]);
    columns[i] += square;
    lanes_[(column + i) % kLanes] += square;
  }
  next_ += count;
  if (next_ % shape_.columns != 0) return;
  rows_[row] = SumOf(lanes_);
  std::fill(lanes_, lanes_ + kLanes, 0.0);
}

void FactorSums::Add(TypedSpan gradient, float scale) {
  float values[kQuantBlock];
  for (size_t begin = 0; begin < gradient.count; begin += kQuantBlock) {
    const TypedSpan part = Slice(gradient, begin, kQuantBlock);
    (void)WidenToF32(part, {values, part.count});  // the counts agree
    for (size_t i = 0; i < part.count; ++i) values[i] *= scale;
    for (size_t i = 0; i < part.count;) {
      const uint64_t column = next_ % shape_.columns;
      const uint64_t run = std::min<uint64_t>(part.count - i, shape_.columns - column);
      AddRow(values + i, column, run);
      i += run;
    }
  }
}

void FactorSums::Average(const FactorAverage& step, absl::Span<float> rows,
                         absl::Span<float> columns) const {
  const Lerp<ScalarArithmetic> lerp(step.rest, step.weight);
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i] = lerp(rows[i], static_cast<float>(rows_[i] / static_cast<double>(shape_.columns)));
  }
  for (size_t i = 0; i < columns.size(); ++i) {
    columns[i] =
        lerp(columns[i], static_cast<float>(columns_[i] / static_cast<double>(shape_.rows)));
  }
}

void RowFactors(const MatrixShape& shape, absl::Span<const float> rows, float least,
                absl::Span<float> out) {
  for (uint64_t matrix = 0; matrix < shape.matrices; ++matrix) {
    const uint64_t begin = matrix * shape.rows, end = begin + shape.rows;
    double sum = 0;
    for (uint64_t i = begin; i < end; ++i) sum += rows[i];
    const float mean = std::max(static_cast<float>(sum / static_cast<double>(shape.rows)), least);
    for (uint64_t i = begin; i < end; ++i) out[i] = rows[i] / mean;
  }
}

}  // namespace orlop::kernels
