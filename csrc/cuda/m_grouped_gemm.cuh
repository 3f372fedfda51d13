// y[r] = x[r] . w_g for the rows r of each group, and the SwiGLU form. One thread copies boxes of both operands into a
// ring of stages (TMA), two warp groups multiply them (wgmma), 64 rows each; blocks stay and take tile after tile, so
// that the copies of the next tile run under the end of this one.
#pragma once

#include <math.h>

#include "grouped_gemm.cuh"

namespace parrot::cuda {

// How the weights lie: rows are columns of the product (K-major), rows run along the reduction (N-major), or two
// matrices, gate and up, of which a tile takes 128 columns each.
enum class Weights { kRows, kColumns, kSwiGLU };

template <Weights kWeights>
constexpr int kOutputColumns = kWeights == Weights::kSwiGLU ? kBlockN / 2 : kBlockN;

template <Weights kWeights>
__device__ __forceinline__ void copy_weights(GemmStage& stage, const device::TensorMap& map, device::Barrier* full,
                                             const MGroupedGemm& problem, const Tile& tile, int k) {
  const int column = tile.column_block * kOutputColumns<kWeights>;
  if (kWeights == Weights::kRows) {
    device::copy_box(stage.b, map, full, k, column, tile.group);
  } else if (kWeights == Weights::kSwiGLU) {
    constexpr int kHalf = kBlockN / 2;
    device::copy_box(stage.b, map, full, k, column, 2 * tile.group);
    device::copy_box(stage.b + kHalf * kBoxRowBytes, map, full, k, column, 2 * tile.group + 1);
  } else {
#pragma unroll
    for (int box = 0; box < kBlockN / 64; ++box) {
      device::copy_box(stage.b + box * kBlockK * kBoxRowBytes, map, full, column + box * 64, k, tile.group);
    }
  }
}

template <Weights kWeights>
__device__ __forceinline__ void copy_m_tiles(const MGroupedGemm& problem, const device::TensorMap& x_map,
                                             const device::TensorMap& w_map, TileWalk& walk, GemmShared& shared) {
  Ring ring;
  Tile tile;
  while (walk.next(tile, [&](int group) { return row_blocks<kBlockM>(problem.rows, group); })) {
    const RowBlock block = row_block<kBlockM>(problem.rows, tile.group, tile.row_block);
    for (int k = 0; k < problem.k; k += kBlockK) {
      GemmStage& stage = acquire_stage(shared, ring);
      device::Barrier* full = &shared.full[ring.stage];
      device::copy_box(stage.a, x_map, full, k, block.source_row, block.source_segment);
      copy_weights<kWeights>(stage, w_map, full, problem, tile, k);
      ring.advance();
    }
  }
}

// silu(gate) * up * weight; 0 and not NaN where exp overflows.
__device__ __forceinline__ float swiglu(float gate, float up, float weight) {
  return gate / (1.0f + expf(-gate)) * up * weight;
}

// The tile's accumulators, out to y, or to h and z.
template <typename T, Weights kWeights>
__device__ __forceinline__ void write_m_tile(const MGroupedGemm& problem, const Tile& tile, const RowBlock& block,
                                             const float (&c)[128], uint4* epilogue) {
  const int lane = threadIdx.x % 32, first_row = (static_cast<int>(threadIdx.x) - 128) / 32 * 16;
  const int rows = block.count - first_row;  // of this warp; may be negative or more than 16
  const int64_t row = block.row + first_row, n = problem.n;
  const int column = tile.column_block * kOutputColumns<kWeights>;
  T* y = static_cast<T*>(problem.y) + row * n + column;
  if constexpr (kWeights != Weights::kSwiGLU) {
#pragma unroll
    for (int part = 0; part < kBlockN / kEpilogueWidth; ++part) {
      const int start = part * kEpilogueWidth;
      write_columns(y + start, n, rows, problem.n - column - start, [&](int i) { return c[start / 2 + i]; }, epilogue);
    }
  } else {
    float weights[2] = {1.0f, 1.0f};  // of rows lane / 4 and lane / 4 + 8
    if (problem.weights) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own = lane / 4 + 8 * half;
        if (own < rows) weights[half] = problem.weights[(row + own) / problem.rows.segment_rows];
      }
    }
#pragma unroll
    for (int part = 0; part < kBlockN / 2 / kEpilogueWidth; ++part) {
      const int start = part * kEpilogueWidth, columns = problem.n - column - start;
      write_columns(
          y + start, n, rows, columns,
          [&](int i) { return swiglu(c[start / 2 + i], c[64 + start / 2 + i], weights[i / 2 % 2]); }, epilogue);
      if (problem.z) {
        T* gate = static_cast<T*>(problem.z) + row * 2 * n + column + start;
        write_columns(gate, 2 * n, rows, columns, [&](int i) { return c[start / 2 + i]; }, epilogue);
        write_columns(gate + n, 2 * n, rows, columns, [&](int i) { return c[64 + start / 2 + i]; }, epilogue);
      }
    }
  }
}

