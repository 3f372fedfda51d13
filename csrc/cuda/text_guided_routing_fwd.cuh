// Forward pass of text_guided_routing in one launch: the block that brings the last rows of an image finishes it.
#pragma once

#include <math.h>

#include "text_guided_routing.cuh"

namespace parrot::cuda {

template <int kExpertTiles>
struct ForwardShared {
  union {
    ProjectShared<kExpertTiles> project;
    struct {
      float top[kWarps];
      float sums[kWarps][8 * kExpertTiles + 1];
    } attend;
  };
  unsigned finished;
};

// logits and lse of one image from the scores of its span, which is not empty.
template <int kExpertTiles>
__device__ __forceinline__ void attend(const RoutingInputs& in, const RoutingForward& out, int image,
                                       ForwardShared<kExpertTiles>& shared) {
  constexpr int kExperts = 8 * kExpertTiles;
  const int thread = threadIdx.x;
  const Span span = span_of(in, image);
  const float* scores = out.scores + static_cast<int64_t>(image) * in.rows;
  float top = -INFINITY;
  for (int64_t t = span.begin + thread; t < span.end; t += kThreads) top = fmaxf(top, scores[t]);
  top = block_reduce(top, shared.attend.top, Max());

  float sums[kExperts + 1] = {};  // of the weighted projections, and of the weights
#pragma unroll 2
  for (int64_t t = span.begin + thread; t < span.end; t += kThreads) {
    const float weight = expf(scores[t] - top);
    const float* projected = out.projected + t * in.experts;
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      if (e < in.experts) sums[e] = fmaf(weight, projected[e], sums[e]);
    }
    sums[kExperts] += weight;
  }
#pragma unroll
  for (int e = 0; e <= kExperts; ++e) {
    const float sum = warp_sum(sums[e]);
    if (thread % 32 == 0) shared.attend.sums[thread / 32][e] = sum;
  }
  __syncthreads();
  if (thread < in.experts) {
    float sum = 0.0f, total = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      sum += shared.attend.sums[w][thread];
      total += shared.attend.sums[w][kExperts];
    }
    out.logits[static_cast<int64_t>(image) * in.experts + thread] = sum / total;
    if (thread == 0) out.lse[image] = top + logf(total);
  }
  __syncthreads();  // the next image writes the same shared memory
}

template <typename T, int kExpertTiles>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T, kExpertTiles>)
    routing_fwd_kernel(const RoutingInputs in, const RoutingForward out) {
  auto& shared = device::shared_storage<ForwardShared<kExpertTiles>>();
  if (blockIdx.x == 0) {  // images without text, which no chunk of rows finishes
    for (int image = threadIdx.x; image < in.images; image += kThreads) {
      const Span span = span_of(in, image);
      if (span.begin < span.end) continue;
      for (int e = 0; e < in.experts; ++e) out.logits[static_cast<int64_t>(image) * in.experts + e] = 0.0f;
      out.lse[image] = -INFINITY;
    }
  }
  project_rows<T, kExpertTiles>(in, out.projected, out.scores, shared.project, [&](int64_t first, int64_t last) {
    finish_images(in, out.arrived, first, last, shared.finished,
                  [&](int image) { attend<kExpertTiles>(in, out, image, shared); });
  });
}

}  // namespace parrot::cuda
