// The experts of an image as one product: the reduction runs over the columns of all of them, operands change at the
// edges between experts, and the accumulators stay. Forward this is the down-projection with the residual; backward, on
// the gradient of z, it is the gradient of x.
#pragma once

#include <type_traits>

#include "expert_mlp.h"
#include "gemm_scaled.cuh"
#include "gemm_split.cuh"

namespace parrot::cuda {

// Weights of 16 bits lie as [depth, width], those of float8 as [width, depth].
template <typename T, bool kScaled_>
struct CombineProduct {
  using Type = T;
  using Shape = std::conditional_t<kScaled_, ScaledShape, WideShape>;
  static constexpr bool kTransposedA = false, kTransposedB = !kScaled_, kScaled = kScaled_;
  static constexpr Gathered kGathered = Gathered::kNone;
  static constexpr int kWeightRows = kScaled ? Shape::kColumns / 2 : kBlockK / 2;  // of a box

  device::TensorMap a_map, w_map, residual_map, y_map;
  ExpertCombine problem;

  __device__ int groups() const { return problem.images; }
  __device__ int row_blocks(int) const { return (problem.rows + kBlockM - 1) / kBlockM; }
  __device__ int column_blocks() const { return (problem.width + Shape::kColumns - 1) / Shape::kColumns; }
  __device__ SplitTail split() const { return problem.split; }
  __device__ bool is_split(const Tile& tile) const { return tile.tail >= 0; }
  __device__ int steps_of_expert() const { return (problem.depth + kBlockK - 1) / kBlockK; }
  // Steps of part `tile.part` are [first_step(tile.part), first_step(tile.part + 1)).
  __device__ int first_step(int part, int parts) const {
    return static_cast<int>(static_cast<int64_t>(problem.topk) * steps_of_expert() * part / parts);
  }
  __device__ int steps(const Tile& tile) const {
    const int parts = is_split(tile) ? problem.split.parts : 1;
    return first_step(tile.part + 1, parts) - first_step(tile.part, parts);
  }
  __device__ void prepare(GemmStage<Shape>&, const Tile&, int) const {}
  __device__ void clear() const {}

  struct Source {
    const CombineProduct& product;
    int image, y, column, choice, k, place, expert;

    __device__ void find() {
      const ExpertCombine& problem = product.problem;
      if (choice >= problem.topk) return;  // the step after the last one
      const int64_t slot = static_cast<int64_t>(image) * problem.topk + choice;
      place = problem.places ? static_cast<int>(problem.places[slot]) : choice;
      expert = problem.places ? static_cast<int>(problem.experts[slot]) : choice;
    }
    // Past an expert's columns, past an image's rows, and at place -1 the copy engine gives zeros.
    __device__ void copy_a(unsigned char* to, int half, const Copy& copy) const {
      copy(to + half * kBoxBytes, product.a_map, k, y + 64 * half, place);
    }
    __device__ void copy_b(unsigned char* to, int half, const Copy& copy) const {
      if constexpr (kScaled) {
        copy(to + half * kWeightRows * kBoxRowBytes, product.w_map, k, column + half * kWeightRows, expert);
      } else {
#pragma unroll
        for (int box = 0; box < Shape::kColumns / 64; ++box) {
          copy(to + box * kBoxBytes + half * kBoxBytes / 2, product.w_map, column + box * 64, k + half * kWeightRows,
               expert);
        }
      }
    }
    __device__ void advance() {
      k += kBlockK;
      if (k < product.problem.depth) return;
      k = 0;
      ++choice;
      find();
    }
  };

  __device__ Source source(const Tile& tile) const {
    const int step = first_step(tile.part, is_split(tile) ? problem.split.parts : 1), per_expert = steps_of_expert();
    Source source{*this,
                  tile.group,
                  tile.row_block * kBlockM,
                  tile.column_block * Shape::kColumns,
                  step / per_expert,
                  step % per_expert * kBlockK,
                  0,
                  0};
    source.find();
    return source;
  }

  // Scales of one step after another, of this thread's rows and of the columns of the tile.
  class Scales {
   public:
    __device__ Scales(const CombineProduct& product, const Tile& tile) : source_(product.source(tile)) { find(); }

