// Newton-Schulz with BLAS. A build of the kernels alone leaves this file out.
#include "kernels/orthogonalize.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "kernels/optimizer.h"
#include "kernels/reduce.h"
#include "kernels/types.h"

namespace orlop::kernels {
namespace {

// Several threads would cut the products elsewhere and change their bits.
void UseOneThread() {
  static const bool once = [] {
    openblas_set_num_threads(1);
    return true;
  }();
  (void)once;
}

}  // namespace

uint64_t OrthogonalizeWorkspace(uint64_t rows, uint64_t columns) {
  const uint64_t side = std::min(rows, columns);
  return rows * columns + 2 * side * side;
}

// X is the matrix if it has fewer rows than columns, else its transpose (multiplied from the other
// side): A = X X', P = b A + c A A, X = a X + P X.
void Orthogonalize(const NewtonSchulz& iteration, uint64_t rows, uint64_t columns, float* matrix,
                   float* workspace) {
  UseOneThread();
  const bool tall = rows > columns;
  const auto m = static_cast<blasint>(rows), n = static_cast<blasint>(columns);
  const blasint side = std::min(m, n), length = std::max(m, n);
  BlockSums sums;
  ReduceGradient({DType::kF32, matrix, rows * columns}, &sums);
  const auto norm = static_cast<float>(std::sqrt(sums.sum_squares));
  const float scale = std::max(norm, iteration.eps);
  if (scale == 0) return;
  for (uint64_t i = 0; i < rows * columns; ++i) matrix[i] /= scale;

  float* gram = workspace;
  float* polynomial = gram + static_cast<uint64_t>(side) * side;
  float* from = matrix;
  float* to = polynomial + static_cast<uint64_t>(side) * side;
  const int steps = static_cast<int>(iteration.steps);
  for (int step = 0; step < steps; ++step) {
    cblas_ssyrk(CblasRowMajor, CblasUpper, tall ? CblasTrans : CblasNoTrans, side, length, 1, from,
                n, 0, gram, side);
    for (blasint i = 0; i < side; ++i) {
      for (blasint j = 0; j < i; ++j)
        gram[static_cast<uint64_t>(i) * side + j] = gram[static_cast<uint64_t>(j) * side + i];
    }
    std::copy(gram, gram + static_cast<uint64_t>(side) * side, polynomial);
    cblas_ssymm(CblasRowMajor, CblasLeft, CblasUpper, side, side, iteration.c, gram, side, gram,
                side, iteration.b, polynomial, side);
    std::copy(from, from + rows * columns, to);
    cblas_ssymm(CblasRowMajor, tall ? CblasRight : CblasLeft, CblasUpper, m, n, 1, polynomial, side,
                from, n, iteration.a, to, n);
    std::swap(from, to);
  }
  if (from != matrix) std::copy(from, from + rows * columns, matrix);
}

}  // namespace orlop::kernels
