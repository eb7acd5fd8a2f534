// Compares the first phase with plain loops in float64, and tests that no cut changes a bit.
#include "kernels/tensor_pass.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/optimizer.h"
#include "kernels/orthogonalize.h"
#include "kernels/testing/test_data.h"
#include "kernels/testing/test_range.h"
#include "kernels/types.h"
#include "kernels/whole_tensor.h"

namespace orlop::kernels {
namespace {

using testing::Formats;
using testing::Hostility;
using testing::Range;
using testing::SameBits;
using testing::Source;
using testing::Span;
using testing::Values;

// A tensor of an optimizer and the memory of its pass.
struct Tensor {
  Tensor(const char* name, MatrixShape shape, StateFormat format, uint64_t seed)
      : optimizer(FindOptimizer(name)),
        shape(shape),
        source(seed),
        range(optimizer, Formats{format}, source.Floats(shape.count(), Hostility::kTame)) {
    const uint64_t bytes = PassMemory::Bytes(*optimizer, shape);
    storage.assign((bytes + 7) / 8, 5);  // contents left by an earlier step
    const PassMemory own = memory();
    std::fill(own.rows.begin(), own.rows.end(), 0.0f);
    std::fill(own.columns.begin(), own.columns.end(), 0.0f);
  }
  PassMemory memory() { return PassMemory(*optimizer, shape, storage.data()); }
  // Makes a whole step, cut into ranges of `cut` elements.
  void Step(const std::vector<float>& gradient, int64_t t, size_t cut) {
    const StepScalars scalars =
        optimizer->Prepare(Values(*optimizer, {{"weight_decay", 0.1}}), t, 0.5f);
    TensorPass pass(*optimizer, shape, scalars, memory());
    const auto part = [&](size_t begin) {
      return range.StepOf(pass.scalars(), Span(gradient), 1, begin,
                          std::min(cut, shape.count() - begin));
    };
    for (int round = 0; round < pass.rounds(); ++round) {
      for (size_t begin = 0; begin < shape.count(); begin += cut) {
        const absl::Status added = pass.Add(part(begin), begin);
        ASSERT_TRUE(added.ok()) << added;
      }
      pass.EndRound();
    }
    for (size_t begin = 0; begin < shape.count(); begin += cut) {
      RangeStep step = part(begin);
      pass.Finish(begin, &step);
      const absl::Status stepped = kernels::Step(step);
      ASSERT_TRUE(stepped.ok()) << stepped;
    }
  }

