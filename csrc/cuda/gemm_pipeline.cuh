// What the matrix products share: the ring of stages between the thread that copies and the warp groups that multiply,
// and the kernel around them. A product is a type with
//     Type, Shape, kTransposedA, kTransposedB
//     kGathered: which operand comes row by row (gemm_gather.cuh)
//     groups(), row_blocks(group), column_blocks(), split(), steps(tile)  the tiles, and the steps of their reductions
//     Source source(tile), source.copy_a / copy_b(destination, half, copy), source.advance()   of one step after
//     another prepare(stage, tile, step)                                     between the arrival of a stage and its
//     products Output<Product>: begin(tile) before a tile's products, write(tile, c) after them
#pragma once

#include "gemm_output.cuh"
#include "gemm_walk.cuh"

namespace parrot::cuda {

constexpr int kWarpGroups = 2;                         // that multiply
constexpr int kGemmThreads = 128 * (1 + kWarpGroups);  // the first warp group copies

// Two schedules. Both warp groups compute one tile, 64 rows each; or (ping-pong) each computes tiles of its own, so
// that one multiplies while the other writes its results, which pays where reductions are short or the end of a tile is
// long.
template <int kColumns_, bool kPingPong_, int kStages_, int kBoxes_>
struct GemmShape {
  static constexpr int kColumns = kColumns_, kStages = kStages_, kBoxes = kBoxes_;
  static constexpr bool kPingPong = kPingPong_;
  static constexpr int kHalves = kPingPong ? 2 : 1;  // times 64 rows of a warp group
  // Of a thread. 192 accumulators leave little for the rest, and the thread that copies gives all that it can.
  static constexpr int kCopyRegisters = kColumns == 192 ? 24 : 40, kComputeRegisters = kColumns == 192 ? 240 : 232;
  static constexpr int kReaders = kPingPong ? 4 : 4 * kWarpGroups;  // warps that read a stage
};
using WideShape = GemmShape<256, false, 4, 2>;
using ShortShape = GemmShape<192, true, 4, 2>;  // for short reductions
using FusedShape = GemmShape<128, true, 5, 3>;  // for results that take several inputs and outputs

template <typename Shape>
using Accumulators = float[Shape::kHalves][Shape::kColumns / 2];

template <typename Shape>
struct alignas(1024) GemmStage {
  unsigned char a[kBlockM * kBlockK * 2];
  unsigned char b[Shape::kColumns * kBlockK * 2];
};

template <typename Shape_>
struct GemmShared {
  using Shape = Shape_;
  GemmStage<Shape> stages[Shape::kStages];
  alignas(1024) unsigned char boxes[kWarpGroups][Shape::kBoxes][kBoxBytes];
  device::Barrier full[Shape::kStages], empty[Shape::kStages];
  device::Barrier turns[kWarpGroups], inputs[kWarpGroups][2];
  int arrived[kWarpGroups];
};

// Position in the ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ int previous() const { return stage == 0 ? kStages - 1 : stage - 1; }
  __device__ void advance(int steps = 1) {
    stage += steps;
    phase ^= stage / kStages & 1;
    stage %= kStages;
  }
};

// `writers`: arrivals that make a stage full.
template <typename Shape>
__device__ __forceinline__ void init_barriers(GemmShared<Shape>& shared, int writers) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      device::barrier_init(&shared.full[stage], writers);
      device::barrier_init(&shared.empty[stage], kCluster * Shape::kReaders);  // each reading warp lets go of it
    }
    for (device::Barrier& barrier : shared.turns) device::barrier_init(&barrier, 4);
    for (auto& own : shared.inputs) {
      for (device::Barrier& barrier : own) device::barrier_init(&barrier, 1);
    }
    device::fence_barrier_init();
  }
  device::cluster_sync();
}

// Copies of boxes that count on one barrier, of this block or, where both blocks need the box, of both.
struct Copy {
  device::Barrier* full;
  bool to_both;

  __device__ void operator()(void* to, const device::TensorMap& map, int x, int y, int z) const {
    if (to_both) {
      device::copy_box_to_blocks(to, map, full, x, y, z, (1u << kCluster) - 1);
    } else {
      device::copy_box(to, map, full, x, y, z);
    }
  }
};

// Which operand is gathered row by row; the copy engine brings in the others.
enum class Gathered { kNone, kA, kB };

// Starts the copies of a stage by the copy engine. One thread calls it.
template <typename Product, typename Source, typename Shape>
__device__ __forceinline__ void copy_stage(const Source& source, const Tile& tile, GemmShared<Shape>& shared, int at) {
  using Stage = GemmStage<Shape>;
  constexpr bool kCopiesA = Product::kGathered != Gathered::kA, kCopiesB = Product::kGathered != Gathered::kB;
  constexpr uint32_t kBytes = (kCopiesA ? sizeof(Stage::a) : 0) + (kCopiesB ? sizeof(Stage::b) : 0);
  Stage& stage = shared.stages[at];
  device::barrier_arrive_expecting(&shared.full[at], kBytes);
  // Each block copies a half of what both need to both.
  const Copy copy_a{&shared.full[at], tile.shares_rows}, copy_b{copy_a.full, !tile.shares_rows};
  const int rank = device::cluster_rank();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (kCopiesA) {
      if (!copy_a.to_both || half == rank) source.copy_a(stage.a, half, copy_a);
    }
    if constexpr (kCopiesB) {
      if (!copy_b.to_both || half == rank) source.copy_b(stage.b, half, copy_b);
    }
  }
}

