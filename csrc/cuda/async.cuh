// Operands of wgmma as descriptors, on top of the asynchronous primitives.
#pragma once

#include "device.cuh"

#ifdef PARROT_DEVICE_EMULATOR
#include "async_emulator.h"
#else
#include "hopper_async.cuh"
#include "hopper_products.cuh"
#endif

namespace parrot::cuda {

// Matrix descriptor (PTX ISA, "Asynchronous warpgroup level matrix shared memory layout") of an operand that the copy
// engine wrote with the 128-byte swizzle: boxes of rows of 64 elements, groups of 8 rows 1024 bytes apart. For an M- or
// N-major operand, `box_bytes` leads from one box of 64 columns to the next.
__device__ __forceinline__ uint64_t descriptor(const void* shared, int box_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((device::shared_address(shared) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(box_bytes >> 4) << 16 | static_cast<uint64_t>(1024 >> 4) << 32 | kSwizzle128 << 62;
}

template <bool kTransposedA, bool kTransposedB, int kCount>
__device__ __forceinline__ void wgmma(float (&c)[kCount], uint64_t a, uint64_t b, const BFloat16*) {
  device::wgmma_bfloat16<kTransposedA, kTransposedB>(c, a, b);
}

template <bool kTransposedA, bool kTransposedB, int kCount>
__device__ __forceinline__ void wgmma(float (&c)[kCount], uint64_t a, uint64_t b, const Float16*) {
  device::wgmma_float16<kTransposedA, kTransposedB>(c, a, b);
}

// c += a . b of a warp group: [64, 16] by [16, 2 * kCount].
template <typename T, bool kTransposedA, bool kTransposedB, int kCount>
__device__ __forceinline__ void wgmma(float (&c)[kCount], uint64_t a, uint64_t b) {
  wgmma<kTransposedA, kTransposedB>(c, a, b, static_cast<const T*>(nullptr));
}

}  // namespace parrot::cuda
