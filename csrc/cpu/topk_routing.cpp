// Softmax scores, top-k selection and the dispatch plan of n rows over E experts, float32.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/check.h"

namespace parrot {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows that one task of a loop takes at least.
constexpr int64_t kGrain = 64;

struct Row {
  const float* logits;
  float* probs;  // all zero
  float* scores;
  float* lse;
  int64_t* chosen;
};

void route_row(const Row& row, int64_t experts, int64_t topk, bool renormalize, std::vector<int64_t>& order) {
  const float top = *std::max_element(row.logits, row.logits + experts);
  float total = 0.0f;
  for (int64_t e = 0; e < experts; ++e) total += row.scores[e] = std::exp(row.logits[e] - top);
  for (int64_t e = 0; e < experts; ++e) row.scores[e] /= total;
  *row.lse = top + std::log(total);

  std::iota(order.begin(), order.end(), int64_t{0});
  // By logit, not by score: distinct logits may have equal scores. Of equal logits the smaller index comes first. A NaN
  // counts as the largest, as in torch.sort, so that the order stays a strict one.
  const auto before = [&](int64_t a, int64_t b) {
    const float x = row.logits[a], y = row.logits[b];
    const bool x_nan = std::isnan(x), y_nan = std::isnan(y);
    if (x_nan || y_nan) return x_nan && y_nan ? a < b : x_nan;
    return x != y ? x > y : a < b;
  };
  std::partial_sort(order.begin(), order.begin() + topk, order.end(), before);

  float chosen_total = 1.0f;
  if (renormalize) {
    chosen_total = 0.0f;
    for (int64_t k = 0; k < topk; ++k) chosen_total += row.scores[order[k]];
  }
  for (int64_t k = 0; k < topk; ++k) {
    row.chosen[k] = order[k];
    row.probs[order[k]] = row.scores[order[k]] / chosen_total;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fwd(const Tensor& logits, int64_t topk,
                                                                       bool renormalize) {
  PARROT_CHECK_SHAPE(logits, -1, -1);
  PARROT_CHECK_DTYPE(logits, Float);
  PARROT_CHECK_CPU(logits);
  PARROT_CHECK_CONTIGUOUS(logits);
  const int64_t rows = logits.size(0), experts = logits.size(1);
  STD_TORCH_CHECK(1 <= topk && topk <= experts, "topk must be in [1, num_experts=", experts, "], got ", topk);
  Tensor probs = torch::stable::new_zeros(logits, {rows, experts});
  Tensor scores = torch::stable::new_empty(logits, {rows, experts});
  Tensor lse = torch::stable::new_empty(logits, {rows});
  Tensor indices = torch::stable::new_empty(logits, {rows, topk}, ScalarType::Long);
  Tensor counts = torch::stable::new_zeros(logits, {experts}, ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(logits, {experts + 1}, ScalarType::Int);
  Tensor plan = torch::stable::new_empty(logits, {rows * topk}, ScalarType::Long);

  const float* logits_data = logits.const_data_ptr<float>();
  float* probs_data = probs.mutable_data_ptr<float>();
  float* scores_data = scores.mutable_data_ptr<float>();
  float* lse_data = lse.mutable_data_ptr<float>();
  int64_t* indices_data = indices.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, rows, kGrain, [&](int64_t first, int64_t last) {
    std::vector<int64_t> order(static_cast<size_t>(experts));
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = r * experts;
      route_row({logits_data + at, probs_data + at, scores_data + at, lse_data + r, indices_data + r * topk}, experts,
                topk, renormalize, order);
    }
  });

  // A counting sort by expert; it is stable, so positions rise within an expert.
  int32_t* counts_data = counts.mutable_data_ptr<int32_t>();
  int32_t* offsets_data = offsets.mutable_data_ptr<int32_t>();
  int64_t* plan_data = plan.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows * topk; ++i) ++counts_data[indices_data[i]];
  offsets_data[0] = 0;
  std::partial_sum(counts_data, counts_data + experts, offsets_data + 1);
  std::vector<int32_t> next(offsets_data, offsets_data + experts);
  for (int64_t i = 0; i < rows * topk; ++i) plan_data[next[indices_data[i]]++] = i;
  return {probs, scores, lse, indices, counts, offsets, plan};
}

struct GradRow {
  const float* grad_probs;   // null: zeros
  const float* grad_scores;  // null: zeros
  float grad_lse;
  const float* probs;
  const float* scores;
  const int64_t* chosen;
  float* grad_logits;
};

void route_row_bwd(const GradRow& row, int64_t experts, int64_t topk, bool renormalize) {
  float* grad = row.grad_logits;
  if (row.grad_scores) {
    std::copy(row.grad_scores, row.grad_scores + experts, grad);
  } else {
    std::fill(grad, grad + experts, 0.0f);
  }
  if (row.grad_probs) {
    float total = 1.0f, mean = 0.0f;
    if (renormalize) {
      total = 0.0f;
      for (int64_t k = 0; k < topk; ++k) {
        total += row.scores[row.chosen[k]];
        mean += row.probs[row.chosen[k]] * row.grad_probs[row.chosen[k]];
      }
    }
    for (int64_t k = 0; k < topk; ++k) grad[row.chosen[k]] += (row.grad_probs[row.chosen[k]] - mean) / total;
  }
  float sum = 0.0f;
  for (int64_t e = 0; e < experts; ++e) sum += row.scores[e] * grad[e];
  for (int64_t e = 0; e < experts; ++e) grad[e] = row.scores[e] * (grad[e] - sum + row.grad_lse);
}

Tensor bwd(const std::optional<Tensor>& grad_probs, const std::optional<Tensor>& grad_scores,
           const std::optional<Tensor>& grad_lse, const Tensor& probs, const Tensor& scores, const Tensor& indices,
           bool renormalize) {
  const int64_t rows = scores.size(0), experts = scores.size(1), topk = indices.size(1);
  PARROT_CHECK_SHAPE(probs, rows, experts);
  PARROT_CHECK_SHAPE(indices, rows, topk);
  PARROT_CHECK_CONTIGUOUS(probs);
  PARROT_CHECK_CONTIGUOUS(scores);
  PARROT_CHECK_CONTIGUOUS(indices);
  for (const auto* grad : {&grad_probs, &grad_scores, &grad_lse}) {
    if (*grad) PARROT_CHECK_CONTIGUOUS(**grad);
  }
  Tensor grad_logits = torch::stable::new_empty(scores, {rows, experts});
  const float* grad_probs_data = grad_probs ? grad_probs->const_data_ptr<float>() : nullptr;
  const float* grad_scores_data = grad_scores ? grad_scores->const_data_ptr<float>() : nullptr;
  const float* grad_lse_data = grad_lse ? grad_lse->const_data_ptr<float>() : nullptr;
  const float* probs_data = probs.const_data_ptr<float>();
  const float* scores_data = scores.const_data_ptr<float>();
  const int64_t* indices_data = indices.const_data_ptr<int64_t>();
  float* out = grad_logits.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, rows, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = r * experts;
      const GradRow row{grad_probs_data ? grad_probs_data + at : nullptr,
                        grad_scores_data ? grad_scores_data + at : nullptr,
                        grad_lse_data ? grad_lse_data[r] : 0.0f,
                        probs_data + at,
                        scores_data + at,
                        indices_data + r * topk,
                        out + at};
      route_row_bwd(row, experts, topk, renormalize);
    }
  });
  return grad_logits;
}

}  // namespace
}  // namespace parrot

STABLE_TORCH_LIBRARY_FRAGMENT(parrot_ext, m) {
  m.def(
      "topk_routing_fwd(Tensor logits, int topk, bool renormalize) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "topk_routing_bwd(Tensor? grad_probs, Tensor? grad_scores, Tensor? grad_lse, Tensor probs, Tensor scores, "
      "Tensor topk_indices, bool renormalize) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(parrot_ext, CPU, m) {
  m.impl("topk_routing_fwd", TORCH_BOX(&parrot::fwd));
  m.impl("topk_routing_bwd", TORCH_BOX(&parrot::bwd));
}