template <typename T, Weights kWeights>
__device__ __forceinline__ void compute_m_tiles(const MGroupedGemm& problem, TileWalk& walk, GemmShared& shared) {
  constexpr bool kTransposedB = kWeights == Weights::kColumns;
  Ring ring;
  Tile tile;
  float c[128];
  while (walk.next(tile, [&](int group) { return row_blocks<kBlockM>(problem.rows, group); })) {
    int previous = 0;
    for (int k = 0; k < problem.k; k += kBlockK) {
      device::barrier_wait(&shared.full[ring.stage], ring.phase);
      device::products_begin();
      multiply_stage<T, false, kTransposedB>(c, shared.stages[ring.stage], k > 0);
      device::products_commit();
      device::products_wait<1>();  // those of the stage before
      if (k > 0) release_stage(shared, previous);
      previous = ring.stage;
      ring.advance();
    }
    device::products_wait<0>();
    device::pin(c);
    release_stage(shared, previous);
    const RowBlock block = row_block<kBlockM>(problem.rows, tile.group, tile.row_block);
    write_m_tile<T, kWeights>(problem, tile, block, c, shared.epilogue[threadIdx.x / 32 - 4]);
  }
}

// Rows past the last group come out as zeros. `bytes_per_row` is a multiple of 16.
__device__ __forceinline__ void clear_padding(const RaggedRows& rows, void* out, int64_t bytes_per_row) {
  if (!out) return;
  const int64_t first = static_cast<int64_t>(segments_of(rows, rows.groups - 1).last) * rows.segment_rows;
  const int64_t end = static_cast<int64_t>(rows.segments) * rows.segment_rows * (bytes_per_row / 16);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kGemmThreads + threadIdx.x;
  for (int64_t i = first * (bytes_per_row / 16) + thread; i < end;
       i += static_cast<int64_t>(gridDim.x) * kGemmThreads) {
    static_cast<uint4*>(out)[i] = uint4{0, 0, 0, 0};
  }
}

template <typename T, Weights kWeights>
__global__ void __launch_bounds__(kGemmThreads, 1)
    m_grouped_gemm_kernel(const __grid_constant__ device::TensorMap x_map,
                          const __grid_constant__ device::TensorMap w_map, const MGroupedGemm problem) {
  auto& shared = device::shared_storage<GemmShared>();
  init_barriers(shared);
  clear_padding(problem.rows, problem.y, static_cast<int64_t>(problem.n) * 2);
  clear_padding(problem.rows, problem.z, static_cast<int64_t>(problem.n) * 4);
  constexpr int kColumns = kOutputColumns<kWeights>;
  TileWalk walk(problem.rows.groups, (problem.n + kColumns - 1) / kColumns);
  if (threadIdx.x < 128) {
    device::lower_registers<kCopyRegisters>();
    if (threadIdx.x == 0) copy_m_tiles<kWeights>(problem, x_map, w_map, walk, shared);
  } else {
    device::raise_registers<kComputeRegisters>();
    compute_m_tiles<T, kWeights>(problem, walk, shared);
  }
}

}  // namespace parrot::cuda
