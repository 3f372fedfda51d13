// y[r] = x[r] . w_g for the rows r of each group, and the SwiGLU form.
#pragma once

#include "gemm_gather.cuh"
#include "gemm_scaled.cuh"
#include "swiglu.cuh"

namespace parrot::cuda {

// How the weights lie: rows are columns of the product (K-major), rows run along the reduction (N-major), or two
// matrices, gate and up, of which a tile takes 128 columns each.
enum class Weights { kRows, kColumns, kSwiGLU };

// T is the type of the results, and of the operands where these are not scaled float8.
template <typename T, Weights kWeights, typename Shape_, bool kGathers, bool kScaled_>
struct MProduct {
  using Type = T;
  using Shape = Shape_;
  static constexpr Gathered kGathered = kGathers ? Gathered::kA : Gathered::kNone;
  static constexpr bool kScaled = kScaled_;
  static constexpr bool kTransposedA = false, kTransposedB = kWeights == Weights::kColumns;
  static constexpr int kColumns = kWeights == Weights::kSwiGLU ? Shape::kColumns / 2 : Shape::kColumns;  // of y
  static constexpr int kWeightRows = kTransposedB ? kBlockK / 2 : Shape::kColumns / 2;                   // of a box

  device::TensorMap x_map, w_map, y_map, gate_map, up_map;
  MGroupedGemm problem;

  __device__ int groups() const { return problem.rows.groups; }
  __device__ int column_blocks() const { return (problem.n + kColumns - 1) / kColumns; }
  __device__ SplitTail split() const { return {}; }
  __device__ int row_blocks(int group) const { return cuda::row_blocks<kBlockM>(problem.rows, group); }
  __device__ int steps(const Tile&) const { return (problem.k + kBlockK - 1) / kBlockK; }
  __device__ void prepare(GemmStage<Shape>&, const Tile&, int) const {}
  __device__ void clear() const {
    clear_padding(problem.rows, problem.y, static_cast<int64_t>(problem.n) * 2);
    clear_padding(problem.rows, problem.z, static_cast<int64_t>(problem.n) * 4);
  }

  struct Source {
    const MProduct& product;
    RowBlock rows;
    int group, column, k = 0;
    GatheredRows<kBlockM> gathered = {};

    __device__ void gather(GemmStage<Shape>& stage) const {
      const MGroupedGemm& problem = product.problem;
      gathered.copy(stage.a, problem.x, 2 * static_cast<int64_t>(problem.k), 2 * static_cast<int64_t>(k));
    }
    __device__ void copy_a(unsigned char* to, int half, const Copy& copy) const {
      copy(to + half * kBoxBytes, product.x_map, k, rows.source_y + 64 * half, rows.source_plane);
    }
    __device__ void copy_b(unsigned char* to, int half, const Copy& copy) const {
      if constexpr (kWeights == Weights::kColumns) {
#pragma unroll
        for (int box = 0; box < Shape::kColumns / 64; ++box) {
          copy(to + box * kBoxBytes + half * kBoxBytes / 2, product.w_map, column + box * 64, k + half * kWeightRows,
               group);
        }
      } else if constexpr (kWeights == Weights::kRows) {
        copy(to + half * kWeightRows * kBoxRowBytes, product.w_map, k, column + half * kWeightRows, group);
      } else {
        copy(to + half * kWeightRows * kBoxRowBytes, product.w_map, k, column, 2 * group + half);
      }
    }
    __device__ void advance() { k += kBlockK; }
  };

  __device__ Source source(const Tile& tile) const {
    Source source{*this, row_block<kBlockM>(problem.rows, tile.group, tile.row_block), tile.group,
                  tile.column_block * kColumns};
    if constexpr (kGathers) source.gathered.find(problem.rows, source.rows);
    return source;
  }

