// The device primitives as instructions of Hopper (sm_90a), and launches through the CUDA runtime.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace parrot::cuda::device {

// The dynamic shared memory of this block as one object.
template <typename Storage>
__device__ __forceinline__ Storage& shared_storage() {
  extern __shared__ __align__(1024) unsigned char parrot_shared_bytes[];
  return *reinterpret_cast<Storage*>(parrot_shared_bytes);
}

// Counts one more arrival and returns how many came before. What the caller could see before is visible to whoever
// arrives later, to the whole block of each after a barrier.
__device__ __forceinline__ int arrive(int32_t* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// 16 bytes that will not be needed again: they leave no trace in the first-level cache.
__device__ __forceinline__ uint4 load_streaming(const void* address) {
  uint4 out;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "l"(address));
  return out;
}

// What another block has written, past the first-level cache.
__device__ __forceinline__ uint4 load_shared_result(const uint4* address) {
  return __ldcg(address);
}

// A few units in the last place off; exp to 0 and infinity beyond its range, x / infinity = 0.
__device__ __forceinline__ float fast_exp(float x) {
  return __expf(x);
}
__device__ __forceinline__ float fast_divide(float x, float y) {
  return __fdividef(x, y);
}

__device__ __forceinline__ void unpack_half2(uint32_t word, float& low, float& high) {
  asm("{\n.reg .f16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
      : "=f"(low), "=f"(high)
      : "r"(word));
}

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ uint32_t pack_bfloat2(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// c += a . b for a [16, 16] (row-major), b [16, 8] (column-major): the fragments of PTX mma.m16n8k16.
#define PARROT_MMA(name, type)                                                                                         \
  __device__ __forceinline__ void name(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, \
                                       uint32_t b1) {                                                                  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                         \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                         \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                               \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                       \
  }
PARROT_MMA(mma_bfloat16, "bf16")
PARROT_MMA(mma_float16, "f16")
#undef PARROT_MMA

// The number of this block in its cluster.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// How many blocks this cluster has.
__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// All threads of all blocks of the cluster; what they wrote before is visible to all of them afterwards.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same object in the shared memory of another block of the cluster, which must not have ended.
template <typename T>
__device__ __forceinline__ T* in_block(T* shared, int rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(address);
}

constexpr size_t kSharedBytesOfEveryKernel = 48 * 1024;

struct Launch {
  dim3 grid;
  int threads;
  size_t shared_bytes;
  void* stream;
  int cluster = 1;  // blocks that run together and reach each other's shared memory
};

// Returns a cudaError_t.
template <typename... Parameters>
int launch(const Launch& shape, void (*kernel)(Parameters...), const Parameters&... arguments) {
  if (shape.shared_bytes > kSharedBytesOfEveryKernel) {
    const int error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(shape.stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace parrot::cuda::device
