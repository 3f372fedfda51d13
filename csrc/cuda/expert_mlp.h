// Launchers of the products that only `expert_mlp` has: plain pointers, no torch. Names of sizes as in the contract
// (kernels/parrot_kernels/expert_mlp): J segments, n images, V rows of an image, E experts, K choices of an image.
#pragma once

#include "grouped_gemm.h"

namespace parrot::cuda {

// y[i] = residual_scale * residual[i] + sum over k of a[places[i, k]] . w[experts[i, k]]. Place -1 adds nothing.
// Without places (dense) both are k, and all rows are those of one image.
// With scales a and w are float8 (e4m3), w is [E, width, depth], and `depth` counts pairs of them, as numbers of 16
// bits.
struct ExpertCombine {
  const void* a;           // [J, V, depth]
  const void* w;           // [E, depth, width]
  const float* a_scales;   // [J, V, blocks of depth], or null
  const float* w_scales;   // [E, blocks of width, blocks of depth], or null
  const int64_t* places;   // [n, K] or null
  const int64_t* experts;  // [n, K]
  const void* residual;    // [n, V, width]
  void* y;                 // [n, V, width]
  float residual_scale;
  int32_t images, rows, segments, topk, experts_count, depth, width;
  int32_t bfloat16;
  SplitTail split;
  void* partials;    // of tiles whose reduction is split, see combine_scratch_bytes
  int32_t* arrived;  // combine_counters(), at zero between launches
};

// With g = grad . w_down[e].T, which is not stored: h = weights * swiglu(z), grad_z = weights * g * swiglu'(z), and for
// each row and block of columns the sum of g * swiglu(z).
struct ExpertHiddenBackward {
  RaggedRows rows;
  const void* grad;      // [S, V, H]
  const void* w_down;    // [E, I, H]
  const void* z;         // [J, V, 2, I]
  const float* weights;  // [J]
  void* h;               // [J, V, I]
  void* grad_z;          // [J, V, 2, I]
  float* sums;           // [hidden_backward_blocks(I), J, V]
  int32_t width, depth;  // I, H
  int32_t bfloat16;
};

// Sets `problem->split` for the current device.
extern "C" void parrot_plan_expert_combine(ExpertCombine* problem);
extern "C" int64_t parrot_combine_scratch_bytes(const ExpertCombine* problem);
extern "C" int64_t parrot_combine_counters(const ExpertCombine* problem);
extern "C" int32_t parrot_hidden_backward_blocks(int32_t width);

// Each returns 0, a cudaError_t, or a CUresult of the tensor maps. Widths are multiples of 8, pointers of 16 bytes; no
// size is zero.
extern "C" int parrot_expert_combine(const ExpertCombine* problem, void* stream);
extern "C" int parrot_expert_hidden_bwd(const ExpertHiddenBackward* problem, void* stream);

}  // namespace parrot::cuda
