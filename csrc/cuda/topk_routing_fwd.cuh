// Forward pass of topk_routing: a warp routes a row, a block a tile of kTileRows rows. Up to kTileRows rows take one
// launch. More take three: tiles; sums and prefixes over the tiles, expert by expert; the plan. The plan is a counting
// sort. A row chooses an expert at most once, so the rank of a choice is the number of earlier rows that chose the same
// expert: bits of a mask for each 32 rows and expert. No sum depends on the order in which blocks or warps run.
#pragma once

#include "topk_routing.cuh"

namespace parrot::cuda {

constexpr int kRouteThreads = 512;
constexpr int kRouteWarps = kRouteThreads / 32;
constexpr int kTileWords = kTileRows / 32;

template <int kPlaces>
struct RouteShared {
  static constexpr int kExperts = 32 * kPlaces;
  uint32_t masks[kTileWords][kExperts];  // bit r % 32 of word r / 32: row r chose the expert
  float sums[kRouteWarps][kExperts];
  float z_sums[kRouteWarps];
  int32_t firsts[kExperts];  // place in the plan of the tile's first choice of an expert
  int32_t warp_totals[kRouteWarps];
};

// Sums of the values of threads before this one; one value a thread. Needs a sync before `warp_totals` is used again.
__device__ __forceinline__ int exclusive_sum(int value, int32_t* warp_totals) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kFullWarp, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == 31) warp_totals[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += warp_totals[w];
  return sum - value;
}

// Routes one row; adds its shares of the scores to `sums` and sets its bits in the masks. Returns lse.
template <typename T, int kPlaces>
__device__ __forceinline__ float route_row(const TopKInputs& in, const TopKForward& out, int64_t row, int row_in_tile,
                                           float (&sums)[kPlaces], RouteShared<kPlaces>& shared) {
  const Experts<kPlaces> experts(in.experts);
  const RowScores<T, kPlaces> scores(experts, static_cast<const T*>(in.logits) + row * in.experts, in.sigmoid);
  uint32_t keys[kPlaces];
  selection_keys(in, experts, scores, keys);
  uint32_t chosen = 0;  // bit i: the expert at place i
  int own = 0;          // the choice number k with k % 32 == lane
  for (int k = 0; k < in.topk; ++k) {
    uint32_t key;
    const int expert = take_best(experts, keys, key);
    if (expert % 32 == experts.lane) chosen |= 1u << expert / 32;
    if (k % 32 == experts.lane) own = expert;
    if (experts.lane == 0) atomicOr(&shared.masks[row_in_tile / 32][expert], 1u << row_in_tile % 32);
    if ((k % 32 == 31 || k + 1 == in.topk) && experts.lane <= k % 32) {
      out.topk_indices[row * in.topk + k / 32 * 32 + experts.lane] = own;
    }
  }
  float chosen_total = 0.0f, total = 0.0f;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    chosen_total += chosen >> i & 1 ? scores.scores[i] : 0.0f;
    total += scores.scores[i];
  }
  chosen_total = in.renormalize ? warp_sum(chosen_total) + kEpsilon : 1.0f;
  total = in.sigmoid ? warp_sum(total) + kEpsilon : 1.0f;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    if (!experts.exists(i)) continue;
    const int64_t at = row * in.experts + experts.at(i);
    out.scores[at] = scores.scores[i];
    out.probs[at] = chosen >> i & 1 ? scores.scores[i] / chosen_total * in.scaling_factor : 0.0f;
    sums[i] += scores.scores[i] / total;
  }
  if (experts.lane == 0) out.lse[row] = scores.lse;
  return scores.lse;
}

// plan[place] = choice for the rows of a tile, from the masks and the places of the tile's first choices.
template <int kPlaces>
__device__ __forceinline__ void write_plan(const TopKInputs& in, const TopKForward& out, int64_t first_row, int rows,
                                           RouteShared<kPlaces>& shared) {
  for (int i = threadIdx.x; i < rows * in.topk; i += kRouteThreads) {
    const int row = i / in.topk;
    const int64_t choice = first_row * in.topk + i;
    const int expert = static_cast<int>(out.topk_indices[choice]);
    int place = shared.firsts[expert] + __popc(shared.masks[row / 32][expert] & ((1u << row % 32) - 1));
    for (int word = 0; word < row / 32; ++word) place += __popc(shared.masks[word][expert]);
    out.plan[place] = choice;
  }
}

__device__ __forceinline__ int rows_of_tile(const TopKInputs& in) {
  const int64_t left = in.rows - static_cast<int64_t>(blockIdx.x) * kTileRows;
  return static_cast<int>(left < kTileRows ? left : kTileRows);
}

template <int kPlaces>
__device__ __forceinline__ void clear_masks(RouteShared<kPlaces>& shared) {
  for (int i = threadIdx.x; i < kTileWords * 32 * kPlaces; i += kRouteThreads) (&shared.masks[0][0])[i] = 0;
  __syncthreads();
}