  const Optimizer* optimizer;
  MatrixShape shape;
  Source source;
  Range range;
  std::vector<double> storage;
};

TEST(TensorPass, NoCutChangesABit) {
  for (const char* name : {"lamb", "adafactor", "muon"}) {
    for (const StateFormat format : {StateFormat::kFp32, StateFormat::k8Bit}) {
      const bool square = std::string(name) == "muon";
      const MatrixShape shape =
          square ? MatrixShape{1, 40, 77, true} : MatrixShape{3, 20, 61, true};
      Tensor whole(name, shape, format, 7), halves(name, shape, format, 7),
          eighths(name, shape, format, 7);
      Source gradients(8);
      for (int64_t t = 0; t < 3; ++t) {
        const std::vector<float> gradient = gradients.Floats(shape.count(), Hostility::kTame);
        whole.Step(gradient, t, shape.count());
        halves.Step(gradient, t, 7 * kQuantBlock);
        eighths.Step(gradient, t, kQuantBlock);
      }
      for (const Tensor* cut : {&halves, &eighths}) {
        cut->range.ExpectSameBits(whole.range);
        EXPECT_TRUE(SameBits(cut->storage, whole.storage));  // averages, factors, the matrix
      }
      EXPECT_FALSE(HasFailure()) << name;
    }
  }
}

TEST(FactorSums, AreMeansOfSquares) {
  for (const MatrixShape shape : {MatrixShape{1, 1, 1000, true}, MatrixShape{1, 1000, 1, true},
                                  MatrixShape{3, 17, 33, true}, MatrixShape{1, 3, 700, true}}) {
    Source source(3);
    std::vector<float> gradient = source.Floats(shape.count(), Hostility::kTame);
    gradient[5] = std::numeric_limits<float>::infinity();  // is not added
    std::vector<double> memory(shape.matrices * (shape.rows + shape.columns));
    FactorSums sums(shape, absl::MakeSpan(memory));
    sums.Add(Span(gradient), 0.25f);
    std::vector<float> rows(shape.matrices * shape.rows), columns(shape.matrices * shape.columns);
    sums.Average({1, 0, 0}, absl::MakeSpan(rows), absl::MakeSpan(columns));
    std::vector<double> row_sums(rows.size()), column_sums(columns.size());
    for (uint64_t i = 0; i < shape.count(); ++i) {
      if (i == 5) continue;
      const double square = std::pow(gradient[i] * 0.25, 2);
      const uint64_t row = i / shape.columns;
      row_sums[row] += square;
      column_sums[row / shape.rows * shape.columns + i % shape.columns] += square;
    }
    for (size_t i = 0; i < rows.size(); ++i) {
      const double mean = row_sums[i] / static_cast<double>(shape.columns);
      ASSERT_NEAR(rows[i], mean, 1e-7 * mean);
    }
    for (size_t i = 0; i < columns.size(); ++i) {
      const double mean = column_sums[i] / static_cast<double>(shape.rows);
      ASSERT_NEAR(columns[i], mean, 1e-7 * mean);
    }
  }
}

// Computes the same polynomial by plain loops in float64.
std::vector<double> Plain(const NewtonSchulz& iteration, size_t rows, size_t columns,
                          const std::vector<float>& matrix) {
  std::vector<double> x(matrix.begin(), matrix.end());
  double norm = 0;
  for (const double value : x) norm += value * value;
  for (double& value : x) value /= std::max<double>(std::sqrt(norm), iteration.eps);
  for (int step = 0; step < iteration.steps; ++step) {
    std::vector<double> gram(rows * rows), polynomial(rows * rows), next(x.size());
    for (size_t i = 0; i < rows; ++i)
      for (size_t j = 0; j < rows; ++j)
        for (size_t k = 0; k < columns; ++k)
          gram[i * rows + j] += x[i * columns + k] * x[j * columns + k];
    for (size_t i = 0; i < rows; ++i)
      for (size_t j = 0; j < rows; ++j) {
        polynomial[i * rows + j] = iteration.b * gram[i * rows + j];
        for (size_t k = 0; k < rows; ++k)
          polynomial[i * rows + j] += iteration.c * gram[i * rows + k] * gram[k * rows + j];
      }
    for (size_t i = 0; i < rows; ++i)
      for (size_t j = 0; j < columns; ++j) {
        next[i * columns + j] = iteration.a * x[i * columns + j];
        for (size_t k = 0; k < rows; ++k)
          next[i * columns + j] += polynomial[i * rows + k] * x[k * columns + j];
      }
    x = next;
  }
  return x;
}

TEST(Orthogonalize, EqualsPlainLoopsInEitherShape) {
  const NewtonSchulz iteration{3.4445f, -4.775f, 2.0315f, 1e-7f, 5};
  for (const auto& [rows, columns] :
       {std::pair<size_t, size_t>{24, 24}, {13, 40}, {40, 13}, {1, 9}, {9, 1}, {1, 1}}) {
    Source source(rows * 100 + columns);
    std::vector<float> matrix = source.Floats(rows * columns, Hostility::kTame);
    const std::vector<double> wide = Plain(iteration, rows, columns, matrix);
    std::vector<float> workspace(OrthogonalizeWorkspace(rows, columns));
    Orthogonalize(iteration, rows, columns, matrix.data(), workspace.data());
    for (size_t i = 0; i < matrix.size(); ++i) ASSERT_NEAR(matrix[i], wide[i], 2e-5) << rows;
  }
}

TEST(Orthogonalize, LeavesZerosAlone) {
  std::vector<float> zeros(12), workspace(OrthogonalizeWorkspace(3, 4));
  Orthogonalize({3, -4, 2, 1e-7f, 5}, 3, 4, zeros.data(), workspace.data());
  EXPECT_EQ(zeros, std::vector<float>(12));
}

TEST(TensorPass, AMatrixWithoutItsUpdateIsRefused) {
  Tensor tensor("muon", {1, 4, 64, true}, StateFormat::kFp32, 1);
  const StepScalars scalars = tensor.optimizer->Prepare(Values(*tensor.optimizer), 0, 1);
  const std::vector<float> gradient(256);
  RangeStep step = tensor.range.StepOf(scalars, Span(gradient));
  step.input = {};
  const absl::Status status = Step(step);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "input of muon is missing");
}

}  // namespace
}  // namespace orlop::kernels
