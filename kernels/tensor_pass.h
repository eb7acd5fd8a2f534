// The first of the two phases of a step of LAMB, Adafactor and Muon: reads a whole tensor and
// changes nothing of it. The second is kernels::Step of its ranges, in any order, with what this
// found.
//
//   TensorPass pass(optimizer, shape, scalars, memory);
//   for (int round = 0; round < pass.rounds(); ++round) {
//     for (RangeStep range : tensor) pass.Add(range, begin);  // ascending
//     pass.EndRound();
//   }
//   pass.Finish(begin, &range);  // of every range, before its Step
//
//   Bits     do not depend on how the tensor is cut into ranges; those of kMatrix are the same on
//            machines of one type alone (orthogonalize.h).
//   Threads  one pass is one thread's; passes of several tensors may run at once.
#pragma once
#include <optional>

#include "absl/status/status.h"
#include "kernels/whole_tensor.h"

namespace orlop::kernels {

// What a pass works in, in memory of the caller's that must live until the last range was stepped.
struct PassMemory {
  // Bytes that it takes; 0: none.
  static uint64_t Bytes(const Optimizer& optimizer, const MatrixShape& shape);
  // `memory`: that many, aligned for fp64.
  PassMemory(const Optimizer& optimizer, const MatrixShape& shape, void* memory);

  // kFactored from two dimensions: the averages of the tensor, [matrices * rows] and [matrices *
  // columns], which become the new ones, and the factors of its rows.
  absl::Span<float> rows, columns, row_factors;
  absl::Span<double> sums;  // matrices * (rows + columns)
  // kMatrix: the update, [rows * columns], and OrthogonalizeWorkspace(rows, columns) floats.
  float* matrix = nullptr;
  float* workspace = nullptr;
};

class TensorPass {
 public:
  static bool IsFactored(const Optimizer& optimizer, const MatrixShape& shape);

  // `scalars` as of Optimizer::Prepare.
  TensorPass(const Optimizer& optimizer, const MatrixShape& shape, const StepScalars& scalars,
             const PassMemory& memory);

  int rounds() const { return factors_.has_value() ? 2 : 1; }
  // Whether this round reads more of a range than its gradient.
  bool reads_slots() const { return measures_; }
  // The range's scalars and input are the pass's own. InvalidArgument: as Measure.
  absl::Status Add(RangeStep range, uint64_t begin);
  void EndRound();

  // Gives a range, that begins at element `begin` of the tensor, its scalars and input. They are
  // the pass's memory.
  void Finish(uint64_t begin, RangeStep* range) const;
  const StepScalars& scalars() const { return scalars_; }
  const PassMemory& memory() const { return memory_; }

 private:
  const Optimizer& optimizer_;
  const MatrixShape shape_;
  const PassMemory memory_;
  StepScalars scalars_;
  std::optional<FactorSums> factors_;  // of the first round
  bool measures_ = false;              // the round takes norms
  Measured measured_;
};

}  // namespace orlop::kernels
