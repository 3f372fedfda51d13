// Runs the CUDA kernels of csrc/cuda on the CPU, every thread of a block a fiber, so that their indices, barriers and
// arithmetic can be tested where there is no GPU. -DPARROT_DEVICE_EMULATOR='"device_emulator.h"' puts this file in the
// place of hopper.cuh: what CUDA C++ has built in, then the primitives of csrc/cuda/device.cuh.
#pragma once

#include "fibers.h"

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

struct ThreadIndex {
  struct X {
    operator unsigned() const { return grid->running->thread; }
  } x;
};
struct BlockIndex {
  struct X {
    operator unsigned() const { return grid->running->block->index.x; }
  } x;
  struct Y {
    operator unsigned() const { return grid->running->block->index.y; }
  } y;
};
struct GridSize {
  struct X {
    operator unsigned() const { return grid->size.x; }
  } x;
};

// Every lane gives a value and may read those of the others.
template <typename Read>
auto exchange(uint64_t value, Read read) {
  Warp& own = warp();
  own.values[lane()] = value;
  wait(own.barrier);
  auto result = read(own.values);
  wait(own.barrier);
  return result;
}

template <typename T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

inline emulator::ThreadIndex threadIdx;
inline emulator::BlockIndex blockIdx;
inline emulator::GridSize gridDim;

inline float __uint_as_float(uint32_t bits) {
  return emulator::from_bits<float>(bits);
}
inline uint32_t __float_as_uint(float value) {
  return static_cast<uint32_t>(emulator::to_bits(value));
}
inline int __ffs(unsigned mask) {
  return __builtin_ffs(static_cast<int>(mask));
}
inline int __popc(unsigned mask) {
  return __builtin_popcount(mask);
}
inline void __syncthreads() {
  emulator::wait(emulator::grid->running->block->barrier);
}
inline void __threadfence() {}
inline void __syncwarp() {
  emulator::wait(emulator::warp().barrier);
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::exchange(emulator::to_bits(value),
                            [&](const uint64_t* all) { return emulator::from_bits<T>(all[source % 32]); });
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int own = static_cast<int>(emulator::lane());
  return __shfl_sync(mask, value, own < distance ? own : own - distance);
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return emulator::exchange(value, [](const uint64_t* all) { return unsigned(*std::max_element(all, all + 32)); });
}

inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  return emulator::exchange(value, [](const uint64_t* all) { return unsigned(*std::min_element(all, all + 32)); });
}

inline void atomicOr(uint32_t* address, uint32_t bits) {
  *address |= bits;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int width) {
  return __shfl_sync(mask, value, static_cast<int>(emulator::lane()) ^ width);
}

inline unsigned __ballot_sync(unsigned, bool value) {
  return emulator::exchange(value, [](const uint64_t* all) {
    unsigned mask = 0;
    for (int i = 0; i < 32; ++i) mask |= static_cast<unsigned>(all[i]) << i;
    return mask;
  });
}

namespace parrot::cuda::device {

constexpr int kDeadlock = 702, kInvalidConfiguration = 9;

template <typename Storage>
Storage& shared_storage() {
  return *reinterpret_cast<Storage*>(emulator::grid->running->block->shared);
}

inline int arrive(int32_t* counter) {
  return (*counter)++;
}

inline uint4 load_streaming(const void* address) {
  return *static_cast<const uint4*>(address);
}

inline uint4 load_shared_result(const uint4* address) {
  return *address;
}

inline float fast_exp(float x) {
  return expf(x);
}
inline float fast_divide(float x, float y) {
  return x / y;
}

inline float half_to_float(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

inline uint16_t float_to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}

inline float bfloat_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t float_to_bfloat(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = __float_as_uint(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void unpack_half2(uint32_t word, float& low, float& high) {
  low = half_to_float(static_cast<uint16_t>(word));
  high = half_to_float(static_cast<uint16_t>(word >> 16));
}
inline uint32_t pack_half2(float low, float high) {
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
inline uint32_t pack_bfloat2(float low, float high) {
  return float_to_bfloat(low) | static_cast<uint32_t>(float_to_bfloat(high)) << 16;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": where element (row, k) of a, (k, column) of b
// and (row, column) of c lie in the registers of the warp.
template <typename ToFloat>
void mma_any(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, ToFloat f) {
  emulator::Warp& warp = emulator::warp();
  const unsigned lane = emulator::lane();
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  std::copy(a, a + 4, warp.a[lane]);
  std::copy(b, b + 2, warp.b[lane]);
  emulator::wait(warp.barrier);
  const auto half_of = [&](uint32_t word, int k) { return f(static_cast<uint16_t>(word >> (k % 2 * 16))); };
  for (int i = 0; i < 4; ++i) {
    const int row = static_cast<int>(lane / 4) + 8 * (i / 2), column = static_cast<int>(lane % 4) * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2;
      const uint32_t left = warp.a[row % 8 * 4 + quad][row / 8 + 2 * (k / 8)];
      const uint32_t right = warp.b[column * 4 + quad][k / 8];
      c[i] += half_of(left, k) * half_of(right, k);
    }
  }
  emulator::wait(warp.barrier);
}

inline void mma_bfloat16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma_any(c, a0, a1, a2, a3, b0, b1, bfloat_to_float);
}
inline void mma_float16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma_any(c, a0, a1, a2, a3, b0, b1, half_to_float);
}

// The number of this block in its cluster.
inline int cluster_rank() {
  return static_cast<int>(emulator::grid->running->block->index.x % emulator::grid->blocks.size());
}

// How many blocks this cluster has.
inline int cluster_size() {
  return static_cast<int>(emulator::grid->blocks.size());
}

// All threads of all blocks of the cluster.
inline void cluster_sync() {
  emulator::wait(emulator::grid->cluster_barrier);
}

// The same object in the shared memory of another block of the cluster, which must not have ended.
template <typename T>
T* in_block(T* shared, int rank) {
  emulator::Block& other = *emulator::grid->blocks.at(rank);
  emulator::check(other.running > 0, "an access to the shared memory of a block that has ended");
  const auto* start = reinterpret_cast<const unsigned char*>(shared);
  return reinterpret_cast<T*>(other.shared + (start - emulator::grid->running->block->shared));
}

struct Launch {
  dim3 grid;
  int threads;
  size_t shared_bytes;
  void* stream;
  int cluster = 1;  // blocks that run together
};

// One cluster after the other, each to its end, in an order that the seed shuffles: a block that waits for one of a
// cluster that has not begun never ends, as on a device whose other multiprocessors are busy.
template <typename... Parameters>
int launch(const Launch& shape, void (*kernel)(Parameters...), const Parameters&... arguments) {
  emulator::Grid grid;
  emulator::grid = &grid;
  grid.size = shape.grid;
  grid.body = [&] { kernel(arguments...); };
  std::mt19937 random(emulator_seed);
  if (shape.grid.x % shape.cluster) return kInvalidConfiguration;
  std::vector<unsigned> clusters(shape.grid.x / shape.cluster);
  std::iota(clusters.begin(), clusters.end(), 0u);
  if (emulator_seed) std::shuffle(clusters.begin(), clusters.end(), random);
  for (const unsigned cluster : clusters) {
    for (int rank = 0; rank < shape.cluster; ++rank) {
      emulator::start_block(dim3(cluster * shape.cluster + rank), shape.threads, shape.shared_bytes);
    }
    if (!emulator::run_blocks(random)) return kDeadlock;
  }
  return 0;
}

inline int multiprocessors() {
  return emulator_multiprocessors;
}

}  // namespace parrot::cuda::device
