// What the forward and the backward pass of text_guided_routing share: spans, and the products of every text row with
// the router and with the queries that look at it. S images, T text rows, H hidden_size, E experts.
#pragma once

#include "device.cuh"
#include "text_guided_routing.h"

namespace parrot::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 16;      // text rows that a block takes at a time: the height of a tensor-core product
constexpr int kImageSlots = 8;  // images that one pass over a chunk serves: the width of a tensor-core product
constexpr int kMostParts = 4;   // blocks of a cluster that share the columns of a chunk

// Blocks of a multiprocessor: two where the sums fit half of its registers.
template <typename T, int kExpertTiles>
constexpr int kBlocksAtOnce = sizeof(T) == 2 && kExpertTiles == 1 ? 2 : 1;

// Text rows [begin, end) of an image.
struct Span {
  int64_t begin, end;

  __device__ bool contains(int64_t row) const { return begin <= row && row < end; }
  __device__ bool meets(int64_t first, int64_t last) const {
    return (begin > first ? begin : first) < (end < last ? end : last);
  }
};

// Cut to the rows that exist: no value of a span may lead to an access outside of the text.
__device__ __forceinline__ Span span_of(const RoutingInputs& in, int image) {
  Span span;
  if (in.wide_spans) {
    span.begin = static_cast<const int64_t*>(in.text_start)[image];
    span.end = static_cast<const int64_t*>(in.text_end)[image];
  } else {
    span.begin = static_cast<const int32_t*>(in.text_start)[image];
    span.end = static_cast<const int32_t*>(in.text_end)[image];
  }
  if (span.begin < 0) span.begin = 0;
  if (span.end > in.rows) span.end = in.rows;
  return span;
}

// Bit i: image first_image + i looks at rows [first, last). The whole warp calls it and gets the same answer.
__device__ __forceinline__ unsigned images_that_meet(const RoutingInputs& in, int first_image, int64_t first,
                                                     int64_t last) {
  const int image = first_image + static_cast<int>(threadIdx.x % 32);
  return __ballot_sync(kFullWarp, image < in.images && span_of(in, image).meets(first, last));
}

// The next images from `cursor` on that look at rows [first, last): lane i gets the i-th, or -1. At most kImageSlots
// are taken; `cursor` moves to the first one left, or to S. The whole warp calls it.
__device__ __forceinline__ int next_images(const RoutingInputs& in, int64_t first, int64_t last, int& cursor) {
  const int lane = threadIdx.x % 32;
  int mine = -1, found = 0;
  while (cursor < in.images) {
    unsigned mask = images_that_meet(in, cursor, first, last);
    for (; mask && found < kImageSlots; ++found, mask &= mask - 1) {
      if (lane == found) mine = cursor + __ffs(mask) - 1;
    }
    if (mask) {
      cursor += __ffs(mask) - 1;
      return mine;
    }
    cursor += 32;
  }
  return mine;
}

__device__ __forceinline__ void mma(float (&c)[4], const uint4& low, const uint4& high, const uint4& b,
                                    const BFloat16*) {
  device::mma_bfloat16(c, low.x, high.x, low.y, high.y, b.x, b.y);
  device::mma_bfloat16(c, low.z, high.z, low.w, high.w, b.z, b.w);
}

__device__ __forceinline__ void mma(float (&c)[4], const uint4& low, const uint4& high, const uint4& b,
                                    const Float16*) {
  device::mma_float16(c, low.x, high.x, low.y, high.y, b.x, b.y);
  device::mma_float16(c, low.z, high.z, low.w, high.w, b.z, b.w);
}

