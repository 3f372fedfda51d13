// Scores, top-k selection, statistics and the dispatch plan of n rows over E experts, float32.
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

// Keeps sums of scores that all underflowed from dividing by zero.
constexpr float kEpsilon = 1e-20f;

struct Options {
  int64_t experts, topk, groups, topk_groups;
  bool renormalize, sigmoid;
  float scaling;
  const float* bias;  // may be null
};

struct Row {
  const float* logits;
  float* probs;  // all zero
  float* scores;
  float* lse;
  int64_t* chosen;
};

// What a row needs room for; one for each task.
struct Scratch {
  std::vector<int64_t> order, group_order;
  std::vector<float> keys, values, group_values;

  explicit Scratch(const Options& o)
      : group_order(static_cast<size_t>(o.groups)),
        keys(static_cast<size_t>(o.experts)),
        group_values(static_cast<size_t>(o.groups)) {}
};

// The order of a selection: falling, of equal values the smaller index first. A NaN counts as the largest, as in
// torch.sort, so that the order stays a strict one.
struct Before {
  const float* values;
  bool operator()(int64_t a, int64_t b) const {
    const float x = values[a], y = values[b];
    const bool x_nan = std::isnan(x), y_nan = std::isnan(y);
    if (x_nan || y_nan) return x_nan && y_nan ? a < b : x_nan;
    return x != y ? x > y : a < b;
  }
};

// Writes softmax or sigmoid of a row; returns its log-sum-exp.
float score_row(const float* logits, bool sigmoid, int64_t experts, float* scores) {
  const float top = *std::max_element(logits, logits + experts);
  float total = 0.0f;
  for (int64_t e = 0; e < experts; ++e) total += scores[e] = std::exp(logits[e] - top);
  for (int64_t e = 0; e < experts; ++e) scores[e] = sigmoid ? 1.0f / (1.0f + std::exp(-logits[e])) : scores[e] / total;
  return top + std::log(total);
}

// Leaves in scratch.order the experts of the best groups, by what each group's best experts sum to.
void keep_best_groups(const float* values, const Options& o, Scratch& scratch) {
  const int64_t size = o.experts / o.groups, best = std::max<int64_t>(1, o.topk / o.topk_groups);
  for (int64_t g = 0; g < o.groups; ++g) {
    scratch.values.assign(values + g * size, values + (g + 1) * size);
    std::partial_sort(scratch.values.begin(), scratch.values.begin() + best, scratch.values.end(),
                      [](float a, float b) { return std::isnan(a) ? !std::isnan(b) : a > b; });
    scratch.group_values[g] = std::accumulate(scratch.values.begin(), scratch.values.begin() + best, 0.0f);
  }
  auto& groups = scratch.group_order;
  std::iota(groups.begin(), groups.end(), int64_t{0});
  std::partial_sort(groups.begin(), groups.begin() + o.topk_groups, groups.end(), Before{scratch.group_values.data()});
  scratch.order.clear();
  for (int64_t i = 0; i < o.topk_groups; ++i) {
    for (int64_t e = 0; e < size; ++e) scratch.order.push_back(groups[i] * size + e);
  }
}

void route_row(const Row& row, const Options& o, Scratch& scratch) {
  *row.lse = score_row(row.logits, o.sigmoid, o.experts, row.scores);
  // By logit where there is no bias, not by score: distinct logits may have equal scores.
  const float* keys = row.logits;
  if (o.bias) {
    for (int64_t e = 0; e < o.experts; ++e) scratch.keys[e] = row.scores[e] + o.bias[e];
    keys = scratch.keys.data();
  }
  auto& order = scratch.order;
  if (o.groups > 1) {
    keep_best_groups(o.bias || (!o.sigmoid && o.renormalize) ? keys : row.scores, o, scratch);
  } else {
    order.resize(static_cast<size_t>(o.experts));
    std::iota(order.begin(), order.end(), int64_t{0});
  }
  std::partial_sort(order.begin(), order.begin() + o.topk, order.end(), Before{keys});

  float total = 1.0f;
  if (o.renormalize) {
    total = kEpsilon;
    for (int64_t k = 0; k < o.topk; ++k) total += row.scores[order[k]];
  }
  for (int64_t k = 0; k < o.topk; ++k) {
    row.chosen[k] = order[k];
    row.probs[order[k]] = row.scores[order[k]] / total * o.scaling;
  }
}

