// SwiGLU with one weight per (image, expert): the epilogues of expert_mlp, forward and backward.
// n images, V rows an image, E experts, I inner width. z [n, V, E, 2, I] holds gate and up pre-activations.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../common/check.h"
#include "simd.h"

namespace parrot {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows that one task of the backward pass sums over before the partial sums are added in a fixed order.
constexpr int64_t kRowsPerTask = 32;

// out = silu(gate) * up * weight over one row of one expert.
template <class T>
PARROT_INLINE void fwd_row(const T* gate, const T* up, float weight, T* out, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float g = load(gate[i]);
    store(&out[i], g * sigmoid(g) * load(up[i]) * weight);
  }
}

// Given grad = dL/d(weighted h) / weight: writes dL/dz, replaces grad by the weighted h and returns sum(h * grad).
template <class T>
PARROT_INLINE float bwd_row(const T* gate, const T* up, float weight, T* grad, T* grad_gate, T* grad_up,
                            int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) {
    const float g = load(gate[i]), u = load(up[i]), d = load(grad[i]);
    const float s = sigmoid(g);
    const float silu = g * s;
    const float h = silu * u;
    sum += h * d;
    store(&grad_gate[i], d * weight * u * (s + silu * (1.0f - s)));
    store(&grad_up[i], d * weight * silu);
    store(&grad[i], h * weight);
  }
  return sum;
}

// Rows [first, last) of n * V; every expert of a row. `weights` [n, E].
template <class T>
PARROT_INLINE void fwd_rows(const T* z, const float* weights, T* out, int64_t first, int64_t last,
                            int64_t rows_per_image, int64_t experts, int64_t width) {
  for (int64_t row = first; row < last; ++row) {
    const float* weight = weights + row / rows_per_image * experts;
    for (int64_t e = 0; e < experts; ++e) {
      const T* gate = z + (row * experts + e) * 2 * width;
      fwd_row(gate, gate + width, weight[e], out + (row * experts + e) * width, width);
    }
  }
}

// As fwd_rows, rows of one image; adds the sums over these rows to `grad_weight` [E].
template <class T>
PARROT_INLINE void bwd_rows(const T* z, const float* weight, T* grad_h, T* grad_z, double* grad_weight, int64_t first,
                            int64_t last, int64_t experts, int64_t width) {
  for (int64_t row = first; row < last; ++row) {
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t at = row * experts + e;
      const T* gate = z + at * 2 * width;
      T* grad_gate = grad_z + at * 2 * width;
      grad_weight[e] +=
          bwd_row(gate, gate + width, weight[e], grad_h + at * width, grad_gate, grad_gate + width, width);
    }
  }
}

#ifdef PARROT_X86
template <class T>
PARROT_AVX2 void fwd_rows_avx2(const T* z, const float* weights, T* out, int64_t first, int64_t last,
                               int64_t rows_per_image, int64_t experts, int64_t width) {
  fwd_rows(z, weights, out, first, last, rows_per_image, experts, width);
}
template <class T>
PARROT_AVX2 void bwd_rows_avx2(const T* z, const float* weight, T* grad_h, T* grad_z, double* grad_weight,
                               int64_t first, int64_t last, int64_t experts, int64_t width) {
  bwd_rows(z, weight, grad_h, grad_z, grad_weight, first, last, experts, width);
}
#endif

struct Shape {
  int64_t images, rows, experts, width;
};

Shape check_inputs(const Tensor& z, const Tensor& weights) {
  PARROT_CHECK_SHAPE(z, -1, -1, -1, 2, -1);
  const Shape shape{z.size(0), z.size(1), z.size(2), z.size(4)};
  PARROT_CHECK_SHAPE(weights, shape.images, shape.experts);
  PARROT_CHECK_DTYPE(weights, Float);
  PARROT_CHECK_CPU(z);
  PARROT_CHECK_CONTIGUOUS(z);
  PARROT_CHECK_CONTIGUOUS(weights);
  return shape;
}

template <class T>
void fwd(const Tensor& z, const Tensor& weights, const Tensor& out, const Shape& s) {
  const T* z_data = z.const_data_ptr<T>();
  const float* weights_data = weights.const_data_ptr<float>();
  T* out_data = out.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, s.images * s.rows, 8, [&](int64_t first, int64_t last) {
#ifdef PARROT_X86
    if (has_avx2()) return fwd_rows_avx2(z_data, weights_data, out_data, first, last, s.rows, s.experts, s.width);
#endif
    fwd_rows(z_data, weights_data, out_data, first, last, s.rows, s.experts, s.width);
  });
}

