// Hopper's asynchronous machinery as instructions: barriers in shared memory, tensor copies (TMA), products of a warp
// group (wgmma), register budgets. Products are of 16-bit types with float accumulators.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace parrot::cuda::device {

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine. A block-wide barrier must follow for the other threads.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the same barrier of another block of the cluster.
__device__ __forceinline__ void barrier_arrive_in_block(Barrier* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Arrives, and makes the phase wait for `bytes` more from the copy engine.
__device__ __forceinline__ void barrier_arrive_expecting(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is complete; phases count from 0, and the one before the first counts as
// complete.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "retry_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry_%=;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The same where threads of other blocks arrive.
__device__ __forceinline__ void barrier_wait_of_cluster(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "retry_%=:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry_%=;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Orders this thread's ordinary writes to shared memory before later reads by wgmma and by stores of boxes. Each
// writer calls it, then a barrier.
__device__ __forceinline__ void fence_shared_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Waits for `threads` threads that name the same barrier; 0 belongs to __syncthreads.
__device__ __forceinline__ void named_barrier(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Starts the copy of one box at element (x, y, z) into shared memory; elements outside of the tensor are zeros. Its
// bytes count on `barrier`.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, Barrier* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same box to the same place in each block of the cluster whose bit is set in `blocks`; its bytes count on the
// barrier of each block.
__device__ __forceinline__ void copy_box_to_blocks(void* shared, const TensorMap& map, Barrier* barrier, int x, int y,
                                                   int z, uint32_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// Starts the copy of one box from shared memory to element (x, y, z); nothing is written outside of the tensor.
__device__ __forceinline__ void store_box(const TensorMap& map, const void* shared, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
               : "memory");
}

__device__ __forceinline__ void stores_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most kPending groups of stores that this thread committed have not read shared memory yet. A thread
// must not end before that.
template <int kPending>
__device__ __forceinline__ void stores_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Before the first product that uses registers or shared memory written by ordinary instructions.
__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending committed groups of products are under way.
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of the accumulators across this point.
__device__ __forceinline__ void pin(float (&c)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

#define PARROT_4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define PARROT_16(c, i) PARROT_4(c, i), PARROT_4(c, i + 4), PARROT_4(c, i + 8), PARROT_4(c, i + 12)
#define PARROT_64(c, i) PARROT_16(c, i), PARROT_16(c, i + 16), PARROT_16(c, i + 32), PARROT_16(c, i + 48)

// c (+)= a . b of one warp group, a [64, 16] and b [16, 256] in shared memory. Consecutive
// elements run along the 16 (K-major), or, when transposed, along the 64 or 256 (M- or N-major).
#define PARROT_WGMMA(name, type)                                                                          \
  template <bool kTransposedA, bool kTransposedB>                                                         \
  __device__ __forceinline__ void name(float (&c)[128], uint64_t a, uint64_t b, bool accumulate) {        \
    asm volatile(                                                                                         \
        "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %130, 0;\n"                                   \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                      \
        " {"                                                                                              \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
        "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
        "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
        "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, " \
        "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "   \
        "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"        \
        "}, %128, %129, accumulate, 1, 1, %131, %132;\n}"                                                 \
        : PARROT_64(c, 0), PARROT_64(c, 64)                                                               \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposedA), "n"(kTransposedB));       \
  }
PARROT_WGMMA(wgmma_bfloat16, "bf16")
PARROT_WGMMA(wgmma_float16, "f16")
#undef PARROT_WGMMA
#undef PARROT_64
#undef PARROT_16
#undef PARROT_4

// Describes a [depth, rows, width] tensor of 16-bit elements with dense rows, to be copied in boxes of [1, box_rows,
// 64] elements with the 128-byte swizzle. Returns 0, or a CUresult.
inline int make_tensor_map(TensorMap* map, const void* base, bool bfloat16, int64_t width, int64_t rows, int64_t depth,
                           int box_rows) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    return reinterpret_cast<Encode>(found == cudaDriverEntryPointSuccess ? entry : nullptr);
  }();
  if (!encode) return CUDA_ERROR_NOT_FOUND;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(depth)};
  const cuuint64_t strides[2] = {sizes[0] * 2, sizes[0] * sizes[1] * 2};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), 1}, steps[3] = {1, 1, 1};
  return encode(map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
                const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace parrot::cuda::device
