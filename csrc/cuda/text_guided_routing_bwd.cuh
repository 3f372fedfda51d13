// Backward pass of text_guided_routing: one launch for the mean of each image, one for the coefficients of each
// (image, row), one for the three gradients. With a the attention, p the projected rows and g the incoming gradient:
//     grad_a[s, t]           = g[s] . p[t]
//     mean[s]                = sum over t of a[s, t] grad_a[s, t] - grad_lse[s]
//     d[s, t]                = scale * a[s, t] (grad_a[s, t] - mean[s])
//     grad_projected[t, e]   = sum over s of a[s, t] g[s, e]
//     grad_query[s]          = sum over t of d[s, t] text[t]
//     grad_text[t]           = sum over e of grad_projected[t, e] router_weight[e] + sum over s of d[s, t] query[s]
//     grad_router_weight[e]  = sum over t of grad_projected[t, e] text[t]
// Every sum has one owner and a fixed order, also where spans overlap.
#pragma once

#include <math.h>

#include "text_guided_routing.cuh"

namespace parrot::cuda {

template <int kExpertTiles>
struct MeanShared {
  union {
    ProjectShared<kExpertTiles> project;
    float scratch[2][kWarps];
  };
  unsigned finished;
};

constexpr int kCoefficientRows = 64;  // rows of a block, one a thread: few, so that a short text has many blocks

// A row's projection, held in registers.
template <int kExperts>
struct ProjectedRow {
  float values[kExperts];

  __device__ ProjectedRow(const RoutingInputs& in, const float* projected, int64_t row) {
#pragma unroll
    for (int e = 0; e < kExperts; ++e) values[e] = e < in.experts ? projected[row * in.experts + e] : 0.0f;
  }

  __device__ float dot(const float* grad_logits, int experts) const {
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      if (e < experts) sum = fmaf(grad_logits[e], values[e], sum);
    }
    return sum;
  }
};

// mean[s] of an image whose span is not empty. Divided by the sum of the weights, which rounding leaves a little off
// one: the d of a span add up to zero.
template <int kExpertTiles>
__device__ __forceinline__ void reduce_mean(const RoutingInputs& in, const RoutingBackward& out, int image,
                                            MeanShared<kExpertTiles>& shared) {
  const Span span = span_of(in, image);
  const float* scores = out.scores + static_cast<int64_t>(image) * in.rows;
  const float* grad_logits = out.grad_logits + static_cast<int64_t>(image) * in.experts;
  const float lse = out.lse[image];
  float weighted = 0.0f, total = 0.0f;
  for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kThreads) {
    const float weight = expf(scores[t] - lse);
    const ProjectedRow<8 * kExpertTiles> row(in, out.projected, t);
    weighted = fmaf(weight, row.dot(grad_logits, in.experts), weighted);
    total += weight;
  }
  weighted = block_reduce(weighted, shared.scratch[0], Add());
  total = block_reduce(total, shared.scratch[1], Add());
  if (threadIdx.x == 0) {
    out.means[image] = weighted / total - (out.grad_lse ? out.grad_lse[image] : 0.0f);
  }
  __syncthreads();  // the next image writes the same shared memory
}

// grad_projected of 32 rows, one a lane, and d in place of their scores.
template <int kExpertTiles>
__device__ __forceinline__ void reduce_images(const RoutingInputs& in, const RoutingBackward& out, int64_t first) {
  constexpr int kExperts = 8 * kExpertTiles;
  const int64_t row = first + threadIdx.x % 32;
  const bool exists = row < in.rows;
  const ProjectedRow<kExperts> projected(in, out.projected, exists ? row : in.rows - 1);
  float sums[kExperts] = {};
  for (int base = 0; base < in.images; base += 32) {
    for (unsigned mask = images_that_meet(in, base, first, first + 32); mask; mask &= mask - 1) {
      const int image = base + __ffs(mask) - 1;
      if (!exists || !span_of(in, image).contains(row)) continue;
      const float* grad_logits = out.grad_logits + static_cast<int64_t>(image) * in.experts;
      float* score = out.scores + static_cast<int64_t>(image) * in.rows + row;
      const float weight = expf(*score - out.lse[image]);
      *score = in.scale * weight * (projected.dot(grad_logits, in.experts) - out.means[image]);
#pragma unroll
      for (int e = 0; e < kExperts; ++e) {
        if (e < in.experts) sums[e] = fmaf(weight, grad_logits[e], sums[e]);
      }
    }
  }
  if (!exists) return;
#pragma unroll
  for (int e = 0; e < kExperts; ++e) {
    if (e < in.experts) out.grad_projected[row * in.experts + e] = sums[e];
  }
}

template <typename T, int kExpertTiles>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T, kExpertTiles>)
    routing_bwd_means_kernel(const RoutingInputs in, const RoutingBackward out) {
  auto& shared = device::shared_storage<MeanShared<kExpertTiles>>();
  project_rows<T, kExpertTiles>(in, out.projected, out.scores, shared.project, [&](int64_t first, int64_t last) {
    finish_images(in, out.arrived, first, last, shared.finished,
                  [&](int image) { reduce_mean<kExpertTiles>(in, out, image, shared); });
  });
}

template <int kExpertTiles>
__global__ void __launch_bounds__(kCoefficientRows)
    routing_bwd_coefficients_kernel(const RoutingInputs in, const RoutingBackward out) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kCoefficientRows + threadIdx.x / 32 * 32;
  if (first < in.rows) reduce_images<kExpertTiles>(in, out, first);
}

constexpr int kSliceVectors = 4;  // 16-byte vectors of a slice of H, one a thread of a quad
constexpr int kExpertGroup = 8;   // rows of the router's gradient that a block forms together
constexpr int kTextRows = 8;      // rows of the text's gradient that a block forms together

