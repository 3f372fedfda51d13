// SwiGLU on accumulators, forward and backward. Exponential and division are the fast ones, exact to a few units in the
// last place of float: results are rounded to 16 bits.
#pragma once

#include "device.cuh"

namespace parrot::cuda {

// 0 and not NaN where exp overflows.
__device__ __forceinline__ float fast_sigmoid(float x) {
  return device::fast_divide(1.0f, 1.0f + device::fast_exp(-x));
}

__device__ __forceinline__ float swiglu(float gate, float up, float weight) {
  return gate * fast_sigmoid(gate) * up * weight;
}

struct SwiGLUGradient {
  float hidden;  // weight * silu(gate) * up
  float of_gate, of_up, of_weight;
};

// `grad` is that of weight * silu(gate) * up.
__device__ __forceinline__ SwiGLUGradient swiglu_bwd(float gate, float up, float grad, float weight) {
  const float sigmoid = fast_sigmoid(gate), silu = gate * sigmoid, h = silu * up, weighted = grad * weight;
  return {h * weight, weighted * up * (sigmoid + silu * (1.0f - sigmoid)), weighted * silu, h * grad};
}

// Weights of this thread's rows lane / 4 and lane / 4 + 8 of its warp, the first row of the warp group being `row` of
// segments of `segment_rows` rows; 0 from row `count` on.
__device__ __forceinline__ void row_weights(float (&out)[2], const float* weights, int row, int count,
                                            int segment_rows) {
  const int lane = threadIdx.x % 32, first = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = first + 8 * half;
    out[half] = own < count ? weights[(row + own) / segment_rows] : 0.0f;
  }
}

}  // namespace parrot::cuda
