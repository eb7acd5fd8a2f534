// The first phase of a step of LAMB, Adafactor and Muon. It reads a whole tensor and changes
// nothing of it. The second phase is kernels::Step on each of its ranges, in any order, with the
// scalars and inputs that this phase computed.
//
//   TensorPass pass(optimizer, shape, scalars, memory);
//   for (int round = 0; round < pass.rounds(); ++round) {
//     for (RangeStep range : tensor) pass.Add(range, begin);  // ascending
//     pass.EndRound();
//   }
//   pass.Finish(begin, &range);  // for every range, before its Step
//
//   Bits     do not depend on how the tensor is cut into ranges; those of kMatrix are the same only
//            on machines of one type (orthogonalize.h).
//   Threads  one thread uses a pass; passes of several tensors may run at once.
#pragma once
#include <optional>

#include "absl/status/status.h"
#include "kernels/whole_tensor.h"

namespace orlop::kernels {

// The working memory of a pass. The caller owns it and keeps it until the last range was stepped.
struct PassMemory {
  // Returns the bytes needed; 0: none.
  static uint64_t Bytes(const Optimizer& optimizer, const MatrixShape& shape);
  // Lays the arrays out in `memory`: Bytes() bytes, aligned for fp64.
  PassMemory(const Optimizer& optimizer, const MatrixShape& shape, void* memory);

  // kFactored, tensors with two or more dimensions: the tensor's averages, [matrices * rows] and
  // [matrices * columns], which the pass updates, and the factors of its rows.
  absl::Span<float> rows, columns, row_factors;
  absl::Span<double> sums;  // [matrices * (rows + columns)]
  // kMatrix: the update, [rows * columns], and the workspace of Orthogonalize.
  float* matrix = nullptr;
  float* workspace = nullptr;
};

class TensorPass {
 public:
  static bool IsFactored(const Optimizer& optimizer, const MatrixShape& shape);

  // `scalars`: from Optimizer::Prepare.
  TensorPass(const Optimizer& optimizer, const MatrixShape& shape, const StepScalars& scalars,
             const PassMemory& memory);

  int rounds() const { return factors_.has_value() ? 2 : 1; }
  // Returns whether this round reads the weights and states of a range, not only its gradient.
  bool reads_slots() const { return measures_; }
  // Adds a range whose first element has index `begin` in the tensor. The pass sets the range's
  // scalars and input. Status: InvalidArgument, as Measure.
  absl::Status Add(RangeStep range, uint64_t begin);
  void EndRound();

  // Fills in the scalars and input of `range`. They point into this pass, which must outlive the
  // range's Step. `begin`: index in the tensor of the range's first element.
  void Finish(uint64_t begin, RangeStep* range) const;
  const StepScalars& scalars() const { return scalars_; }
  const PassMemory& memory() const { return memory_; }

 private:
  const Optimizer& optimizer_;
  const MatrixShape shape_;
  const PassMemory memory_;
  StepScalars scalars_;
  std::optional<FactorSums> factors_;  // of the first round
  bool measures_ = false;              // this round computes norms
  Measured measured_;
};

}  // namespace orlop::kernels