// Sums over the rows, in double: of each expert's scores (under sigmoid of its share of the row), and of lse squared.
void sum_statistics(const float* scores, const float* lse, int64_t rows, const Options& o, float* score_sums,
                    float* z_sum) {
  std::vector<double> sums(static_cast<size_t>(o.experts), 0.0);
  double z = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = scores + r * o.experts;
    const double total = o.sigmoid ? std::accumulate(row, row + o.experts, kEpsilon) : 1.0;
    for (int64_t e = 0; e < o.experts; ++e) sums[e] += row[e] / total;
    z += static_cast<double>(lse[r]) * lse[r];
  }
  std::copy(sums.begin(), sums.end(), score_sums);
  *z_sum = static_cast<float>(z);
}

// A counting sort by expert; it is stable, so positions rise within an expert.
void make_plan(const int64_t* chosen, int64_t size, int64_t experts, int32_t* counts, int32_t* offsets, int64_t* plan) {
  for (int64_t i = 0; i < size; ++i) ++counts[chosen[i]];
  offsets[0] = 0;
  std::partial_sum(counts, counts + experts, offsets + 1);
  std::vector<int32_t> next(offsets, offsets + experts);
  for (int64_t i = 0; i < size; ++i) plan[next[chosen[i]]++] = i;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fwd(
    const Tensor& logits, int64_t topk, bool renormalize, bool sigmoid, double scaling, int64_t groups,
    int64_t topk_groups, const std::optional<Tensor>& bias) {
  PARROT_CHECK_SHAPE(logits, -1, -1);
  PARROT_CHECK_DTYPE(logits, Float);
  PARROT_CHECK_CPU(logits);
  PARROT_CHECK_CONTIGUOUS(logits);
  const int64_t rows = logits.size(0), experts = logits.size(1);
  STD_TORCH_CHECK(groups >= 1 && experts % groups == 0, "num_groups must divide num_experts=", experts, ", got ",
                  groups);
  STD_TORCH_CHECK(1 <= topk_groups && topk_groups <= groups, "topk_groups must be in [1, num_groups=", groups,
                  "], got ", topk_groups);
  const int64_t allowed = experts / groups * topk_groups;
  STD_TORCH_CHECK(1 <= topk && topk <= allowed, "topk must be in [1, num_experts=", allowed, "], got ", topk);
  if (bias) {
    PARROT_CHECK_SHAPE(*bias, experts);
    PARROT_CHECK_DTYPE(*bias, Float);
    PARROT_CHECK_CPU(*bias);
    PARROT_CHECK_CONTIGUOUS(*bias);
  }
  const Options options{experts,
                        topk,
                        groups,
                        topk_groups,
                        renormalize,
                        sigmoid,
                        static_cast<float>(scaling),
                        bias ? bias->const_data_ptr<float>() : nullptr};
  Tensor probs = torch::stable::new_zeros(logits, {rows, experts});
  Tensor scores = torch::stable::new_empty(logits, {rows, experts});
  Tensor lse = torch::stable::new_empty(logits, {rows});
  Tensor score_sums = torch::stable::new_empty(logits, {experts});
  Tensor z_sum = torch::stable::new_empty(logits, {});
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
    Scratch scratch(options);
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = r * experts;
      route_row({logits_data + at, probs_data + at, scores_data + at, lse_data + r, indices_data + r * topk}, options,
                scratch);
    }
  });
  sum_statistics(scores_data, lse_data, rows, options, score_sums.mutable_data_ptr<float>(),
                 z_sum.mutable_data_ptr<float>());
  make_plan(indices_data, rows * topk, experts, counts.mutable_data_ptr<int32_t>(), offsets.mutable_data_ptr<int32_t>(),
            plan.mutable_data_ptr<int64_t>());
  return {probs, scores, lse, score_sums, z_sum, indices, counts, offsets, plan};
}

struct GradRow {
  const float* grad_probs;       // null: zeros
  const float* grad_scores;      // null: zeros
  const float* grad_score_sums;  // null: zeros
  float grad_lse, grad_z_sum;
  const float* logits;
  const int64_t* chosen;
  float* scores;  // scratch
  float* grad_logits;
};

