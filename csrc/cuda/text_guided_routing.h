// Launchers of text_guided_routing: plain pointers, no torch. S images, T text rows, H hidden_size, E experts.
#pragma once

#include <stdint.h>

#include "dtype.h"

namespace parrot::cuda {

constexpr int kMaxExperts = 64;

struct RoutingInputs {
  const void* query;          // [S, H], rows query_stride elements apart
  const void* text;           // [T, H]
  const void* text_start;     // [S], int32, or int64 when wide_spans
  const void* text_end;       // [S]
  const void* router_weight;  // [E, H]
  int64_t query_stride;
  int32_t images, rows, hidden, experts;
  int32_t dtype, wide_spans;
  float scale;
};

struct RoutingForward {
  float* logits;     // [S, E]
  float* lse;        // [S]
  float* projected;  // [T, E], scratch
  float* scores;     // [S, T], scratch
  int32_t* arrived;  // [S], zeros, and zeros again at the end: how many blocks have brought their rows of an image
};

struct RoutingBackward {
  const float* grad_logits;  // [S, E]
  const float* grad_lse;     // [S] or null
  const float* lse;          // [S]
  void* grad_query;          // [S, H], null when not needed
  void* grad_text;           // [T, H], null when not needed
  void* grad_router_weight;  // [E, H], null when not needed
  float* projected;          // [T, E], scratch
  float* scores;             // [S, T], scratch
  float* means;              // [S], scratch
  float* grad_projected;     // [T, E], scratch
  int32_t* arrived;          // [S], as in the forward pass
};

// Each returns a cudaError_t. At least one image; the backward pass also needs at least one row.
extern "C" int parrot_text_guided_routing_fwd(const RoutingInputs* in, const RoutingForward* out, void* stream);
extern "C" int parrot_text_guided_routing_bwd(const RoutingInputs* in, const RoutingBackward* out, void* stream);

}  // namespace parrot::cuda
