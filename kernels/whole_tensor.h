// What an optimizer reads of a whole tensor before a step changes any of it (Scope in optimizer.h):
// norms, and sums over rows and columns. tensor_pass.h strings them together. Ranges of a tensor
// are fed in ascending order; how it is cut changes no bit, as every sum goes on where the range
// before ended.
//   Order     squares as in reduce.h, in fp64; a NaN or infinity adds nothing.
//   Error     bit-identical on every instruction set.
//   Threads   no shared state.
#pragma once
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/optimizer.h"
#include "kernels/reduce.h"

namespace orlop::kernels {

// Of the two vectors that an optimizer's Measure looks at.
struct Measured {
  BlockSums sums[2];
};

// Continues *measured over a range, whose scalars `begin` has seen. Where `first` is not null, it
// gets the first vector, [count]. No byte of the range is changed. Of
// kElement nothing is measured.
//   Status  as Step, but for new_weight, which is not read
absl::Status Measure(const RangeStep& step, Measured* measured, float* first);

// Means of squares over rows and over columns of a gradient in [matrices, rows, columns].
class FactorSums {
 public:
  // `sums`, of matrices * (rows + columns) elements, becomes zero and is worked in.
  FactorSums(const MatrixShape& shape, absl::Span<double> sums);
  // The next elements of the flattened tensor; `scale` is multiplied into each first, in fp32.
  void Add(TypedSpan gradient, float scale);

  // Takes the means into their averages, [matrices * rows] and [matrices * columns], once all
  // elements were added.
  void Average(const FactorAverage& step, absl::Span<float> rows, absl::Span<float> columns) const;

 private:
  void AddRow(const float* values, uint64_t column, uint64_t count);

  const MatrixShape shape_;
  uint64_t next_ = 0;      // element of the flattened tensor
  double lanes_[16] = {};  // of the row under way, by column
  const absl::Span<double> rows_, columns_;
};

// The factors whose products estimate the second moment (Shazeer and Stern, 2018, alg. 4): of a row
// its average over the mean of its matrix's, at least `least`; a column's average is its factor.
//   rows, out  [matrices * rows]; may be the same
void RowFactors(const MatrixShape& shape, absl::Span<const float> rows, float least,
                absl::Span<float> out);

}  // namespace orlop::kernels