    __device__ StepScales next() {
      StepScales scales;
      const int step = source_.k / kBlockK, choice = source_.choice;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scales.rows[half] = rows_[half] ? rows_[half][step] : 0.0f;
        scales.columns[half] = columns_[step];
      }
      source_.advance();
      if (source_.choice != choice) find();
      return scales;
    }

   private:
    __device__ void find() {
      const ExpertCombine& problem = source_.product.problem;
      const int blocks = source_.product.steps_of_expert();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int y = source_.y + row_of_thread(half);
        const bool exists = source_.place >= 0 && y < problem.rows;
        const int64_t row = static_cast<int64_t>(source_.place) * problem.rows + y;
        rows_[half] = exists ? problem.a_scales + row * blocks : nullptr;
      }
      columns_ = problem.w_scales + scale_line(source_.expert, source_.column, problem.width) * blocks;
    }

    Source source_;
    const float *rows_[2], *columns_;
  };

  // Two boxes in turn: the residual comes into a box, the sum takes its place and leaves.
  class Output {
   public:
    using Boxes = OutgoingBoxes<Shape::kBoxes>;

    __device__ Output(const CombineProduct& product, GemmShared<Shape>& shared) : product_(product), shared_(shared) {}

    __device__ void begin(const Tile& tile) {
      if (!product_.is_split(tile) && exists(tile, 0)) fetch(tile, 0, box_);
    }

    __device__ void write(const Tile& tile, Accumulators<Shape>& c) {
      const ExpertCombine& problem = product_.problem;
      const bool is_split = product_.is_split(tile);
      const SplitTile<Shape> split(tile, problem.split.parts, problem.partials);
      if (is_split) {
        if (!split.leave(c, tile.part, problem.arrived, shared_.arrived[warp_group()])) return;
        if (exists(tile, 0)) fetch(tile, 0, box_);
      }
      const float scale = problem.residual_scale;
      const T* type = nullptr;
#pragma unroll
      for (int part = 0; part < Shape::kColumns / 64; ++part) {
        if (!exists(tile, part)) break;
        if (part + 1 < Shape::kColumns / 64 && exists(tile, part + 1)) fetch(tile, part + 1, box_ ^ 1);
        if (is_split) split.template sum<kBoxFragments>(&c[0][part * kBoxFragments], part * kBoxFragments);
        unsigned char* box = boxes()[box_];
        device::barrier_wait(&shared_.inputs[warp_group()][box_], phase_ >> box_ & 1);
        phase_ ^= 1u << box_;
#pragma unroll
        for (int i = 0; i < kBoxFragments; i += 2) {
          uint32_t* word = fragment_of(box, i / 4, i / 2 % 2);
          float low, high;
          unpack2(*word, low, high, type);
          const float* sum = &c[0][part * kBoxFragments + i];
          *word = pack2(sum[0] + scale * low, sum[1] + scale * high, type);
        }
        Boxes::publish();
        if (Boxes::is_leader()) {
          device::store_box(product_.y_map, box, column(tile, part), row(tile), tile.group);
          device::stores_commit();
        }
        box_ ^= 1;
      }
    }

    __device__ void finish() {
      if (Boxes::is_leader()) device::stores_wait_read<0>();
    }

   private:
    __device__ static int warp_group() { return static_cast<int>(threadIdx.x) / 128 - 1; }
    __device__ static int row(const Tile& tile) { return tile.row_block * kBlockM + 64 * warp_group(); }
    __device__ static int column(const Tile& tile, int part) { return tile.column_block * Shape::kColumns + part * 64; }
    __device__ auto& boxes() { return shared_.boxes[warp_group()]; }

    // Whether 64 columns of this warp group's rows have any elements.
    __device__ bool exists(const Tile& tile, int part) const {
      return row(tile) < product_.problem.rows && column(tile, part) < product_.problem.width;
    }

    __device__ void fetch(const Tile& tile, int part, int box) {
      if (!Boxes::is_leader()) return;
      device::stores_wait_read<0>();  // the box was read before
      device::Barrier* input = &shared_.inputs[warp_group()][box];
      device::barrier_arrive_expecting(input, kBoxBytes);
      device::copy_box(boxes()[box], product_.residual_map, input, column(tile, part), row(tile), tile.group);
    }

    const CombineProduct& product_;
    GemmShared<Shape>& shared_;
    int box_ = 0;
    uint32_t phase_ = 0;  // a bit for each box
  };
};

}  // namespace parrot::cuda
