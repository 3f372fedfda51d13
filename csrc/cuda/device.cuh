// What kernels use beyond the CUDA language itself: vectors of 16 bytes, tensor-core products, reductions, launches.
// Tests compile the same kernels as host C++ (tests/kernels/device_emulator.h); hence no inline assembly elsewhere.
#pragma once

#include <stdint.h>

#ifdef PARROT_DEVICE_EMULATOR
#include PARROT_DEVICE_EMULATOR
#else
#include "hopper.cuh"
#endif

namespace parrot::cuda {

// Element types as they lie in memory; arithmetic is done in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements of one 16-byte access

__device__ __forceinline__ void unpack(const uint4& bytes, float (&out)[4], const float*) {
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(words[i]);
}

__device__ __forceinline__ void unpack(const uint4& bytes, float (&out)[8], const BFloat16*) {
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void unpack(const uint4& bytes, float (&out)[8], const Float16*) {
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) device::unpack_half2(words[i], out[2 * i], out[2 * i + 1]);
}

__device__ __forceinline__ uint32_t pack2(float low, float high, const BFloat16*) {
  return device::pack_bfloat2(low, high);
}

__device__ __forceinline__ uint32_t pack2(float low, float high, const Float16*) {
  return device::pack_half2(low, high);
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&in)[8]) {
  const T* type = nullptr;
  return {pack2(in[0], in[1], type), pack2(in[2], in[3], type), pack2(in[4], in[5], type), pack2(in[6], in[7], type)};
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&in)[4]) {
  return {__float_as_uint(in[0]), __float_as_uint(in[1]), __float_as_uint(in[2]), __float_as_uint(in[3])};
}

// 16 bytes as floats. `address` is a multiple of 16; zeros where `valid` is false (nothing is read then).
template <typename T>
__device__ __forceinline__ void load_vector(const T* address, bool valid, float (&out)[kVector<T>]) {
  const uint4 bytes = valid ? *reinterpret_cast<const uint4*>(address) : uint4{0, 0, 0, 0};
  unpack(bytes, out, address);
}

template <typename T>
__device__ __forceinline__ void store_vector(T* address, const float (&in)[kVector<T>]) {
  *reinterpret_cast<uint4*>(address) = pack<T>(in);
}

__device__ __forceinline__ void store(float* address, float value) {
  *address = value;
}

template <typename T>
__device__ __forceinline__ void store(T* address, float value) {
  address->bits = static_cast<uint16_t>(pack2(value, 0.0f, address));
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) value += __shfl_xor_sync(kFullWarp, value, width);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, width));
  return value;
}

// Sums values[i] over the lanes for each i; lane i gets the i-th sum. 31 shuffles in place of 32 * 5.
__device__ __forceinline__ float warp_sum_transposed(float (&values)[32]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    const int width = 16 >> step;
    const bool upper = lane & width;
#pragma unroll
    for (int i = 0; i < 16; ++i) {  // a constant bound, so that `values` stays in registers
      if (i >= width) break;
      const float given = upper ? values[i] : values[i + width];
      const float kept = upper ? values[i + width] : values[i];
      values[i] = kept + __shfl_xor_sync(kFullWarp, given, width);
    }
  }
  return values[0];
}

}  // namespace parrot::cuda
