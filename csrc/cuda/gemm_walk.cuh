// Which tiles a block computes: blocks of ragged rows, and their order. Blocks come in clusters of two that take two
// neighbouring tiles at a time, of the same columns or of the same rows: the operand that both need is read once.
#pragma once

#include "async.cuh"
#include "grouped_gemm.h"

namespace parrot::cuda {

constexpr int kBlockM = 128, kBlockK = 64;  // rows of a tile, and a step of the reduction
constexpr int kCluster = 2;
constexpr int kBand = 8;  // pairs of row blocks of tiles that run at about the same time

__device__ __forceinline__ int64_t offset_of(const RaggedRows& rows, int group) {
  return rows.wide_offsets ? static_cast<const int64_t*>(rows.offsets)[group]
                           : static_cast<const int32_t*>(rows.offsets)[group];
}

// Segments [first, last) of a group, cut to those that exist: no offset may lead to an access outside.
struct Segments {
  int first, last;
};

__device__ __forceinline__ Segments segments_of(const RaggedRows& rows, int group) {
  if (!rows.offsets) return {group * rows.source_segments, (group + 1) * rows.source_segments};
  int64_t first = offset_of(rows, group), last = offset_of(rows, group + 1);
  if (first < 0) first = 0;
  if (last > rows.segments) last = rows.segments;
  if (last < first) last = first;
  return {static_cast<int>(first), static_cast<int>(last)};
}

// Whether rows of the source are found one by one. Those of a plan of longer segments are found by segment.
__host__ __device__ __forceinline__ bool gathers_rows(const RaggedRows& rows) {
  return rows.plan && rows.segment_rows < kLeastRowsOfRun;
}
__host__ __device__ __forceinline__ bool gathers_segments(const RaggedRows& rows) {
  return rows.plan && !gathers_rows(rows);
}

// Results and source as planes of rows. A plane of results ends where its rows end, except where they lie group after
// group: there the only plane holds all groups, and a tile may reach into the rows of the next one.
__host__ __device__ __forceinline__ bool rows_end_with_plane(const RaggedRows& rows) {
  return gathers_segments(rows) || !rows.offsets;
}

// The segment of the source behind one of the product, which may be past the last one.
__device__ __forceinline__ int source_segment(const RaggedRows& rows, int segment) {
  const int64_t source = segment < rows.segments ? rows.plan[segment] / rows.topk : 0;
  return source < 0 || source >= rows.source_segments ? 0 : static_cast<int>(source);
}

// At most kRows neighbouring rows of one group, which also lie together in the source.
struct RowBlock {
  int row;       // of all J * V
  int y, plane;  // the same place in the planes of the results
  int source_y, source_plane;
  int count;
};

// A group is one run of rows, except where segments are gathered: each of them is a run then.
template <int kRows>
__device__ __forceinline__ int row_blocks(const RaggedRows& rows, int group) {
  const Segments own = segments_of(rows, group);
  const int count = own.last - own.first;
  if (gathers_segments(rows)) return count * ((rows.segment_rows + kRows - 1) / kRows);
  return (count * rows.segment_rows + kRows - 1) / kRows;
}

template <int kRows>
__device__ __forceinline__ RowBlock row_block(const RaggedRows& rows, int group, int index) {
  const Segments own = segments_of(rows, group);
  RowBlock block;
  int end;
  if (gathers_segments(rows)) {
    const int per_segment = (rows.segment_rows + kRows - 1) / kRows;
    const int segment = own.first + index / per_segment, row = index % per_segment * kRows;
    block = {segment * rows.segment_rows + row, row, segment, row, source_segment(rows, segment), 0};
    end = (segment + 1) * rows.segment_rows;
  } else {
    const int start = own.first * rows.segment_rows, row = start + index * kRows;
    block = rows.offsets ? RowBlock{row, row, 0, row, 0, 0} : RowBlock{row, row - start, group, row - start, 0, 0};
    end = own.last * rows.segment_rows;
  }
  block.count = end - block.row < kRows ? end - block.row : kRows;
  return block;
}

struct Tile {
  int group, row_block, column_block;
  bool shares_rows;  // with the tile of the other block; else it shares the columns
  int part, tail;    // of a reduction that is split: which part, and the number of the pair among those, else -1
};

// This cluster's pairs of tiles, group by group. Inside a group, bands of kBand pairs of row blocks are walked column
// by column, so that tiles that run at the same time share both operands in the second-level cache. The row block that
// is left over where there is an odd number takes two columns at a time. Where that is odd, too, one tile lies outside:
// it is computed of zeros, and nothing of it is written.
class TileWalk {
 public:
  // The product says how many groups and column blocks there are, and how many row blocks a group has.
  template <typename Product>
  __device__ bool next(Tile& tile, const Product& product) {
    const SplitTail split = product.split();
    const int columns = product.column_blocks();
    int pair = next_;
    tile.part = 0;
    tile.tail = -1;
    if (split.parts > 1 && next_ >= split.whole) {
      tile.tail = (next_ - split.whole) / split.parts;
      tile.part = (next_ - split.whole) % split.parts;
      pair = split.whole + tile.tail;
    }
    int row_blocks = group_ < 0 ? 0 : product.row_blocks(group_);
    while (group_ < 0 || pair >= first_ + pairs_of(row_blocks, columns)) {
      first_ += pairs_of(row_blocks, columns);
      if (++group_ >= product.groups()) return false;
      row_blocks = product.row_blocks(group_);
    }
    const int index = pair - first_, pairs = row_blocks / 2, left_over = index - pairs * columns;
    tile.group = group_;
    tile.shares_rows = left_over >= 0;
    if (tile.shares_rows) {
      tile.row_block = row_blocks - 1;
      tile.column_block = 2 * left_over + device::cluster_rank();
    } else {
      const int band = index / (kBand * columns), in_band = index % (kBand * columns);
      const int height = pairs - band * kBand < kBand ? pairs - band * kBand : kBand;
      tile.row_block = 2 * (band * kBand + in_band % height) + device::cluster_rank();
      tile.column_block = in_band / height;
    }
    next_ += static_cast<int>(gridDim.x) / kCluster;
    return true;
  }

 private:
  __device__ static int pairs_of(int row_blocks, int columns) {
    return row_blocks / 2 * columns + row_blocks % 2 * ((columns + 1) / 2);
  }

  // Little is kept, since the registers are full of accumulators.
  int group_ = -1, next_ = static_cast<int>(blockIdx.x) / kCluster, first_ = 0;
};

}  // namespace parrot::cuda
