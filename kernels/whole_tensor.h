// Sums that an optimizer computes over a whole tensor before a step changes any of it (Scope in
// optimizer.h): norms, and sums over rows and columns. tensor_pass.h calls them in order. Add the
// ranges of a tensor in ascending order. How the tensor is cut changes no bit, because every sum
// continues from the range before.
//   Order     squares as in reduce.h, in fp64; a NaN or infinity is not added.
//   Error     bit-identical on every instruction set.
//   Threads   no shared state.
#pragma once
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/optimizer.h"
#include "kernels/reduce.h"

namespace orlop::kernels {

// Sums of squares of the two vectors that an optimizer's Measure computes.
struct Measured {
  BlockSums sums[2];
};

// Continues *measured over a range, on whose scalars Optimizer::begin was called. If `first` is not
// null, it receives the first vector, [count]. Changes no byte of the range. Does nothing for
// kElement.
//   Status  as Step; new_weight is not read
absl::Status Measure(const RangeStep& step, Measured* measured, float* first);

// Mean squares of a gradient [matrices, rows, columns] over its rows and over its columns.
class FactorSums {
 public:
  // `sums`: [matrices * (rows + columns)]. It is set to zero and used as working memory.
  FactorSums(const MatrixShape& shape, absl::Span<double> sums);
  // Adds the next elements of the flattened tensor, each first multiplied by `scale` in fp32.
  void Add(TypedSpan gradient, float scale);

  // Updates the averages, [matrices * rows] and [matrices * columns], with the means. Call it once
  // all elements were added.
  void Average(const FactorAverage& step, absl::Span<float> rows, absl::Span<float> columns) const;

 private:
  void AddRow(const float* values, uint64_t column, uint64_t count);

  const MatrixShape shape_;
  uint64_t next_ = 0;      // index in the flattened tensor
  double lanes_[16] = {};  // of the current row, by column
  const absl::Span<double> rows_, columns_;
};

// Computes the factors whose products estimate the second moment (Shazeer and Stern, 2018, alg. 4).
// A row's factor is its average divided by the mean of its matrix's row averages, at least `least`.
// A column's factor is its average.
//   rows, out  [matrices * rows]; may be the same
void RowFactors(const MatrixShape& shape, absl::Span<const float> rows, float least,
                absl::Span<float> out);

}  // namespace orlop::kernels
