// c_g = sum over the rows r of group g of outer(a[r], b[r]): the gradient of each group's matrix. The reduction runs
// over ragged rows, so the last stage of a run holds rows of another group, which are cleared in shared memory.
// Structure as in m_grouped_gemm.cuh; both operands have their columns along the rows in memory (M- and N-major).
#pragma once

#include "grouped_gemm.cuh"

namespace parrot::cuda {

__device__ __forceinline__ void copy_k_tiles(const KGroupedGemm& problem, const device::TensorMap& a_map,
                                             const device::TensorMap& b_map, TileWalk& walk, GemmShared& shared) {
  Ring ring;
  Tile tile;
  while (walk.next(tile, [&](int) { return (problem.n + kBlockM - 1) / kBlockM; })) {
    const int steps = row_blocks<kBlockK>(problem.rows, tile.group);
    for (int step = 0; step < steps; ++step) {
      const RowBlock block = row_block<kBlockK>(problem.rows, tile.group, step);
      GemmStage& stage = acquire_stage(shared, ring);
      device::Barrier* full = &shared.full[ring.stage];
#pragma unroll
      for (int box = 0; box < kBlockM / 64; ++box) {
        device::copy_box(stage.a + box * kBlockK * kBoxRowBytes, a_map, full, tile.row_block * kBlockM + box * 64,
                         block.row, 0);
      }
#pragma unroll
      for (int box = 0; box < kBlockN / 64; ++box) {
        device::copy_box(stage.b + box * kBlockK * kBoxRowBytes, b_map, full, tile.column_block * kBlockN + box * 64,
                         block.source_row, block.source_segment);
      }
      ring.advance();
    }
  }
}

// Clears rows [count, kBlockK) of every box of a stage. All computing threads call it.
__device__ __forceinline__ void clear_rows(GemmStage& stage, int count) {
  constexpr int kBoxes = (kBlockM + kBlockN) / 64, kVectors = kBoxRowBytes / 16;
  static_assert(sizeof(GemmStage) == kBoxes * kBlockK * kBoxRowBytes, "boxes of a and b follow one another");
  uint4* vectors = reinterpret_cast<uint4*>(&stage);
  const int rows = kBlockK - count;
  for (int i = static_cast<int>(threadIdx.x) - 128; i < kBoxes * rows * kVectors; i += 128 * kWarpGroups) {
    const int box = i / (rows * kVectors), row = count + i / kVectors % rows;
    vectors[(box * kBlockK + row) * kVectors + i % kVectors] = uint4{0, 0, 0, 0};
  }
  device::fence_shared_writes();
  device::named_barrier(kComputeBarrier, 128 * kWarpGroups);
}

template <typename T>
__device__ __forceinline__ void write_k_tile(const KGroupedGemm& problem, const Tile& tile, const float (&c)[128],
                                             uint4* epilogue) {
  const int first_row = (static_cast<int>(threadIdx.x) - 128) / 32 * 16;
  const int row = tile.row_block * kBlockM + first_row, column = tile.column_block * kBlockN;
  T* out = static_cast<T*>(problem.c) + (static_cast<int64_t>(tile.group) * problem.n + row) * problem.k + column;
#pragma unroll
  for (int part = 0; part < kBlockN / kEpilogueWidth; ++part) {
    const int start = part * kEpilogueWidth;
    write_columns(
        out + start, problem.k, problem.n - row, problem.k - column - start, [&](int i) { return c[start / 2 + i]; },
        epilogue);
  }
}

template <typename T>
__device__ __forceinline__ void compute_k_tiles(const KGroupedGemm& problem, TileWalk& walk, GemmShared& shared) {
  Ring ring;
  Tile tile;
  float c[128];
  while (walk.next(tile, [&](int) { return (problem.n + kBlockM - 1) / kBlockM; })) {
#pragma unroll
    for (int i = 0; i < 128; ++i) c[i] = 0.0f;  // a group may have no rows
    const int steps = row_blocks<kBlockK>(problem.rows, tile.group);
    int previous = 0;
    for (int step = 0; step < steps; ++step) {
      const int count = row_block<kBlockK>(problem.rows, tile.group, step).count;
      device::barrier_wait(&shared.full[ring.stage], ring.phase);
      if (count < kBlockK) clear_rows(shared.stages[ring.stage], count);
      device::products_begin();
      multiply_stage<T, true, true>(c, shared.stages[ring.stage], true);
      device::products_commit();
      device::products_wait<1>();  // those of the stage before
      if (step > 0) release_stage(shared, previous);
      previous = ring.stage;
      ring.advance();
    }
    device::products_wait<0>();
    device::pin(c);
    if (steps > 0) release_stage(shared, previous);
    write_k_tile<T>(problem, tile, c, shared.epilogue[threadIdx.x / 32 - 4]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kGemmThreads, 1)
    k_grouped_gemm_kernel(const __grid_constant__ device::TensorMap a_map,
                          const __grid_constant__ device::TensorMap b_map, const KGroupedGemm problem) {
  auto& shared = device::shared_storage<GemmShared>();
  init_barriers(shared);
  TileWalk walk(problem.rows.groups, (problem.k + kBlockN - 1) / kBlockN);
  if (threadIdx.x < 128) {
    device::lower_registers<kCopyRegisters>();
    if (threadIdx.x == 0) copy_k_tiles(problem, a_map, b_map, walk, shared);
  } else {
    device::raise_registers<kComputeRegisters>();
    compute_k_tiles<T>(problem, walk, shared);
  }
}

}  // namespace parrot::cuda
