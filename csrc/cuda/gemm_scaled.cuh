// Products of float8 (e4m3) with scales by blocks of 128 numbers, which are the steps of the reduction: the tensor
// cores add up one step, and its sums times both scales go into the accumulators. They would keep too few bits of a
// long sum.
#pragma once

#include "gemm_pipeline.cuh"

namespace parrot::cuda {

// 128 columns or 64 pairs of gate and up: the sums of a step need as many registers as the accumulators.
using ScaledShape = GemmShape<128, false, 6, 2>;

struct StepScales {
  float rows[2];     // of this thread's rows lane / 4 and lane / 4 + 8 of its warp
  float columns[2];  // of the left and the right half of the columns
};

// A thread's first or second row of a tile, see StepScales.
__device__ __forceinline__ int row_of_thread(int half) {
  const int thread = static_cast<int>(threadIdx.x) - 128;
  return thread / 32 * 16 + thread % 32 / 4 + 8 * half;
}

// The line of scales of a column of one of several matrices of `width` columns; tiles outside take the last one.
__device__ __forceinline__ int64_t scale_line(int64_t matrix, int column, int width) {
  const int lines = (width + kScaleBlock - 1) / kScaleBlock, line = column / kScaleBlock;
  return matrix * lines + (line < lines ? line : lines - 1);
}

// sums = the products of one stage: four steps of 32 numbers.
template <typename Shape>
__device__ __forceinline__ void multiply_scaled_stage(float (&sums)[Shape::kColumns / 2],
                                                      const GemmStage<Shape>& stage) {
  const int warp_group = static_cast<int>(threadIdx.x) / 128 - 1;
  const uint64_t a = descriptor(stage.a + warp_group * kBoxBytes, 0), b = descriptor(stage.b, 0);
  device::wgmma_e4m3<false>(sums, a, b);
#pragma unroll
  for (int step = 1; step < 4; ++step) {
    const uint64_t next = step * 32 >> 4;
    device::wgmma_e4m3<true>(sums, a + next, b + next);
  }
}

// As `compute_tiles`. While one warp group scales the sums of a step, the other one multiplies.
template <typename Product, typename Shape>
__device__ __forceinline__ void compute_scaled_tiles(const Product& product, GemmShared<Shape>& shared) {
  static_assert(!Shape::kPingPong);
  constexpr int kCount = Shape::kColumns / 2;
  Ring<Shape::kStages> ring;
  Tile tile;
  Accumulators<Shape> c;
  float sums[kCount];
  typename Product::Output output(product, shared);
  TileWalk walk;
  while (walk.next(tile, product)) {
    const int steps = product.steps(tile);
    typename Product::Scales scales(product, tile);
    output.begin(tile);
#pragma unroll
    for (float& sum : c[0]) sum = 0.0f;
    for (int step = 0; step < steps; ++step) {
      device::barrier_wait(&shared.full[ring.stage], ring.phase);
      device::products_begin();
      multiply_scaled_stage(sums, shared.stages[ring.stage]);
      device::products_commit();
      const StepScales now = scales.next();
      device::products_wait<0>();
      device::pin(sums);
      release_stage(shared, ring.stage);
      ring.advance();
#pragma unroll
      for (int i = 0; i < kCount; ++i) c[0][i] += sums[i] * (now.rows[i / 2 % 2] * now.columns[2 * i / kCount]);
    }
    output.write(tile, c);
  }
  output.finish();
}

}  // namespace parrot::cuda
