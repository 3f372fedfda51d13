// Rows from the order of a dispatch plan back into their own: weighted sums over each row's K places, and the backward
// pass. T rows, K topk, R places in the plan, W columns. (The way there is torch's index_select, one memcpy a row.)
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/check.h"
#include "simd.h"

namespace parrot {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Columns whose float32 sums stay in the first-level cache.
constexpr int64_t kColumns = 2048;
// Rows that one task takes at least.
constexpr int64_t kGrain = 16;
constexpr int64_t kDropped = -1;

// The place of each of the T * K positions, kDropped where the plan does not name it.
std::vector<int64_t> places_of(const Tensor& plan, int64_t positions) {
  PARROT_CHECK_SHAPE(plan, -1);
  PARROT_CHECK_DTYPE(plan, Long);
  PARROT_CHECK_CONTIGUOUS(plan);
  std::vector<int64_t> places(static_cast<size_t>(positions), kDropped);
  const int64_t* entries = plan.const_data_ptr<int64_t>();
  for (int64_t place = 0; place < plan.size(0); ++place) {
    const int64_t position = entries[place];
    STD_TORCH_CHECK(0 <= position && position < positions, "plan entries must lie in [0, ", positions, "), got ",
                    position, " at place ", place);
    STD_TORCH_CHECK(places[position] == kDropped, "plan entries must differ, got ", position, " twice");
    places[position] = place;
  }
  return places;
}

struct Plan {
  std::vector<int64_t> places;
  const float* probs;  // null: ones
  int64_t rows, topk, width;
};

Plan check_inputs(const Tensor& in_rows, const Tensor& in_order, const std::optional<Tensor>& probs, const Tensor& plan,
                  int64_t topk) {
  const int64_t rows = in_order.size(0), width = in_order.size(1);
  PARROT_CHECK_SHAPE(in_rows, plan.size(0), width);
  PARROT_CHECK_CPU(in_rows);
  PARROT_CHECK_CONTIGUOUS(in_rows);
  PARROT_CHECK_CONTIGUOUS(in_order);
  STD_TORCH_CHECK(in_rows.scalar_type() == in_order.scalar_type(), "rows on both sides must have the same dtype");
  if (probs) {
    PARROT_CHECK_SHAPE(*probs, rows, topk);
    PARROT_CHECK_DTYPE(*probs, Float);
    PARROT_CHECK_CONTIGUOUS(*probs);
  }
  return {places_of(plan, rows * topk), probs ? probs->const_data_ptr<float>() : nullptr, rows, topk, width};
}

template <class T>
void sum_rows(const Tensor& rows, const Tensor& y, const Plan& plan) {
  const T* from = rows.const_data_ptr<T>();
  T* to = y.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, plan.rows, kGrain, [&](int64_t first, int64_t last) {
    float total[kColumns];
    for (int64_t t = first; t < last; ++t) {
      for (int64_t start = 0; start < plan.width; start += kColumns) {
        const int64_t count = std::min(kColumns, plan.width - start);
        std::fill(total, total + count, 0.0f);
        for (int64_t position = t * plan.topk; position < (t + 1) * plan.topk; ++position) {
          if (plan.places[position] == kDropped) continue;
          const T* own = from + plan.places[position] * plan.width + start;
          const float weight = plan.probs ? plan.probs[position] : 1.0f;
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) total[i] += weight * load(own[i]);
        }
        T* out = to + t * plan.width + start;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(&out[i], total[i]);
      }
    }
  });
}

// Writes grad_row = weight * grad; returns the dot product of grad and row.
template <class T>
float spread_row(const T* grad, const T* row, float weight, T* grad_row, int64_t width) {
  float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < width; ++i) {
    const float g = load(grad[i]);
    dot += g * load(row[i]);
    store(&grad_row[i], weight * g);
  }
  return dot;
}

template <class T>
void spread_rows(const Tensor& grad, const Tensor& rows, const Tensor& grad_rows, const Tensor& grad_probs,
                 const Plan& plan) {
  const T* from = grad.const_data_ptr<T>();
  const T* values = rows.const_data_ptr<T>();
  T* to = grad_rows.mutable_data_ptr<T>();
  float* dots = grad_probs.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, plan.rows, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      for (int64_t position = t * plan.topk; position < (t + 1) * plan.topk; ++position) {
        const int64_t place = plan.places[position];
        dots[position] = 0.0f;
        if (place == kDropped) continue;
        const float weight = plan.probs ? plan.probs[position] : 1.0f;
        // In blocks, so that rounding grows with their number and not with the width.
        for (int64_t start = 0; start < plan.width; start += kColumns) {
          const int64_t at = place * plan.width + start;
          dots[position] += spread_row(from + t * plan.width + start, values + at, weight, to + at,
                                       std::min(kColumns, plan.width - start));
        }
      }
    }
  });
}

void unpermute_fwd(const Tensor& rows, const std::optional<Tensor>& probs, const Tensor& plan, int64_t topk, Tensor y) {
  const Plan checked = check_inputs(rows, y, probs, plan, topk);
  if (rows.scalar_type() == ScalarType::BFloat16) return sum_rows<BFloat16>(rows, y, checked);
  PARROT_CHECK_DTYPE(rows, Float);
  sum_rows<float>(rows, y, checked);
}

void unpermute_bwd(const Tensor& grad, const Tensor& rows, const std::optional<Tensor>& probs, const Tensor& plan,
                   int64_t topk, Tensor grad_rows, Tensor grad_probs) {
  const Plan checked = check_inputs(rows, grad, probs, plan, topk);
  PARROT_CHECK_SHAPE(grad_rows, rows.size(0), rows.size(1));
  PARROT_CHECK_CONTIGUOUS(grad_rows);
  STD_TORCH_CHECK(grad_rows.scalar_type() == rows.scalar_type(), "grad_rows must have the dtype of rows");
  PARROT_CHECK_SHAPE(grad_probs, grad.size(0), topk);
  PARROT_CHECK_DTYPE(grad_probs, Float);
  PARROT_CHECK_CONTIGUOUS(grad_probs);
  if (rows.scalar_type() == ScalarType::BFloat16) {
    return spread_rows<BFloat16>(grad, rows, grad_rows, grad_probs, checked);
  }
  PARROT_CHECK_DTYPE(rows, Float);
  spread_rows<float>(grad, rows, grad_rows, grad_probs, checked);
}

}  // namespace
}  // namespace parrot

// unpermute_fwd: y[t] = sum over k of probs[t, k] * rows[place of (t, k)].
// unpermute_bwd: writes grad_rows = probs * grad at each place and grad_probs = grad . rows; zeros at dropped
// positions.
STABLE_TORCH_LIBRARY_FRAGMENT(parrot_ext, m) {
  m.def("unpermute_fwd(Tensor rows, Tensor? probs, Tensor plan, int topk, Tensor(a!) y) -> ()");
  m.def(
      "unpermute_bwd(Tensor grad, Tensor rows, Tensor? probs, Tensor plan, int topk, Tensor(a!) grad_rows, "
      "Tensor(b!) grad_probs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(parrot_ext, CPU, m) {
  m.impl("unpermute_fwd", TORCH_BOX(&parrot::unpermute_fwd));
  m.impl("unpermute_bwd", TORCH_BOX(&parrot::unpermute_bwd));
}