// How many blocks form each gradient, in this order: the longest-running first.
struct GradientBlocks {
  int64_t router_weight, query, text;
};

template <typename T>
struct GradientShared {
  union {
    float slices[kWarps][kExpertGroup][kSliceVectors * kVector<T>];
    float coefficients[kMaxExperts][kTextRows];
  };
};

// out[c, slice] = sum over rows [begin, end) of coefficient(row, c) * text[row, slice] for c < count <= kCount.
template <typename T, int kCount, typename Coefficient>
__device__ __forceinline__ void sum_rows(const RoutingInputs& in, T* out, int count, int64_t begin, int64_t end,
                                         int slice, Coefficient coefficient, GradientShared<T>& shared) {
  constexpr int kWidth = kSliceVectors * kVector<T>;
  const int quad = threadIdx.x % kSliceVectors, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int h = slice * kWidth + quad * kVector<T>;
  float sums[kCount][kVector<T>] = {};
#pragma unroll 4
  for (int64_t t = begin + threadIdx.x / kSliceVectors; t < end; t += kThreads / kSliceVectors) {
    float text[kVector<T>];
    load_vector(static_cast<const T*>(in.text) + t * in.hidden + h, h < in.hidden, text);
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const float factor = c < count ? coefficient(t, c) : 0.0f;
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) sums[c][i] = fmaf(factor, text[i], sums[c][i]);
    }
  }
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      float sum = sums[c][i];
#pragma unroll
      for (int width = kSliceVectors; width < 32; width *= 2) sum += __shfl_xor_sync(kFullWarp, sum, width);
      if (lane < kSliceVectors) shared.slices[warp][c][quad * kVector<T> + i] = sum;
    }
  }
  __syncthreads();
  const int c = threadIdx.x / kWidth, column = threadIdx.x % kWidth;
  if (c < count && slice * kWidth + column < in.hidden) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += shared.slices[w][c][column];
    store(out + static_cast<int64_t>(c) * in.hidden + slice * kWidth + column, sum);
  }
}

// grad_text of kTextRows rows.
template <typename T>
__device__ __forceinline__ void grad_text_rows(const RoutingInputs& in, const RoutingBackward& out, int64_t first,
                                               GradientShared<T>& shared) {
  const int count = static_cast<int>(in.rows - first < kTextRows ? in.rows - first : kTextRows);
  for (int i = threadIdx.x; i < in.experts * kTextRows; i += kThreads) {
    const int row = i % kTextRows, expert = i / kTextRows;
    const bool exists = row < count;
    shared.coefficients[expert][row] = exists ? out.grad_projected[(first + row) * in.experts + expert] : 0.0f;
  }
  __syncthreads();
  for (int start = 0; start < in.hidden; start += kThreads * kVector<T>) {  // the same for all: warps vote inside
    const int h = start + static_cast<int>(threadIdx.x) * kVector<T>;
    float sums[kTextRows][kVector<T>] = {};
    const auto add = [&](const T* vector, auto coefficient) {
      float values[kVector<T>];
      load_vector(vector + h, h < in.hidden, values);
#pragma unroll
      for (int r = 0; r < kTextRows; ++r) {
        const float factor = coefficient(r);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) sums[r][i] = fmaf(factor, values[i], sums[r][i]);
      }
    };
    for (int e = 0; e < in.experts; ++e) {
      add(static_cast<const T*>(in.router_weight) + static_cast<int64_t>(e) * in.hidden,
          [&](int r) { return shared.coefficients[e][r]; });
    }
    for (int base = 0; base < in.images; base += 32) {
      for (unsigned mask = images_that_meet(in, base, first, first + count); mask; mask &= mask - 1) {
        const int image = base + __ffs(mask) - 1;
        const Span span = span_of(in, image);
        const float* d = out.scores + static_cast<int64_t>(image) * in.rows + first;
        add(static_cast<const T*>(in.query) + image * in.query_stride,
            [&](int r) { return span.contains(first + r) ? d[r] : 0.0f; });
      }
    }
#pragma unroll
    for (int r = 0; r < kTextRows; ++r) {
      if (r < count && h < in.hidden) {
        store_vector(static_cast<T*>(out.grad_text) + (first + r) * in.hidden + h, sums[r]);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    routing_bwd_gradients_kernel(const RoutingInputs in, const RoutingBackward out, const GradientBlocks blocks) {
  auto& shared = device::shared_storage<GradientShared<T>>();
  constexpr int kWidth = kSliceVectors * kVector<T>;
  const int slices = (in.hidden + kWidth - 1) / kWidth;
  int64_t block = blockIdx.x;
  if (block < blocks.router_weight) {
    const int first = static_cast<int>(block / slices) * kExpertGroup, left = in.experts - first;
    T* grad = static_cast<T*>(out.grad_router_weight) + static_cast<int64_t>(first) * in.hidden;
    const auto coefficient = [&](int64_t t, int c) { return out.grad_projected[t * in.experts + first + c]; };
    sum_rows<T, kExpertGroup>(in, grad, left < kExpertGroup ? left : kExpertGroup, 0, in.rows,
                              static_cast<int>(block % slices), coefficient, shared);
    return;
  }
  block -= blocks.router_weight;
  if (block < blocks.query) {
    const int64_t image = block / slices;
    const Span span = span_of(in, static_cast<int>(image));
    const float* d = out.scores + image * in.rows;
    sum_rows<T, 1>(
        in, static_cast<T*>(out.grad_query) + image * in.hidden, 1, span.begin, span.end,
        static_cast<int>(block % slices), [&](int64_t t, int) { return d[t]; }, shared);
    return;
  }
  grad_text_rows<T>(in, out, (block - blocks.query) * kTextRows, shared);
}

}  // namespace parrot::cuda