void route_row_bwd(const GradRow& row, const Options& o) {
  const float lse = score_row(row.logits, o.sigmoid, o.experts, row.scores);
  float* grad = row.grad_logits;
  if (row.grad_scores) {
    std::copy(row.grad_scores, row.grad_scores + o.experts, grad);
  } else {
    std::fill(grad, grad + o.experts, 0.0f);
  }
  if (row.grad_probs) {
    float total = 1.0f, mean = 0.0f;
    if (o.renormalize) {
      total = kEpsilon;
      for (int64_t k = 0; k < o.topk; ++k) {
        total += row.scores[row.chosen[k]];
        mean += row.scores[row.chosen[k]] * row.grad_probs[row.chosen[k]];
      }
      mean /= total;
    }
    for (int64_t k = 0; k < o.topk; ++k) {
      grad[row.chosen[k]] += (row.grad_probs[row.chosen[k]] - mean) / total * o.scaling;
    }
  }
  if (row.grad_score_sums) {
    float total = 1.0f, mean = 0.0f;
    if (o.sigmoid) {
      total = std::accumulate(row.scores, row.scores + o.experts, kEpsilon);
      mean = std::inner_product(row.scores, row.scores + o.experts, row.grad_score_sums, 0.0f) / total;
    }
    for (int64_t e = 0; e < o.experts; ++e) grad[e] += (row.grad_score_sums[e] - mean) / total;
  }
  const float grad_lse = row.grad_lse + 2.0f * lse * row.grad_z_sum;
  if (o.sigmoid) {
    for (int64_t e = 0; e < o.experts; ++e) {
      grad[e] = row.scores[e] * (1.0f - row.scores[e]) * grad[e];
      if (grad_lse != 0.0f) grad[e] += grad_lse * std::exp(row.logits[e] - lse);
    }
  } else {
    const float sum = std::inner_product(row.scores, row.scores + o.experts, grad, 0.0f);
    for (int64_t e = 0; e < o.experts; ++e) grad[e] = row.scores[e] * (grad[e] - sum + grad_lse);
  }
}

Tensor bwd(const std::optional<Tensor>& grad_probs, const std::optional<Tensor>& grad_scores,
           const std::optional<Tensor>& grad_lse, const std::optional<Tensor>& grad_score_sums,
           const std::optional<Tensor>& grad_z_sum, const Tensor& logits, const Tensor& indices, bool renormalize,
           bool sigmoid, double scaling) {
  PARROT_CHECK_SHAPE(logits, -1, -1);
  const int64_t rows = logits.size(0), experts = logits.size(1), topk = indices.size(1);
  PARROT_CHECK_SHAPE(indices, rows, topk);
  PARROT_CHECK_DTYPE(logits, Float);
  PARROT_CHECK_CONTIGUOUS(logits);
  PARROT_CHECK_CONTIGUOUS(indices);
  for (const auto* grad : {&grad_probs, &grad_scores, &grad_lse, &grad_score_sums, &grad_z_sum}) {
    if (*grad) PARROT_CHECK_CONTIGUOUS(**grad);
  }
  const Options options{experts, topk, 1, 1, renormalize, sigmoid, static_cast<float>(scaling), nullptr};
  Tensor grad_logits = torch::stable::new_empty(logits, {rows, experts});
  const auto data = [](const std::optional<Tensor>& grad) { return grad ? grad->const_data_ptr<float>() : nullptr; };
  const float *grad_probs_data = data(grad_probs), *grad_scores_data = data(grad_scores);
  const float *grad_lse_data = data(grad_lse), *grad_score_sums_data = data(grad_score_sums);
  const float grad_z = grad_z_sum ? *data(grad_z_sum) : 0.0f;
  const float* logits_data = logits.const_data_ptr<float>();
  const int64_t* indices_data = indices.const_data_ptr<int64_t>();
  float* out = grad_logits.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, rows, kGrain, [&](int64_t first, int64_t last) {
    std::vector<float> scores(static_cast<size_t>(experts));
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = r * experts;
      const GradRow row{grad_probs_data ? grad_probs_data + at : nullptr,
                        grad_scores_data ? grad_scores_data + at : nullptr,
                        grad_score_sums_data,
                        grad_lse_data ? grad_lse_data[r] : 0.0f,
                        grad_z,
                        logits_data + at,
                        indices_data + r * topk,
                        scores.data(),
                        out + at};
      route_row_bwd(row, options);
    }
  });
  return grad_logits;
}

}  // namespace
}  // namespace parrot

STABLE_TORCH_LIBRARY_FRAGMENT(parrot_ext, m) {
  m.def(
      "topk_routing_fwd(Tensor logits, int topk, bool renormalize, bool sigmoid, float scaling, int groups, "
      "int topk_groups, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "topk_routing_bwd(Tensor? grad_probs, Tensor? grad_scores, Tensor? grad_lse, Tensor? grad_score_sums, "
      "Tensor? grad_z_sum, Tensor logits, Tensor topk_indices, bool renormalize, bool sigmoid, float scaling) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(parrot_ext, CPU, m) {
  m.impl("topk_routing_fwd", TORCH_BOX(&parrot::fwd));
  m.impl("topk_routing_bwd", TORCH_BOX(&parrot::bwd));
}