  // Scales of one step after another, of this thread's rows and of the columns of the tile.
  class Scales {
   public:
    __device__ Scales(const MProduct& product, const Tile& tile) {
      const MGroupedGemm& problem = product.problem;
      const RowBlock block = row_block<kBlockM>(problem.rows, tile.group, tile.row_block);
      const int blocks = product.steps(tile);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of_thread(half);
        int64_t source = static_cast<int64_t>(block.source_plane) * problem.rows.segment_rows + block.source_y + row;
        if constexpr (kGathers) source = source_row(problem.rows, block.row + row, block.row + block.count);
        rows_[half] = row < block.count ? problem.x_scales + source * blocks : nullptr;
        const int64_t matrix = kWeights == Weights::kSwiGLU ? 2 * tile.group + half : tile.group;
        columns_[half] = problem.w_scales + scale_line(matrix, tile.column_block * kColumns, problem.n) * blocks;
      }
    }

    __device__ StepScales next() {
      StepScales scales;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scales.rows[half] = rows_[half] ? rows_[half][step_] : 0.0f;
        scales.columns[half] = columns_[half][step_];
      }
      ++step_;
      return scales;
    }

   private:
    const float *rows_[2], *columns_[2];
    int step_ = 0;
  };

  class Output {
   public:
    __device__ Output(const MProduct& product, GemmShared<Shape>& shared)
        : product_(product), boxes_(shared.boxes[threadIdx.x / 128 - 1]) {}

    __device__ void begin(const Tile&) {}
    __device__ void finish() { boxes_.finish(); }

    __device__ void write(const Tile& tile, const Accumulators<Shape>& c) {
      const MGroupedGemm& problem = product_.problem;
      RowBlock rows = row_block<kBlockM>(problem.rows, tile.group, tile.row_block);
      if (!Shape::kPingPong) skip_rows(rows, (static_cast<int>(threadIdx.x) / 128 - 1) * 64);
#pragma unroll
      for (int half = 0; half < Shape::kHalves; ++half) {
        if (rows.count > 0) write_half(tile.column_block * kColumns, rows, c[half]);
        skip_rows(rows, 64);
      }
    }

   private:
    __device__ static void skip_rows(RowBlock& rows, int count) {
      rows.row += count;
      rows.y += count;
      rows.count -= count;
    }

    __device__ void write_half(int column, const RowBlock& rows, const float (&c)[Shape::kColumns / 2]) {
      const MGroupedGemm& problem = product_.problem;
      T* y = static_cast<T*>(problem.y) + static_cast<int64_t>(rows.row) * problem.n;
      T* z = static_cast<T*>(problem.z) + static_cast<int64_t>(rows.row) * 2 * problem.n;
      float weights[2] = {1.0f, 1.0f};
      if (kWeights == Weights::kSwiGLU && problem.weights) {
        row_weights(weights, problem.weights, rows.row, rows.count, problem.rows.segment_rows);
      }
#pragma unroll
      for (int part = 0; part < kColumns / 64; ++part) {
        const int start = part * kBoxFragments, x = column + part * 64;
        if (x >= problem.n) break;
        if constexpr (kWeights != Weights::kSwiGLU) {
          send(product_.y_map, y, problem.n, rows, x, [&](int i) { return c[start + i]; });
        } else {
          constexpr int kUp = kColumns / 2;
          send(product_.y_map, y, problem.n, rows, x,
               [&](int i) { return swiglu(c[start + i], c[kUp + start + i], weights[i / 2 % 2]); });
          if (problem.z) {
            send(product_.gate_map, z, 2 * problem.n, rows, x, [&](int i) { return c[start + i]; });
            send(product_.up_map, z + problem.n, 2 * problem.n, rows, x, [&](int i) { return c[kUp + start + i]; });
          }
        }
      }
    }

    template <typename Value>
    __device__ void send(const device::TensorMap& map, T* out, int64_t pitch, const RowBlock& rows, int x,
                         Value value) {
      write_box<T>(boxes_.acquire(), value);
      if (rows.count >= 64 || rows_end_with_plane(product_.problem.rows)) {
        boxes_.send(map, x, rows.y, rows.plane);
      } else {  // the copy engine would write into the rows of the next group
        boxes_.send_rows(out + x, pitch, rows.count, product_.problem.n - x);
      }
    }

    const MProduct& product_;
    OutgoingBoxes<Shape::kBoxes> boxes_;
  };
};

}  // namespace parrot::cuda
