// Backward pass of topk_routing in one launch, a warp for each row. The scores are computed again from the logits.
#pragma once

#include "topk_routing.cuh"

namespace parrot::cuda {

constexpr int kGradientThreads = 256;

// Gradients of values from those of values / (their sum + epsilon), in place; only where `taken`.
template <int kPlaces, typename Taken>
__device__ __forceinline__ void through_division(float (&grads)[kPlaces], const float (&values)[kPlaces], Taken taken) {
  float total = 0.0f, product = 0.0f;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    if (taken(i)) total += values[i];
  }
  total = warp_sum(total) + kEpsilon;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    if (taken(i)) product = fmaf(values[i] / total, grads[i], product);
  }
  product = warp_sum(product);
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    if (taken(i)) grads[i] = (grads[i] - product) / total;
  }
}

// The gradient of a row's scores.
template <typename T, int kPlaces>
__device__ __forceinline__ void score_gradients(const TopKInputs& in, const TopKBackward& out, int64_t row,
                                                const Experts<kPlaces>& experts, const RowScores<T, kPlaces>& scores,
                                                float (&grads)[kPlaces]) {
  const int64_t start = row * in.experts;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    grads[i] = out.grad_scores && experts.exists(i) ? out.grad_scores[start + experts.at(i)] : 0.0f;
  }
  if (out.grad_probs) {
    // The index tells what was chosen: a chosen probability may itself have underflowed to zero.
    uint32_t chosen = 0;
    for (int k = 0; k < in.topk; ++k) {
      const int expert = static_cast<int>(out.topk_indices[row * in.topk + k]);
      if (expert % 32 == experts.lane) chosen |= 1u << expert / 32;
    }
    const auto taken = [&](int i) { return (chosen >> i & 1) != 0; };
    float own[kPlaces];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      own[i] = taken(i) ? out.grad_probs[start + experts.at(i)] * in.scaling_factor : 0.0f;
    }
    if (in.renormalize) through_division(own, scores.scores, taken);
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) grads[i] += own[i];
  }
  if (out.grad_score_sums) {
    float own[kPlaces];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) own[i] = experts.exists(i) ? out.grad_score_sums[experts.at(i)] : 0.0f;
    if (in.sigmoid) through_division(own, scores.scores, [&](int i) { return experts.exists(i); });
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) grads[i] += own[i];
  }
}

template <typename T, int kPlaces>
__global__ void __launch_bounds__(kGradientThreads)
    topk_routing_bwd_kernel(const TopKInputs in, const TopKBackward out) {
  constexpr int kRows = kGradientThreads / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / 32;
  if (row >= in.rows) return;
  const Experts<kPlaces> experts(in.experts);
  const RowScores<T, kPlaces> scores(experts, static_cast<const T*>(in.logits) + row * in.experts, in.sigmoid);
  float grads[kPlaces];
  score_gradients(in, out, row, experts, scores, grads);
  float mean = 0.0f;  // of the softmax
  if (!in.sigmoid) {
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) mean = fmaf(scores.scores[i], grads[i], mean);
    mean = warp_sum(mean);
  }
  const bool has_lse = out.grad_lse || out.grad_z_sum;
  float grad_lse = out.grad_lse ? out.grad_lse[row] : 0.0f;
  if (out.grad_z_sum) grad_lse += 2.0f * scores.lse * out.grad_z_sum[0];
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    if (!experts.exists(i)) continue;
    const float score = scores.scores[i];
    float grad = in.sigmoid ? score * (1.0f - score) * grads[i] : score * (grads[i] - mean);
    if (has_lse) grad = fmaf(grad_lse, scores.softmax(i), grad);
    store(static_cast<T*>(out.grad_logits) + row * in.experts + experts.at(i), grad);
  }
}

}  // namespace parrot::cuda
