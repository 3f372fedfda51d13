// What the grouped matrix products share: blocks of ragged rows, the order of tiles, the ring of stages between the
// copying thread and the computing warp groups, and the way out of the accumulators.
#pragma once

#include "async.cuh"
#include "grouped_gemm.h"

namespace parrot::cuda {

constexpr int kBlockM = 128, kBlockN = 256, kBlockK = 64;
constexpr int kStages = 4;
constexpr int kWarpGroups = 2;                         // each computes 64 rows of a tile
constexpr int kGemmThreads = 128 * (1 + kWarpGroups);  // the first warp group copies
constexpr int kCopyRegisters = 56, kComputeRegisters = 224;
constexpr int kComputeBarrier = 1;
constexpr int kBand = 16;  // row blocks of tiles that run at about the same time

constexpr int kBoxRowBytes = 128;  // 64 elements of 16 bits: the width of the swizzle
constexpr int kEpilogueWidth = 64;
constexpr int kEpiloguePitch = kEpilogueWidth + 8;  // in elements; shifts each row by four banks

struct alignas(1024) GemmStage {
  unsigned char a[kBlockM * kBlockK * 2];
  unsigned char b[kBlockN * kBlockK * 2];
};

struct GemmShared {
  GemmStage stages[kStages];
  uint4 epilogue[4 * kWarpGroups][16 * kEpiloguePitch / 8];  // 16 rows of a warp
  device::Barrier full[kStages], empty[kStages];
};
static_assert(sizeof(GemmShared) <= 227 * 1024, "a block of Hopper has 227 KiB of shared memory");

__device__ __forceinline__ int64_t offset_of(const RaggedRows& rows, int group) {
  return rows.wide_offsets ? static_cast<const int64_t*>(rows.offsets)[group]
                           : static_cast<const int32_t*>(rows.offsets)[group];
}

// Segments [first, last) of a group, cut to those that exist: no offset may lead to an access outside.
struct Segments {
  int first, last;
};

__device__ __forceinline__ Segments segments_of(const RaggedRows& rows, int group) {
  int64_t first = offset_of(rows, group), last = offset_of(rows, group + 1);
  if (first < 0) first = 0;
  if (last > rows.segments) last = rows.segments;
  if (last < first) last = first;
  return {static_cast<int>(first), static_cast<int>(last)};
}

// At most kRows neighbouring rows of one group, which also lie together in the source.
struct RowBlock {
  int row;             // of [J * V]
  int source_row;      // of the source segment; of [J * V] in place
  int source_segment;  // 0 in place
  int count;
};

// In place a group is one run of rows; gathered, each of its segments is.
template <int kRows>
__device__ __forceinline__ int row_blocks(const RaggedRows& rows, int group) {
  const Segments own = segments_of(rows, group);
  const int count = own.last - own.first;
  if (rows.plan) return count * ((rows.segment_rows + kRows - 1) / kRows);
  return (count * rows.segment_rows + kRows - 1) / kRows;
}

template <int kRows>
__device__ __forceinline__ RowBlock row_block(const RaggedRows& rows, int group, int index) {
  const Segments own = segments_of(rows, group);
  RowBlock block;
  int end;
  if (rows.plan) {
    const int per_segment = (rows.segment_rows + kRows - 1) / kRows;
    const int segment = own.first + index / per_segment, row = index % per_segment * kRows;
    int64_t source = rows.plan[segment] / rows.topk;
    if (source < 0 || source >= rows.source_segments) source = 0;
    block = {segment * rows.segment_rows + row, row, static_cast<int>(source), 0};
    end = (segment + 1) * rows.segment_rows;
  } else {
    const int row = own.first * rows.segment_rows + index * kRows;
    block = {row, row, 0, 0};
    end = own.last * rows.segment_rows;
  }
  block.count = end - block.row < kRows ? end - block.row : kRows;
  return block;
}

struct Tile {
  int group, row_block, column_block;
};

// This block's tiles, group by group. Inside a group, bands of kBand row blocks are walked column by column, so that
// tiles that run at the same time share both operands in the second-level cache.
class TileWalk {
 public:
  __device__ TileWalk(int groups, int column_blocks) : groups_(groups), column_blocks_(column_blocks) {}

