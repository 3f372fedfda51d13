// Rows that lie anywhere, one of the operands of a product: the whole first warp group copies them, 16 bytes a thread,
// to where the copy engine would have put them. The other operand comes by the copy engine as ever.
#pragma once

#include "gemm_pipeline.cuh"

namespace parrot::cuda {

constexpr int kGatheringWarps = 4;
// Of a thread: addresses of rows need more than a thread that only names boxes.
constexpr int kGatherRegisters = 56, kComputeRegistersBesideGather = 224;
// Stages whose rows are under way. A stage is let go of when the products of the next one have begun, so that two must
// be full or empty beside them.
constexpr int kGatherDepth = 2;

// The row of the source behind a row of the product; -1, which stands for zeros, from row `end` on.
__device__ __forceinline__ int source_row(const RaggedRows& rows, int row, int end) {
  if (row >= end) return -1;
  const int segment = row / rows.segment_rows;
  return source_segment(rows, segment) * rows.segment_rows + row % rows.segment_rows;
}

// kRows rows of 128 bytes of a source of rows of `row_bytes` bytes. Eight threads take a row, so that each has every
// 16th.
template <int kRows>
class GatheredRows {
 public:
  // Those of `block`, which lie together in the product.
  __device__ void find(const RaggedRows& rows, const RowBlock& block) {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      rows_[i] = source_row(rows, block.row + first() + 16 * i, block.row + block.count);
    }
  }

  // Bytes [byte, byte + 128) of each row, zeros past its end, with the swizzle of 128 bytes.
  __device__ void copy(unsigned char* to, const void* source, int64_t row_bytes, int64_t byte) const {
    const int vector = static_cast<int>(threadIdx.x) % 8;
    byte += 16 * vector;
    const auto* bytes = static_cast<const unsigned char*>(source);
    to += first() * kBoxRowBytes + (vector ^ first() % 8) * 16;
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      const bool exists = rows_[i] >= 0 && byte < row_bytes;
      device::copy_vector(to + 16 * i * kBoxRowBytes, exists ? bytes + rows_[i] * row_bytes + byte : bytes, exists);
    }
  }

 private:
  __device__ static int first() { return static_cast<int>(threadIdx.x) / 8; }

  int rows_[kRows / 16];
};

// Says that this thread's rows of the stage have come. Barriers count warps.
template <typename Shape>
__device__ __forceinline__ void announce_rows(GemmShared<Shape>& shared, Ring<Shape::kStages>& ring) {
  device::fence_shared_writes();
  __syncwarp();
  if (threadIdx.x % 32 == 0) device::barrier_arrive(&shared.full[ring.stage]);
  ring.advance();
}

template <typename Product, typename Shape>
__device__ __forceinline__ void gather_tiles(const Product& product, GemmShared<Shape>& shared) {
  static_assert(kGatherDepth + 2 <= Shape::kStages, "the products would wait for a stage that waits for them");
  Ring<Shape::kStages> ring, arrived;
  Tile tile;
  TileWalk walk;
  int under_way = 0;
  while (walk.next(tile, product)) {
    auto source = product.source(tile);
    const int steps = product.steps(tile);
    for (int step = 0; step < steps; ++step) {
      device::barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
      if (threadIdx.x == 0) copy_stage<Product>(source, tile, shared, ring.stage);
      source.gather(shared.stages[ring.stage]);
      device::vectors_commit();
      source.advance();
      ring.advance();
      if (++under_way > kGatherDepth) {
        device::vectors_wait<kGatherDepth>();
        announce_rows(shared, arrived);
        --under_way;
      }
    }
  }
  device::vectors_wait<0>();
  for (; under_way > 0; --under_way) announce_rows(shared, arrived);
  wait_for_readers(shared, ring);
}

}  // namespace parrot::cuda
