// Launchers of topk_routing: plain pointers, no torch. n rows, E experts, K topk; outputs as in the contract
// (kernels/parrot_kernels/topk_routing).
#pragma once

#include <stdint.h>

#include "dtype.h"

namespace parrot::cuda {

constexpr int kMaxRoutedExperts = 512;
constexpr int kMaxExpertGroups = 32;
constexpr int kTileRows = 256;  // rows that a block routes; no more than these take one launch

struct TopKInputs {
  const void* logits;        // [n, E]
  const float* expert_bias;  // [E] or null
  int32_t rows, experts, topk, groups, topk_groups;
  int32_t dtype, renormalize, sigmoid;
  float scaling_factor;
};

struct TopKForward {
  float* probs;                // [n, E]
  float* scores;               // [n, E]
  float* lse;                  // [n]
  float* score_sums;           // [E]
  float* z_sum;                // [1]
  int64_t* topk_indices;       // [n, K]
  int32_t* tokens_per_expert;  // [E]
  int32_t* expert_offsets;     // [E + 1]
  int64_t* plan;               // [n * K]
  int32_t* tile_counts;        // [E, tiles], scratch of several tiles
  float* tile_sums;            // [E + 1, tiles], scratch of several tiles: score sums, and the sums of lse squared
};

struct TopKBackward {
  const float* grad_probs;       // [n, E] or null
  const float* grad_scores;      // [n, E] or null
  const float* grad_lse;         // [n] or null
  const float* grad_score_sums;  // [E] or null
  const float* grad_z_sum;       // [1] or null
  const int64_t* topk_indices;   // [n, K]
  void* grad_logits;             // [n, E]
};

// Each returns a cudaError_t. At least one row.
extern "C" int parrot_topk_routing_fwd(const TopKInputs* in, const TopKForward* out, void* stream);
extern "C" int parrot_topk_routing_bwd(const TopKInputs* in, const TopKBackward* out, void* stream);

}  // namespace parrot::cuda