// The other block arrives at the barriers of this one and writes into its stages: it must not end before.
template <typename Shape>
__device__ __forceinline__ void wait_for_readers(GemmShared<Shape>& shared, Ring<Shape::kStages> ring) {
  for (int stage = 0; stage < Shape::kStages; ++stage) {
    device::barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
    ring.advance();
  }
}

template <typename Product, typename Shape>
__device__ __forceinline__ void copy_tiles(const Product& product, GemmShared<Shape>& shared) {
  Ring<Shape::kStages> ring;
  Tile tile;
  TileWalk walk;
  while (walk.next(tile, product)) {
    auto source = product.source(tile);
    const int steps = product.steps(tile);
    for (int step = 0; step < steps; ++step) {
      device::barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
      copy_stage<Product>(source, tile, shared, ring.stage);
      source.advance();
      ring.advance();
    }
  }
  wait_for_readers(shared, ring);
}

template <typename Shape>
__device__ __forceinline__ void release_stage(GemmShared<Shape>& shared, int stage) {
  const int lane = threadIdx.x % 32;
  if (lane < kCluster) device::barrier_arrive_in_block(&shared.empty[stage], lane);
}

// c += the products of one stage: four steps of 16 along the reduction for each 64 rows.
template <typename Product>
__device__ __forceinline__ void multiply_stage(Accumulators<typename Product::Shape>& c,
                                               const GemmStage<typename Product::Shape>& stage) {
  using Shape = typename Product::Shape;
  constexpr bool kTransposedA = Product::kTransposedA, kTransposedB = Product::kTransposedB;
  const uint64_t b = descriptor(stage.b, kTransposedB ? kBlockK * kBoxRowBytes : 0);
#pragma unroll
  for (int half = 0; half < Shape::kHalves; ++half) {
    const int block = Shape::kPingPong ? half : static_cast<int>(threadIdx.x) / 128 - 1;
    // 64 rows of 128 bytes, or a box of 64 columns. Both take 8 KiB.
    const uint64_t a = descriptor(stage.a + block * kBoxBytes, 0);
#pragma unroll
    for (int step = 0; step < kBlockK / 16; ++step) {
      // 16 elements along a row, or 16 rows.
      const uint64_t next_a = kTransposedA ? step * 16 * kBoxRowBytes : step * 32;
      const uint64_t next_b = kTransposedB ? step * 16 * kBoxRowBytes : step * 32;
      wgmma<typename Product::Type, kTransposedA, kTransposedB>(c[half], a + (next_a >> 4), b + (next_b >> 4));
    }
  }
}

template <typename Product, typename Shape>
__device__ __forceinline__ void compute_tiles(const Product& product, GemmShared<Shape>& shared) {
  Ring<Shape::kStages> ring;
  Tile tile;
  Accumulators<Shape> c;
  typename Product::Output output(product, shared);
  TileWalk walk;
  const int warp_group = static_cast<int>(threadIdx.x) / 128 - 1;
  for (int turn = 0; walk.next(tile, product); ++turn) {
    const int steps = product.steps(tile);
    if (Shape::kPingPong && turn % 2 != warp_group) {
      ring.advance(steps);
      continue;
    }
    output.begin(tile);
    // Until the other warp group has seen all stages of its tile: a barrier tells a phase from the next, but not from
    // the one after that.
    if (Shape::kPingPong) device::barrier_wait(&shared.turns[warp_group], (turn / 2 & 1) ^ (warp_group ^ 1));
#pragma unroll
    for (auto& half : c) {
#pragma unroll
      for (float& sum : half) sum = 0.0f;
    }
    for (int step = 0; step < steps; ++step) {
      device::barrier_wait(&shared.full[ring.stage], ring.phase);
      product.prepare(shared.stages[ring.stage], tile, step);
      device::products_begin();
      multiply_stage<Product>(c, shared.stages[ring.stage]);
      device::products_commit();
      device::products_wait<1>();  // those of the stage before
      if (step > 0) release_stage(shared, ring.previous());
      ring.advance();
    }
    if (Shape::kPingPong && threadIdx.x % 32 == 0) device::barrier_arrive(&shared.turns[warp_group ^ 1]);
    device::products_wait<0>();
#pragma unroll
    for (auto& half : c) device::pin(half);
    if (steps > 0) release_stage(shared, ring.previous());
    output.write(tile, c);
  }
  output.finish();
}

// Rows past the last group come out as zeros. `bytes_per_row` is a multiple of 16.
__device__ __forceinline__ void clear_padding(const RaggedRows& rows, void* out, int64_t bytes_per_row) {
  if (!out || !rows.offsets) return;
  const int64_t first = static_cast<int64_t>(segments_of(rows, rows.groups - 1).last) * rows.segment_rows;
  const int64_t end = static_cast<int64_t>(rows.segments) * rows.segment_rows * (bytes_per_row / 16);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kGemmThreads + threadIdx.x;
  for (int64_t i = first * (bytes_per_row / 16) + thread; i < end;
       i += static_cast<int64_t>(gridDim.x) * kGemmThreads) {
    static_cast<uint4*>(out)[i] = uint4{0, 0, 0, 0};
  }
}

}  // namespace parrot::cuda
