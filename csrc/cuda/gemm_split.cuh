// The last wave of tiles, too few for all multiprocessors: the reduction of each is split, the parts are added up in
// float and in their order by the block that arrives last. Which one that is changes no bit.
#pragma once

#include "gemm_pipeline.cuh"

namespace parrot::cuda {

constexpr int kPartStride = 128 * kWarpGroups;  // threads
template <typename Shape>
constexpr int kPartVectors = Shape::kColumns / 8;  // of four accumulators of a thread
template <typename Shape>
constexpr int64_t kPartBytes = int64_t{16} * kPartVectors<Shape> * kPartStride;  // of a tile

// Parts of the tiles of one warp group, as it has its accumulators.
template <typename Shape>
class SplitTile {
 public:
  using Boxes = OutgoingBoxes<Shape::kBoxes>;

  __device__ SplitTile(const Tile& tile, int parts, void* partials) : parts_(parts), unit_(unit_of(tile)) {
    first_ = reinterpret_cast<uint4*>(static_cast<unsigned char*>(partials) + unit_ * parts * kPartBytes<Shape>) +
             threadIdx.x - 128;
  }

  // Leaves this block's part in memory. True in the warp group that comes last: it finds all parts there.
  __device__ bool leave(const Accumulators<Shape>& c, int part, int32_t* arrived, int& before) const {
    uint4* own = first_ + part * (kPartBytes<Shape> / 16);
#pragma unroll
    for (int i = 0; i < kPartVectors<Shape>; ++i) {
      own[i * kPartStride] = {__float_as_uint(c[0][4 * i]), __float_as_uint(c[0][4 * i + 1]),
                              __float_as_uint(c[0][4 * i + 2]), __float_as_uint(c[0][4 * i + 3])};
    }
    __threadfence();
    Boxes::synchronize();
    if (Boxes::is_leader()) {
      int32_t* counter = arrived + unit_ * kWarpGroups + (static_cast<int>(threadIdx.x) / 128 - 1);
      before = device::arrive(counter);
      if (before == parts_ - 1) *counter = 0;
    }
    Boxes::synchronize();
    return before == parts_ - 1;
  }

  // Accumulators [start, start + kCount) of the whole reduction.
  template <int kCount>
  __device__ void sum(float* out, int start) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = 0.0f;
    for (int part = 0; part < parts_; ++part) {
      const uint4* next = first_ + part * (kPartBytes<Shape> / 16) + start / 4 * kPartStride;
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
        const uint4 bits = device::load_shared_result(next + i * kPartStride);
        out[4 * i] += __uint_as_float(bits.x);
        out[4 * i + 1] += __uint_as_float(bits.y);
        out[4 * i + 2] += __uint_as_float(bits.z);
        out[4 * i + 3] += __uint_as_float(bits.w);
      }
    }
  }

 private:
  __device__ static int64_t unit_of(const Tile& tile) {
    return static_cast<int64_t>(tile.tail) * kCluster + device::cluster_rank();
  }

  int parts_;
  int64_t unit_;
  uint4* first_;
};

}  // namespace parrot::cuda