// A share, along H, of the products of kChunk text rows with 8 * kTiles columns, into partial[row][column]: that of the
// warp with the number `warp` among `warps`.
// columns[j] is the start of column 8 j + lane / 4, or null for zeros; rows from `count` on are zeros.
// A product over H may be taken in any order: each thread reads 16 bytes in a row, and both operands name these eight
// elements of H the same way, so that no shared memory is needed to form the fragments.
template <typename T, int kTiles>
__device__ __forceinline__ void dot_rows(const T* text, int count, int hidden, const T* const (&columns)[kTiles],
                                         int warp, int warps, float (*partial)[8 * kTiles]) {
  const int lane = threadIdx.x % 32;
  const int row = lane / 4, quad = lane % 4;
  const T* low_row = text + static_cast<int64_t>(row) * hidden;
  const T* high_row = low_row + static_cast<int64_t>(8) * hidden;
  const uint4 zeros{0, 0, 0, 0};
  float sums[kTiles][4] = {};
#pragma unroll 2
  for (int start = warp * 64; start < hidden; start += warps * 64) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int h = start + half * 32 + quad * 8;
      const bool inside = h < hidden;
      const uint4 low = inside && row < count ? device::load_streaming(low_row + h) : zeros;
      const uint4 high = inside && row + 8 < count ? device::load_streaming(high_row + h) : zeros;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint4 b = inside && columns[j] ? *reinterpret_cast<const uint4*>(columns[j] + h) : zeros;
        mma(sums[j], low, high, b, text);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[row + 8 * (i / 2)][8 * j + 2 * quad + i % 2] = sums[j][i];
  }
}

// float32 stays off the tensor cores, which would round it: four rows and eight columns at a time in registers.
template <int kTiles>
__device__ __forceinline__ void dot_rows(const float* text, int count, int hidden,
                                         const float* const (&columns)[kTiles], int warp, int warps,
                                         float (*partial)[8 * kTiles]) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = 0; first < kChunk; first += 4) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float* column[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const auto address = reinterpret_cast<unsigned long long>(columns[j]);
        column[n] = reinterpret_cast<const float*>(__shfl_sync(kFullWarp, address, 4 * n));
      }
      float sums[32] = {};
#pragma unroll 1
      for (int h = warp * 128 + lane * 4; h < hidden; h += warps * 128) {
        float a[4][4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          load_vector(text + static_cast<int64_t>(first + r) * hidden + h, first + r < count, a[r]);
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          float b[4];
          load_vector(column[n] + h, column[n] != nullptr, b);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[8 * r + n] = fmaf(a[r][i], b[i], sums[8 * r + n]);
          }
        }
      }
      partial[first + lane / 8][8 * j + lane % 8] = warp_sum_transposed(sums);
    }
  }
}

template <int kExpertTiles>
struct ProjectShared {
  float partial[kWarps][kChunk][8 * (kExpertTiles + 1)];
  float sums[kChunk][8 * (kExpertTiles + 1)];  // of the warps of this block; the cluster reads them
};

// Counts that this block's part of the rows [first, last) of a chunk is done, and calls finish(image) in this block for
// each image whose last part of a chunk this was. No block ever waits for another: they may run in any order, and one
// at a time. The whole block calls it; `finished` is shared and lies apart from what `finish` uses.
template <typename Finish>
__device__ __forceinline__ void finish_images(const RoutingInputs& in, int32_t* arrived, int64_t first, int64_t last,
                                              unsigned& finished, Finish finish) {
  __threadfence();
  __syncthreads();
  for (int base = 0; base < in.images; base += 32) {
    const unsigned meeting = images_that_meet(in, base, first, last);
    if (meeting == 0) continue;  // the same for all warps
    if (threadIdx.x < 32) {
      const int image = base + static_cast<int>(threadIdx.x);
      bool complete = false;
      if (meeting >> threadIdx.x & 1) {
        const Span span = span_of(in, image);
        const int64_t chunks = (span.end - 1) / kChunk - span.begin / kChunk + 1;
        complete = device::arrive(arrived + image) == chunks * device::cluster_size() - 1;
        if (complete) arrived[image] = 0;
      }
      const unsigned mask = __ballot_sync(kFullWarp, complete);
      if (threadIdx.x == 0) finished = mask;
    }
    __syncthreads();
    __threadfence();
    for (unsigned mask = finished; mask; mask &= mask - 1) finish(base + __ffs(mask) - 1);
    __syncthreads();  // before `finished` is written again
  }
}

