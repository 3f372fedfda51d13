// c_g = sum over the rows r of group g of outer(a[r], b[r]): the gradient of each group's matrix. The reduction runs
// over ragged rows: past those of a group both operands are zeros, by the bounds of their planes, or where groups lie
// in place, cleared in shared memory. Both operands have their columns along the rows in memory (M- and N-major).
#pragma once

#include "gemm_gather.cuh"

namespace parrot::cuda {

template <typename T, typename Shape_, bool kGathers>
struct KProduct {
  using Type = T;
  using Shape = Shape_;
  static constexpr bool kTransposedA = true, kTransposedB = true, kScaled = false;
  static constexpr Gathered kGathered = kGathers ? Gathered::kB : Gathered::kNone;

  device::TensorMap a_map, b_map, c_map;
  KGroupedGemm problem;

  __device__ int groups() const { return problem.rows.groups; }
  __device__ int column_blocks() const { return (problem.k + Shape::kColumns - 1) / Shape::kColumns; }
  __device__ SplitTail split() const { return {}; }
  __device__ int row_blocks(int) const { return (problem.n + kBlockM - 1) / kBlockM; }
  __device__ int steps(const Tile& tile) const { return cuda::row_blocks<kBlockK>(problem.rows, tile.group); }
  __device__ void clear() const {}

  // Clears rows [count, kBlockK) of every box of a stage. All threads that multiply it call it.
  __device__ void prepare(GemmStage<Shape>& stage, const Tile& tile, int step) const {
    if (rows_end_with_plane(problem.rows)) return;
    const int count = row_block<kBlockK>(problem.rows, tile.group, step).count;
    if (count == kBlockK) return;
    constexpr int kBoxes = (kBlockM + Shape::kColumns) / 64, kVectors = kBoxRowBytes / 16;
    static_assert(sizeof(GemmStage<Shape>) == kBoxes * kBoxBytes, "boxes of a and b follow one another");
    constexpr int kThreads = 32 * Shape::kReaders;
    uint4* vectors = reinterpret_cast<uint4*>(&stage);
    const int rows = kBlockK - count;
    for (int i = static_cast<int>(threadIdx.x) % kThreads; i < kBoxes * rows * kVectors; i += kThreads) {
      const int box = i / (rows * kVectors), row = count + i / kVectors % rows;
      vectors[(box * kBlockK + row) * kVectors + i % kVectors] = uint4{0, 0, 0, 0};
    }
    device::fence_shared_writes();
    if (Shape::kPingPong) {
      OutgoingBoxes<Shape::kBoxes>::synchronize();
    } else {
      device::named_barrier(kComputeBarrier, kThreads);
    }
  }

  struct Source {
    const KProduct& product;
    int group, row, column, step;
    RowBlock rows;

    __device__ void gather(GemmStage<Shape>& stage) const {
      const KGroupedGemm& problem = product.problem;
      GatheredRows<kBlockK> gathered;
      gathered.find(problem.rows, rows);
#pragma unroll
      for (int box = 0; box < Shape::kColumns / 64; ++box) {
        gathered.copy(stage.b + box * kBoxBytes, problem.b, 2 * static_cast<int64_t>(problem.k),
                      2 * static_cast<int64_t>(column + box * 64));
      }
    }
    __device__ void copy_a(unsigned char* to, int half, const Copy& copy) const {
      copy(to + half * kBoxBytes, product.a_map, row + half * 64, rows.y, rows.plane);
    }
    __device__ void copy_b(unsigned char* to, int half, const Copy& copy) const {
#pragma unroll
      for (int box = 0; box < Shape::kColumns / 64; ++box) {
        copy(to + box * kBoxBytes + half * kBoxBytes / 2, product.b_map, column + box * 64,
             rows.source_y + half * kBlockK / 2, rows.source_plane);
      }
    }
    __device__ void advance() { rows = row_block<kBlockK>(product.problem.rows, group, ++step); }
  };

  __device__ Source source(const Tile& tile) const {
    return {*this,
            tile.group,
            tile.row_block * kBlockM,
            tile.column_block * Shape::kColumns,
            0,
            row_block<kBlockK>(problem.rows, tile.group, 0)};
  }

  class Output {
   public:
    __device__ Output(const KProduct& product, GemmShared<Shape>& shared)
        : product_(product), boxes_(shared.boxes[threadIdx.x / 128 - 1]) {}

    __device__ void begin(const Tile&) {}
    __device__ void finish() { boxes_.finish(); }

    __device__ void write(const Tile& tile, const Accumulators<Shape>& c) {
      const int first = Shape::kPingPong ? 0 : (static_cast<int>(threadIdx.x) / 128 - 1) * 64;
#pragma unroll
      for (int half = 0; half < Shape::kHalves; ++half) {
        const int row = tile.row_block * kBlockM + first + half * 64;
#pragma unroll
        for (int part = 0; part < Shape::kColumns / 64; ++part) {
          const int x = tile.column_block * Shape::kColumns + part * 64;
          if (row >= product_.problem.n || x >= product_.problem.k) break;
          write_box<T>(boxes_.acquire(), [&](int i) { return c[half][part * kBoxFragments + i]; });
          boxes_.send(product_.c_map, x, row, tile.group);
        }
      }
    }

   private:
    const KProduct& product_;
    OutgoingBoxes<Shape::kBoxes> boxes_;
  };
};

}  // namespace parrot::cuda