template <class T>
void bwd(const Tensor& z, const Tensor& weights, const Tensor& grad_h, const Tensor& grad_z, const Tensor& grad_weights,
         const Shape& s) {
  const T* z_data = z.const_data_ptr<T>();
  const float* weights_data = weights.const_data_ptr<float>();
  T* grad_h_data = grad_h.mutable_data_ptr<T>();
  T* grad_z_data = grad_z.mutable_data_ptr<T>();
  const int64_t tasks = (s.rows + kRowsPerTask - 1) / kRowsPerTask;
  std::vector<double> partial(static_cast<size_t>(s.images * tasks * s.experts), 0.0);
  torch::stable::parallel_for(0, s.images * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / tasks, start = task % tasks * kRowsPerTask;
      const int64_t first = image * s.rows + start;
      const int64_t last = image * s.rows + std::min(start + kRowsPerTask, s.rows);
      const float* weight = weights_data + image * s.experts;
      double* sum = partial.data() + task * s.experts;
#ifdef PARROT_X86
      if (has_avx2()) {
        bwd_rows_avx2(z_data, weight, grad_h_data, grad_z_data, sum, first, last, s.experts, s.width);
        continue;
      }
#endif
      bwd_rows(z_data, weight, grad_h_data, grad_z_data, sum, first, last, s.experts, s.width);
    }
  });
  float* out = grad_weights.mutable_data_ptr<float>();
  for (int64_t image = 0; image < s.images; ++image) {
    for (int64_t e = 0; e < s.experts; ++e) {
      double total = 0.0;
      for (int64_t task = 0; task < tasks; ++task) total += partial[(image * tasks + task) * s.experts + e];
      out[image * s.experts + e] = static_cast<float>(total);
    }
  }
}

void swiglu_fwd(const Tensor& z, const Tensor& weights, Tensor out) {
  const Shape s = check_inputs(z, weights);
  STD_TORCH_CHECK(out.numel() == s.images * s.rows * s.experts * s.width, "out must hold one value per pair of z, got ",
                  out.numel());
  STD_TORCH_CHECK(out.scalar_type() == z.scalar_type(), "out must have the dtype of z");
  PARROT_CHECK_CONTIGUOUS(out);
  if (z.scalar_type() == ScalarType::BFloat16) return fwd<BFloat16>(z, weights, out, s);
  PARROT_CHECK_DTYPE(z, Float);
  fwd<float>(z, weights, out, s);
}

Tensor swiglu_bwd(const Tensor& z, const Tensor& weights, Tensor grad_h, Tensor grad_z) {
  const Shape s = check_inputs(z, weights);
  STD_TORCH_CHECK(grad_h.numel() == s.images * s.rows * s.experts * s.width,
                  "grad_h must hold one value per pair of z, got ", grad_h.numel());
  PARROT_CHECK_SHAPE(grad_z, s.images, s.rows, s.experts, 2, s.width);
  STD_TORCH_CHECK(grad_h.scalar_type() == z.scalar_type() && grad_z.scalar_type() == z.scalar_type(),
                  "grad_h and grad_z must have the dtype of z");
  PARROT_CHECK_CONTIGUOUS(grad_h);
  PARROT_CHECK_CONTIGUOUS(grad_z);
  const Tensor grad_weights = torch::stable::new_empty(weights, {s.images, s.experts});
  if (z.scalar_type() == ScalarType::BFloat16) {
    bwd<BFloat16>(z, weights, grad_h, grad_z, grad_weights, s);
  } else {
    PARROT_CHECK_DTYPE(z, Float);
    bwd<float>(z, weights, grad_h, grad_z, grad_weights, s);
  }
  return grad_weights;
}

}  // namespace
}  // namespace parrot

// swiglu_fwd: out = silu(gate) * up * weights[image, expert].
// swiglu_bwd: grad_h comes in as the gradient BEFORE the weight and leaves as the weighted h (what the gradient of the
// down-projection needs); grad_z is written; returns the sums of h * grad_h over each image's rows and expert's
// columns.
STABLE_TORCH_LIBRARY_FRAGMENT(parrot_ext, m) {
  m.def("swiglu_fwd(Tensor z, Tensor weights, Tensor(a!) out) -> ()");
  m.def("swiglu_bwd(Tensor z, Tensor weights, Tensor(a!) grad_h, Tensor(b!) grad_z) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(parrot_ext, CPU, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&parrot::swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&parrot::swiglu_bwd));
}