// Adds up partial[warp] of all warps of the cluster in a fixed order, and calls store(row, column, sum) for the share
// of this block; whole warps call it. All blocks of the cluster call this, and may write their shared memory
// afterwards.
template <int kExpertTiles, typename Store>
__device__ __forceinline__ void reduce_cluster(ProjectShared<kExpertTiles>& shared, Store store) {
  constexpr int kColumns = 8 * (kExpertTiles + 1), kSums = kChunk * kColumns;
  __syncthreads();
  for (int i = threadIdx.x; i < kSums; i += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.partial[w][i / kColumns][i % kColumns];
    shared.sums[i / kColumns][i % kColumns] = sum;
  }
  device::cluster_sync();
  const int parts = device::cluster_size(), share = kSums / parts, first = device::cluster_rank() * share;
  static_assert(kSums / kMostParts % 32 == 0, "a share is whole warps");
  for (int i = first + static_cast<int>(threadIdx.x); i < first + share; i += kThreads) {
    const int row = i / kColumns, column = i % kColumns;
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < kMostParts; ++part) {
      if (part < parts) sum += *device::in_block(&shared.sums[row][column], part);
    }
    store(row, column, sum);
  }
  device::cluster_sync();
}

// projected[t, e] = text[t] . router_weight[e], and scores[s, t] = scale * text[t] . query[s] for the rows of each span
// (the rest of `scores` is not written). Clusters take chunks of rows in turn, and their blocks parts of H; of a chunk
// that at most kImageSlots images look at, each text row is read once. After each chunk the whole block calls
// done(first row, last row + 1).
template <typename T, int kExpertTiles, typename Done>
__device__ __forceinline__ void project_rows(const RoutingInputs& in, float* projected, float* scores,
                                             ProjectShared<kExpertTiles>& shared, Done done) {
  constexpr int kTiles = kExpertTiles + 1;
  const int parts = device::cluster_size(), warp = threadIdx.x / 32, n = threadIdx.x % 32 / 4;
  const int64_t step = static_cast<int64_t>(gridDim.x) / parts * kChunk;
  const T* text = static_cast<const T*>(in.text);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) / parts * kChunk; first < in.rows; first += step) {
    const int count = static_cast<int>(in.rows - first < kChunk ? in.rows - first : kChunk);
    int cursor = 0;
    bool first_pass = true;
    do {
      const int slot_image = next_images(in, first, first + count, cursor);
      const T* columns[kTiles];
#pragma unroll
      for (int j = 0; j < kExpertTiles; ++j) {
        const int expert = 8 * j + n;
        const bool wanted = first_pass && expert < in.experts;
        columns[j] =
            wanted ? static_cast<const T*>(in.router_weight) + static_cast<int64_t>(expert) * in.hidden : nullptr;
      }
      const int own_image = __shfl_sync(kFullWarp, slot_image, n);
      columns[kExpertTiles] = own_image < 0 ? nullptr : static_cast<const T*>(in.query) + own_image * in.query_stride;
      dot_rows(text + first * in.hidden, count, in.hidden, columns, device::cluster_rank() * kWarps + warp,
               parts * kWarps, shared.partial[warp]);
      reduce_cluster<kExpertTiles>(shared, [&](int row, int column, float sum) {
        const int slot = column - 8 * kExpertTiles;
        const int image = __shfl_sync(kFullWarp, slot_image, slot < 0 ? 0 : slot);
        if (row >= count) return;
        if (slot < 0) {
          if (first_pass && column < in.experts) projected[(first + row) * in.experts + column] = sum;
        } else if (image >= 0 && span_of(in, image).contains(first + row)) {
          scores[static_cast<int64_t>(image) * in.rows + first + row] = in.scale * sum;
        }
      });
      first_pass = false;
    } while (cursor < in.images);
    done(first, first + count);
  }
}

// `operation` over the block's values, given to all threads. `scratch` has kWarps floats; callers sync before reuse.
template <typename Operation>
__device__ __forceinline__ float block_reduce(float value, float* scratch, Operation operation) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) value = operation(value, __shfl_xor_sync(kFullWarp, value, width));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) value = operation(value, scratch[w]);
  return value;
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

}  // namespace parrot::cuda
