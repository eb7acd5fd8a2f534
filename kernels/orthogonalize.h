// The Newton-Schulz iteration of Muon's update.
#pragma once
#include <cstdint>

#include "kernels/optimizer.h"

namespace orlop::kernels {

// Replaces `matrix`, fp32 [rows, columns] in row-major order, by a matrix with the same singular
// vectors and singular values near 1. A BLAS library computes the products, on one thread; the bits
// are the same only on machines of one type.
//   workspace  OrthogonalizeWorkspace(rows, columns) floats
void Orthogonalize(const NewtonSchulz& iteration, uint64_t rows, uint64_t columns, float* matrix,
                   float* workspace);
uint64_t OrthogonalizeWorkspace(uint64_t rows, uint64_t columns);

}  // namespace orlop::kernels
