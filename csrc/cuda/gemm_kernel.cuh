// The kernel around the matrix products, and its launch.
#pragma once

#include "gemm_gather.cuh"
#include "gemm_pipeline.cuh"
#include "gemm_scaled.cuh"

namespace parrot::cuda {

// Blocks stay and take tile after tile, so that the copies of the next tile run under the end of the last one.
template <typename Product>
__global__ void __launch_bounds__(kGemmThreads, 1) gemm_kernel(const __grid_constant__ Product product) {
  using Shape = typename Product::Shape;
  using Shared = GemmShared<Shape>;
  static_assert(sizeof(Shared) <= 227 * 1024, "a block of Hopper has 227 KiB of shared memory");
  constexpr bool kGathers = Product::kGathered != Gathered::kNone;
  auto& shared = device::shared_storage<Shared>();
  init_barriers(shared, kGathers ? 1 + kGatheringWarps : 1);
  product.clear();
  if (threadIdx.x < 128) {
    device::lower_registers<kGathers ? kGatherRegisters : Shape::kCopyRegisters>();
    if constexpr (kGathers) {
      gather_tiles(product, shared);
    } else {
      if (threadIdx.x == 0) copy_tiles(product, shared);
    }
  } else {
    device::raise_registers<kGathers ? kComputeRegistersBesideGather : Shape::kComputeRegisters>();
    if constexpr (Product::kScaled) {
      compute_scaled_tiles(product, shared);
    } else {
      compute_tiles(product, shared);
    }
  }
}

// As many blocks as multiprocessors, in whole clusters. How many tiles there are only the device may know.
inline int blocks_of_gemm() {
  const int clusters = device::multiprocessors() / kCluster;
  return kCluster * (clusters > 0 ? clusters : 1);
}

template <typename Product>
int launch_gemm(const Product& product, void* stream) {
  const unsigned blocks = static_cast<unsigned>(blocks_of_gemm());
  return device::launch({dim3(blocks), kGemmThreads, sizeof(GemmShared<typename Product::Shape>), stream, kCluster},
                        gemm_kernel<Product>, product);
}

}  // namespace parrot::cuda