  // `row_blocks_of(group)`: how many row blocks a group has.
  template <typename RowBlocksOf>
  __device__ bool next(Tile& tile, RowBlocksOf row_blocks_of) {
    while (group_ < 0 || next_ >= first_ + count_) {
      if (++group_ >= groups_) return false;
      first_ += count_;
      row_blocks_ = row_blocks_of(group_);
      count_ = row_blocks_ * column_blocks_;
    }
    const int index = next_ - first_, band_tiles = kBand * column_blocks_;
    const int band = index / band_tiles, in_band = index % band_tiles;
    const int height = row_blocks_ - band * kBand < kBand ? row_blocks_ - band * kBand : kBand;
    tile = {group_, band * kBand + in_band % height, in_band / height};
    next_ += static_cast<int>(gridDim.x);
    return true;
  }

 private:
  int groups_, column_blocks_, group_ = -1, row_blocks_ = 0;
  int next_ = static_cast<int>(blockIdx.x), first_ = 0, count_ = 0;
};

// Position in the ring of stages.
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

__device__ __forceinline__ void init_barriers(GemmShared& shared) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      device::barrier_init(&shared.full[stage], 1);
      device::barrier_init(&shared.empty[stage], 4 * kWarpGroups);  // each computing warp lets go of it
    }
    device::fence_barrier_init();
  }
  __syncthreads();
}

// A stage that is free, with its barrier told how many bytes will come.
__device__ __forceinline__ GemmStage& acquire_stage(GemmShared& shared, const Ring& ring) {
  device::barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
  device::barrier_arrive_expecting(&shared.full[ring.stage], sizeof(GemmStage));
  return shared.stages[ring.stage];
}

__device__ __forceinline__ void release_stage(GemmShared& shared, int stage) {
  if (threadIdx.x % 32 == 0) device::barrier_arrive(&shared.empty[stage]);
}

// c += the products of one stage: four steps of 16 along the reduction.
template <typename T, bool kTransposedA, bool kTransposedB>
__device__ __forceinline__ void multiply_stage(float (&c)[128], const GemmStage& stage, bool accumulate) {
  const int warp_group = static_cast<int>(threadIdx.x) / 128 - 1;
  // The 64 rows of a warp group: 64 rows of 128 bytes, or the warp group's own box of 64 columns. Both take 8 KiB.
  const uint64_t a = descriptor(stage.a + warp_group * 64 * kBoxRowBytes, 0);
  const uint64_t b = descriptor(stage.b, kTransposedB ? kBlockK * kBoxRowBytes : 0);
#pragma unroll
  for (int step = 0; step < kBlockK / 16; ++step) {
    // 16 elements along a row, or 16 rows.
    const uint64_t next_a = kTransposedA ? step * 16 * kBoxRowBytes : step * 32;
    const uint64_t next_b = kTransposedB ? step * 16 * kBoxRowBytes : step * 32;
    wgmma<T, kTransposedA, kTransposedB>(c, a + (next_a >> 4), b + (next_b >> 4), accumulate || step > 0);
  }
}

// Writes 64 columns of this warp's 16 rows: row r of the warp goes to out + r * pitch when r < rows, of which the first
// `columns` columns exist. `value(i)` is the accumulator i of these columns (fragments of wgmma: eight columns are four
// accumulators, two for row lane / 4 and two for row lane / 4 + 8).
template <typename T, typename Value>
__device__ __forceinline__ void write_columns(T* out, int64_t pitch, int rows, int columns, Value value,
                                              uint4* epilogue) {
  const int lane = threadIdx.x % 32;
  uint32_t* words = reinterpret_cast<uint32_t*>(epilogue) + lane / 4 * (kEpiloguePitch / 2) + lane % 4;
  const T* type = nullptr;
  __syncwarp();  // the columns before these have been read
#pragma unroll
  for (int j = 0; j < kEpilogueWidth / 8; ++j) {
    words[4 * j] = pack2(value(4 * j), value(4 * j + 1), type);
    words[4 * j + 8 * (kEpiloguePitch / 2)] = pack2(value(4 * j + 2), value(4 * j + 3), type);
  }
  __syncwarp();
  const int vector = lane % 8;
#pragma unroll
  for (int row = lane / 8; row < 16; row += 4) {
    const uint4 bytes = epilogue[row * (kEpiloguePitch / 8) + vector];
    if (row < rows && vector * 8 < columns) {
      *reinterpret_cast<uint4*>(out + row * pitch + vector * 8) = bytes;
    }
  }
}

}  // namespace parrot::cuda
