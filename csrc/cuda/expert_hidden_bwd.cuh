// The gradient of h as a product, with SwiGLU's backward pass on its accumulators: boxes of z come in, those of h and
// of the gradient of z leave, while the other warp group multiplies.
#pragma once

#include "expert_mlp.h"
#include "gemm_pipeline.cuh"
#include "swiglu.cuh"

namespace parrot::cuda {

template <typename T>
struct HiddenBackwardProduct {
  using Type = T;
  using Shape = FusedShape;
  static constexpr bool kTransposedA = false, kTransposedB = false, kScaled = false;
  static constexpr Gathered kGathered = Gathered::kNone;
  static constexpr int kWeightRows = Shape::kColumns / 2;  // of a box

  device::TensorMap grad_map, w_map, gate_map, up_map, h_map, grad_gate_map, grad_up_map;
  ExpertHiddenBackward problem;

  __device__ int groups() const { return problem.rows.groups; }
  __device__ int row_blocks(int group) const { return cuda::row_blocks<kBlockM>(problem.rows, group); }
  __device__ int column_blocks() const { return (problem.width + Shape::kColumns - 1) / Shape::kColumns; }
  __device__ SplitTail split() const { return {}; }
  __device__ int steps(const Tile&) const { return (problem.depth + kBlockK - 1) / kBlockK; }
  __device__ void prepare(GemmStage<Shape>&, const Tile&, int) const {}
  __device__ void clear() const {}

  struct Source {
    const HiddenBackwardProduct& product;
    RowBlock rows;
    int expert, column, k = 0;

    __device__ void copy_a(unsigned char* to, int half, const Copy& copy) const {
      copy(to + half * kBoxBytes, product.grad_map, k, rows.source_y + 64 * half, rows.source_plane);
    }
    __device__ void copy_b(unsigned char* to, int half, const Copy& copy) const {
      copy(to + half * kWeightRows * kBoxRowBytes, product.w_map, k, column + half * kWeightRows, expert);
    }
    __device__ void advance() { k += kBlockK; }
  };

  __device__ Source source(const Tile& tile) const {
    return {*this, row_block<kBlockM>(problem.rows, tile.group, tile.row_block), tile.group,
            tile.column_block * Shape::kColumns};
  }

  // Three boxes: gate and up, whose gradients take their places, and h.
  class Output {
   public:
    using Boxes = OutgoingBoxes<Shape::kBoxes>;

    __device__ Output(const HiddenBackwardProduct& product, GemmShared<Shape>& shared)
        : product_(product),
          boxes_(shared.boxes[threadIdx.x / 128 - 1]),
          input_(&shared.inputs[threadIdx.x / 128 - 1][0]) {}

    __device__ void begin(const Tile& tile) {
      const RowBlock rows = row_block<kBlockM>(product_.problem.rows, tile.group, tile.row_block);
      if (column(tile, 0) < product_.problem.width) fetch(column(tile, 0), rows.y, rows.plane);
    }

    __device__ void write(const Tile& tile, const Accumulators<Shape>& c) {
      const ExpertHiddenBackward& problem = product_.problem;
      const RowBlock rows = row_block<kBlockM>(problem.rows, tile.group, tile.row_block);
      if (column(tile, 0) >= problem.width) return;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = rows.row + 64 * half, y = rows.y + 64 * half, count = rows.count - 64 * half;
        if (count <= 0) break;
        float weights[2], totals[2] = {0.0f, 0.0f};
        row_weights(weights, problem.weights, row, count, problem.rows.segment_rows);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const int x = column(tile, part);
          if (x >= problem.width) break;
          device::barrier_wait(input_, phase_);
          phase_ ^= 1;
          transform(&c[half][part * kBoxFragments], weights, totals);
          send(x, y, rows.plane);
          if (part == 0 && column(tile, 1) < problem.width) {
            fetch(column(tile, 1), y, rows.plane);
          } else if (half == 0 && count > 64) {
            fetch(column(tile, 0), y + 64, rows.plane);
          }
        }
        write_sums(totals,
                   static_cast<int64_t>(tile.column_block) * problem.rows.segments * problem.rows.segment_rows + row,
                   count);
      }
    }

    __device__ void finish() {
      if (Boxes::is_leader()) device::stores_wait_read<0>();
    }

   private:
    enum Box { kGate, kUp, kHidden };

    __device__ static int column(const Tile& tile, int part) { return tile.column_block * Shape::kColumns + part * 64; }

    __device__ void fetch(int x, int y, int plane) {
      if (!Boxes::is_leader()) return;
      device::stores_wait_read<0>();
      device::barrier_arrive_expecting(input_, 2 * kBoxBytes);
      device::copy_box(boxes_[kGate], product_.gate_map, input_, x, y, plane);
      device::copy_box(boxes_[kUp], product_.up_map, input_, x, y, plane);
      // The box of h is written by threads that know of this wait by the barrier of this copy.
    }

    __device__ void send(int x, int y, int plane) {
      Boxes::publish();
      if (!Boxes::is_leader()) return;
      device::store_box(product_.grad_gate_map, boxes_[kGate], x, y, plane);
      device::store_box(product_.grad_up_map, boxes_[kUp], x, y, plane);
      device::store_box(product_.h_map, boxes_[kHidden], x, y, plane);
      device::stores_commit();
    }

    // 64 columns; `totals` of this thread's two rows.
    __device__ void transform(const float* grads, const float (&weights)[2], float (&totals)[2]) {
      const T* type = nullptr;
#pragma unroll
      for (int i = 0; i < kBoxFragments; i += 2) {
        const int row = i / 2 % 2;
        uint32_t* gate_word = fragment_of(boxes_[kGate], i / 4, row);
        uint32_t* up_word = fragment_of(boxes_[kUp], i / 4, row);
        float gates[2], ups[2], hidden[2];
        unpack2(*gate_word, gates[0], gates[1], type);
        unpack2(*up_word, ups[0], ups[1], type);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const SwiGLUGradient out = swiglu_bwd(gates[j], ups[j], grads[i + j], weights[row]);
          totals[row] += out.of_weight;
          gates[j] = out.of_gate;
          ups[j] = out.of_up;
          hidden[j] = out.hidden;
        }
        *gate_word = pack2(gates[0], gates[1], type);
        *up_word = pack2(ups[0], ups[1], type);
        *fragment_of(boxes_[kHidden], i / 4, row) = pack2(hidden[0], hidden[1], type);
      }
    }

    // Four neighbouring lanes have a row's sum together. `first` is the place of the first of the 64 rows.
    __device__ void write_sums(float (&totals)[2], int64_t first, int count) {
      const int lane = threadIdx.x % 32, row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = totals[half];
        total += __shfl_xor_sync(kFullWarp, total, 1);
        total += __shfl_xor_sync(kFullWarp, total, 2);
        if (lane % 4 == 0 && row + 8 * half < count) product_.problem.sums[first + row + 8 * half] = total;
      }
    }

    const HiddenBackwardProduct& product_;
    unsigned char (&boxes_)[Shape::kBoxes][kBoxBytes];
    device::Barrier* input_;
    uint32_t phase_ = 0;
  };
};

}  // namespace parrot::cuda
