// A linear layer on a few rows with what comes before (RMS norm, or SwiGLU) and after it (bias, residual).
// x [M, K] or [M, 2 K], weight [N, K], out [M, N].
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../common/check.h"
#include "few_rows.h"
#include "launchers.h"

namespace parrot {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTask = 16 * kColumns;  // weights of a task

template <class T>
struct Inputs {
  const T* x;         // [M, K] or [M, 2 K]
  const T* weight;    // [N, K]
  const T* norm;      // [K], or null
  const T* bias;      // [N], or null
  const T* residual;  // [M, N], or null
  T* out;             // [M, N]
  int64_t rows, depth, width;
  bool gated;
  float eps;
};

// Row m of what is multiplied.
template <class T>
PARROT_INLINE void prepare(const Inputs<T>& in, int64_t m, float* to) {
  const int64_t depth = in.depth;
  if (in.gated) {
    const T *gate = in.x + m * 2 * depth, *up = gate + depth;
#pragma omp simd
    for (int64_t k = 0; k < depth; ++k) {
      const float g = load(gate[k]);
      to[k] = g * sigmoid(g) * load(up[k]);
    }
    return;
  }
  const T* x = in.x + m * depth;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < depth; ++k) {
    to[k] = load(x[k]);
    sum += to[k] * to[k];
  }
  if (in.norm == nullptr) return;
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(depth) + in.eps);
#pragma omp simd
  for (int64_t k = 0; k < depth; ++k) to[k] *= factor * load(in.norm[k]);
}

template <class T>
PARROT_INLINE void prepare_all(const Inputs<T>& in, float* to) {
  for (int64_t m = 0; m < in.rows; ++m) prepare(in, m, to + m * in.depth);
}

// Columns [first, last) of the result; `sums` has room for them.
template <class T>
PARROT_INLINE void columns(const Inputs<T>& in, const float* rows, int64_t first, int64_t last, float* sums) {
  const int64_t count = last - first;
  multiply(rows, in.rows, in.weight + first * in.depth, in.depth, 0, count, sums, count);
  for (int64_t m = 0; m < in.rows; ++m) {
    const float* sum = sums + m * count;
    T* out = in.out + m * in.width + first;
    for (int64_t n = 0; n < count; ++n) {
      float value = sum[n];
      if (in.bias != nullptr) value += load(in.bias[first + n]);
      if (in.residual != nullptr) value += load(in.residual[m * in.width + first + n]);
      store(&out[n], value);
    }
  }
}

#ifdef PARROT_X86
template <class T>
PARROT_AVX2 void prepare_all_avx2(const Inputs<T>& in, float* to) {
  prepare_all(in, to);
}
template <class T>
PARROT_AVX2 void columns_avx2(const Inputs<T>& in, const float* rows, int64_t first, int64_t last, float* sums) {
  columns(in, rows, first, last, sums);
}
#endif

template <class T>
void run(const Inputs<T>& in) {
  std::vector<float> rows(static_cast<size_t>(in.rows * in.depth));
#ifdef PARROT_X86
  if (has_avx2()) {
    prepare_all_avx2(in, rows.data());
  } else
#endif
  {
    prepare_all(in, rows.data());
  }
  const int64_t tasks = (in.width + kTask - 1) / kTask;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(static_cast<size_t>(in.rows * kTask));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kTask, last = std::min(first + kTask, in.width);
#ifdef PARROT_X86
      if (has_avx2()) {
        columns_avx2(in, rows.data(), first, last, sums.data());
        continue;
      }
#endif
      columns(in, rows.data(), first, last, sums.data());
    }
  });
}

void check_like(const Tensor& tensor, const Tensor& x) {
  PARROT_CHECK_CPU(tensor);
  PARROT_CHECK_CONTIGUOUS(tensor);
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), "weight, norm, bias and residual must have the dtype of x");
}

}  // namespace

Tensor few_rows_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& norm,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, bool gated,
                       double eps) {
  PARROT_CHECK_SHAPE(weight, -1, -1);
  const int64_t width = weight.size(0), depth = weight.size(1);
  PARROT_CHECK_SHAPE(x, -1, (gated ? 2 : 1) * depth);
  const int64_t rows = x.size(0);
  check_like(x, x);
  check_like(weight, x);
  if (norm.has_value()) {
    STD_TORCH_CHECK(!gated, "norm must be None where x holds gate and up");
    PARROT_CHECK_SHAPE(*norm, depth);
    check_like(*norm, x);
  }
  if (bias.has_value()) {
    PARROT_CHECK_SHAPE(*bias, width);
    check_like(*bias, x);
  }
  if (residual.has_value()) {
    PARROT_CHECK_SHAPE(*residual, rows, width);
    check_like(*residual, x);
  }
  Tensor out = torch::stable::new_empty(x, {rows, width});
  const auto launch = [&]<class T>(T) {
    run(Inputs<T>{.x = x.const_data_ptr<T>(),
                  .weight = weight.const_data_ptr<T>(),
                  .norm = data_or_null<T>(norm),
                  .bias = data_or_null<T>(bias),
                  .residual = data_or_null<T>(residual),
                  .out = out.mutable_data_ptr<T>(),
                  .rows = rows,
                  .depth = depth,
                  .width = width,
                  .gated = gated,
                  .eps = static_cast<float>(eps)});
  };
  if (x.scalar_type() == ScalarType::BFloat16) {
    launch(BFloat16{});
  } else {
    PARROT_CHECK_DTYPE(x, Float);
    launch(0.0f);
  }
  return out;
}

}  // namespace parrot

STABLE_TORCH_LIBRARY_FRAGMENT(parrot_ext, m) {
  m.def(
      "few_rows_linear(Tensor x, Tensor weight, Tensor? norm, Tensor? bias, Tensor? residual, bool gated, float eps) "
      "-> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(parrot_ext, CPU, m) {
  m.impl("few_rows_linear", TORCH_BOX(&parrot::few_rows_linear));
}
