// Products of a warp group (wgmma) as instructions: types of 16 and 8 bits, float accumulators.
#pragma once

#include <stdint.h>

namespace parrot::cuda::device {

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
template <int kCount>
__device__ __forceinline__ void pin(float (&c)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// Numbers and values of accumulators.
#define PARROT_NUMBERS_64                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
  "%62, %63"
#define PARROT_NUMBERS_96                                                                                  \
  PARROT_NUMBERS_64                                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PARROT_NUMBERS_128                                                                               \
  PARROT_NUMBERS_96                                                                                      \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PARROT_4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define PARROT_16(c, i) PARROT_4(c, i), PARROT_4(c, i + 4), PARROT_4(c, i + 8), PARROT_4(c, i + 12)
#define PARROT_32(c, i) PARROT_16(c, i), PARROT_16(c, i + 16)
#define PARROT_64(c) PARROT_32(c, 0), PARROT_32(c, 32)
#define PARROT_96(c) PARROT_64(c), PARROT_32(c, 64)
#define PARROT_128(c) PARROT_96(c), PARROT_32(c, 96)

// c += a . b of one warp group, a [64, 16] and b [16, columns] in shared memory. Consecutive elements run along the 16
// (K-major), or, when transposed, along the 64 or the columns (M- or N-major). `a_` and the following are the numbers
// of the operands after the accumulators.
#define PARROT_WGMMA(name, type, columns, count, a_, b_, transposed_a_, transposed_b_)                             \
  template <bool kTransposedA, bool kTransposedB>                                                                  \
  __device__ __forceinline__ void name(float (&c)[count], uint64_t a, uint64_t b) {                                \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" PARROT_NUMBERS_##count \
                 "}, " a_ ", " b_ ", 1, 1, 1, " transposed_a_ ", " transposed_b_ ";"                               \
                 : PARROT_##count(c)                                                                               \
                 : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB));                                          \
  }
#define PARROT_WGMMA_OF_TYPE(name, type)                        \
  PARROT_WGMMA(name, type, 128, 64, "%64", "%65", "%66", "%67") \
  PARROT_WGMMA(name, type, 192, 96, "%96", "%97", "%98", "%99") \
  PARROT_WGMMA(name, type, 256, 128, "%128", "%129", "%130", "%131")
PARROT_WGMMA_OF_TYPE(wgmma_bfloat16, "bf16")
PARROT_WGMMA_OF_TYPE(wgmma_float16, "f16")
#undef PARROT_WGMMA_OF_TYPE
#undef PARROT_WGMMA

// c = (kAdd ? c : 0) + a . b of one warp group in float8 (e4m3), a [64, 32] and b [32, 128], both K-major.
template <bool kAdd>
__device__ __forceinline__ void wgmma_e4m3(float (&c)[64], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" PARROT_NUMBERS_64 "}, %64, %65, %66, 1, 1;"
               : PARROT_64(c)
               : "l"(a), "l"(b), "n"(kAdd));
}
#undef PARROT_128
#undef PARROT_96
#undef PARROT_64
#undef PARROT_32
#undef PARROT_16
#undef PARROT_4
#undef PARROT_NUMBERS_128
#undef PARROT_NUMBERS_96
#undef PARROT_NUMBERS_64

}  // namespace parrot::cuda::device
