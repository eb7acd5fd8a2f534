// Newton-Schulz, which Muon's update goes through.
#pragma once
#include <cstdint>

#include "kernels/optimizer.h"

namespace orlop::kernels {

// `matrix`, fp32 [rows, columns] in row-major order, becomes one whose singular values are near 1
// and whose singular vectors are the same. Its products are a BLAS library's, on one thread: the
// bits are the same on machines of one type alone.
//   workspace  OrthogonalizeWorkspace(rows, columns) floats
void Orthogonalize(const NewtonSchulz& iteration, uint64_t rows, uint64_t columns, float* matrix,
                   float* workspace);
uint64_t OrthogonalizeWorkspace(uint64_t rows, uint64_t columns);

}  // namespace orlop::kernels