template <typename T, int kPlaces>
__global__ void __launch_bounds__(kRouteThreads, kPlaces > 4 ? 1 : 2)
    topk_routing_tiles_kernel(const TopKInputs in, const TopKForward out) {
  auto& shared = device::shared_storage<RouteShared<kPlaces>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rows = rows_of_tile(in), expert = threadIdx.x;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileRows;
  clear_masks(shared);
  float sums[kPlaces] = {}, z_sum = 0.0f;
  for (int row = warp; row < rows; row += kRouteWarps) {
    const float lse = route_row<T, kPlaces>(in, out, first_row + row, row, sums, shared);
    z_sum += lse * lse;
  }
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) shared.sums[warp][i * 32 + lane] = sums[i];
  if (lane == 0) shared.z_sums[warp] = z_sum;
  __syncthreads();

  int count = 0;
  float sum = 0.0f;
  z_sum = 0.0f;
  if (expert < in.experts) {
    for (int word = 0; word < kTileWords; ++word) count += __popc(shared.masks[word][expert]);
    for (int w = 0; w < kRouteWarps; ++w) sum += shared.sums[w][expert];
  }
  for (int w = 0; w < kRouteWarps; ++w) z_sum += shared.z_sums[w];
  const int64_t tiles = gridDim.x;
  if (tiles > 1) {
    if (expert < in.experts) {
      out.tile_counts[expert * tiles + blockIdx.x] = count;
      out.tile_sums[expert * tiles + blockIdx.x] = sum;
    }
    if (expert == 0) out.tile_sums[in.experts * tiles + blockIdx.x] = z_sum;
    return;
  }
  const int first = exclusive_sum(count, shared.warp_totals);
  if (expert < in.experts) {
    shared.firsts[expert] = first;
    out.tokens_per_expert[expert] = count;
    out.score_sums[expert] = sum;
    out.expert_offsets[expert + 1] = first + count;
  }
  if (expert == 0) {
    out.expert_offsets[0] = 0;
    out.z_sum[0] = z_sum;
  }
  __syncthreads();
  write_plan(in, out, first_row, rows, shared);
}

// A warp for each expert, and one more for z_sum: sums over the tiles, and in place of the counts of each tile those of
// the tiles before it.
__global__ void __launch_bounds__(kRouteThreads)
    topk_routing_totals_kernel(const TopKInputs in, const TopKForward out, const int tiles) {
  const int lane = threadIdx.x % 32;
  const int expert = static_cast<int>(blockIdx.x) * kRouteWarps + static_cast<int>(threadIdx.x) / 32;
  if (expert > in.experts) return;
  const float* tile_sums = out.tile_sums + static_cast<int64_t>(expert) * tiles;
  float sum = 0.0f;
  for (int tile = lane; tile < tiles; tile += 32) sum += tile_sums[tile];
  sum = warp_sum(sum);
  if (expert == in.experts) {
    if (lane == 0) out.z_sum[0] = sum;
    return;
  }
  int32_t* counts = out.tile_counts + static_cast<int64_t>(expert) * tiles;
  int total = 0;
  for (int start = 0; start < tiles; start += 32) {
    const int count = start + lane < tiles ? counts[start + lane] : 0;
    int before = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, before, step);
      if (lane >= step) before += other;
    }
    if (start + lane < tiles) counts[start + lane] = total + before - count;
    total += __shfl_sync(kFullWarp, before, 31);
  }
  if (lane == 0) {
    out.score_sums[expert] = sum;
    out.tokens_per_expert[expert] = total;
  }
}

template <int kPlaces>
__global__ void __launch_bounds__(kRouteThreads, 2)
    topk_routing_plan_kernel(const TopKInputs in, const TopKForward out) {
  auto& shared = device::shared_storage<RouteShared<kPlaces>>();
  const int rows = rows_of_tile(in), expert = threadIdx.x;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileRows, tiles = gridDim.x;
  clear_masks(shared);
  for (int i = threadIdx.x; i < rows * in.topk; i += kRouteThreads) {
    const int row = i / in.topk, choice = static_cast<int>(out.topk_indices[first_row * in.topk + i]);
    atomicOr(&shared.masks[row / 32][choice], 1u << row % 32);
  }
  const int count = expert < in.experts ? out.tokens_per_expert[expert] : 0;
  const int first = exclusive_sum(count, shared.warp_totals);
  if (expert < in.experts) {
    shared.firsts[expert] = first + out.tile_counts[expert * tiles + blockIdx.x];
    if (blockIdx.x == 0) out.expert_offsets[expert + 1] = first + count;
  }
  if (blockIdx.x == 0 && expert == 0) out.expert_offsets[0] = 0;
  __syncthreads();
  write_plan(in, out, first_row, rows, shared);
}

}  // namespace parrot::cuda
