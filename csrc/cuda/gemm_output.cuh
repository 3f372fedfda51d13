// The way out of the accumulators: boxes of 64 rows and 64 columns in shared memory, one set for each warp group, which
// the copy engine takes to global memory while the warp group goes on.
#pragma once

#include "async.cuh"

namespace parrot::cuda {

constexpr int kBoxRowBytes = 128;  // 64 elements of 16 bits: the width of the swizzle
constexpr int kBoxBytes = 64 * kBoxRowBytes;
constexpr int kBoxFragments = 32;          // accumulators of a thread in 64 columns
constexpr int kFirstWarpGroupBarrier = 1;  // and the next; 0 is __syncthreads
constexpr int kComputeBarrier = 3;         // of both warp groups

// Where this thread's accumulators 4 * j + 2 * half and the next belong in a box with the 128-byte swizzle (fragments
// of wgmma: eight columns are four accumulators, two for row lane / 4 and two for row lane / 4 + 8).
__device__ __forceinline__ uint32_t* fragment_of(unsigned char* box, int j, int half) {
  const int lane = threadIdx.x % 32, row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4 + 8 * half;
  return reinterpret_cast<uint32_t*>(box + row * kBoxRowBytes + ((j ^ lane / 4) * 16) + lane % 4 * 4);
}

// Writes 64 columns of 64 rows; `value(i)` is the accumulator i of these columns.
template <typename T, typename Value>
__device__ __forceinline__ void write_box(unsigned char* box, Value value) {
  const T* type = nullptr;
#pragma unroll
  for (int j = 0; j < kBoxFragments / 4; ++j) {
    *fragment_of(box, j, 0) = pack2(value(4 * j), value(4 * j + 1), type);
    *fragment_of(box, j, 1) = pack2(value(4 * j + 2), value(4 * j + 3), type);
  }
}

__device__ __forceinline__ void unpack2(uint32_t word, float& low, float& high, const BFloat16*) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}

__device__ __forceinline__ void unpack2(uint32_t word, float& low, float& high, const Float16*) {
  device::unpack_half2(word, low, high);
}

// Boxes of one warp group, used in turn. All its threads call each function.
template <int kBoxes>
class OutgoingBoxes {
 public:
  __device__ explicit OutgoingBoxes(unsigned char (&boxes)[kBoxes][kBoxBytes]) : boxes_(boxes) {}

  // Waits until the copy engine has read the next box, which may be written then.
  __device__ unsigned char* acquire() {
    if (is_leader()) device::stores_wait_read<kBoxes - 1>();
    synchronize();
    return boxes_[next_];
  }

  // Starts the copy of the box that was acquired last, cut at the edges of the tensor.
  __device__ void send(const device::TensorMap& map, int x, int y, int z) {
    publish();
    if (is_leader()) device::store_box(map, boxes_[next_], x, y, z);
    commit();
  }

  // Writes only the first `rows` rows, of which `columns` columns exist, to `out` and on at a distance of `pitch`.
  template <typename T>
  __device__ void send_rows(T* out, int64_t pitch, int rows, int columns) {
    publish();
    const int thread = threadIdx.x % 128, vector = thread % 8;
    for (int row = thread / 8; row < rows && vector * 8 < columns; row += 16) {
      const auto* bytes = boxes_[next_] + row * kBoxRowBytes + (vector ^ row % 8) * 16;
      *reinterpret_cast<uint4*>(out + row * pitch + vector * 8) = *reinterpret_cast<const uint4*>(bytes);
    }
    commit();
  }

  // Threads must not end before their boxes have been read.
  __device__ void finish() {
    if (is_leader()) device::stores_wait_read<0>();
  }

  __device__ static bool is_leader() { return threadIdx.x % 128 == 0; }

  __device__ static void synchronize() {
    device::named_barrier(kFirstWarpGroupBarrier + static_cast<int>(threadIdx.x) / 128 - 1, 128);
  }

  __device__ static void publish() {
    device::fence_shared_writes();
    synchronize();
  }

 private:
  __device__ void commit() {  // a group for each box, even an empty one: they are counted
    if (is_leader()) device::stores_commit();
    next_ = next_ + 1 == kBoxes ? 0 : next_ + 1;
  }

  unsigned char (&boxes_)[kBoxes][kBoxBytes];
  int next_ = 0;
};

}  // namespace parrot::cuda
