// One row of topk_routing in a warp: scores, groups, the K best. Expert e lies in lane e % 32, place e / 32.
#pragma once

#include <math.h>

#include "device.cuh"
#include "topk_routing.h"

namespace parrot::cuda {

constexpr float kEpsilon = 1e-20f;  // keeps sums of scores that all underflowed from dividing by zero

__device__ __forceinline__ float as_float(float value) {
  return value;
}
__device__ __forceinline__ float as_float(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float as_float(Float16 value) {
  float low, high;
  device::unpack_half2(value.bits, low, high);
  return low;
}

// A whole number that orders as the float does, NaN above all and -0 equal to 0. Zero stands for no float.
__device__ __forceinline__ uint32_t ordered(float value) {
  if (value != value) return 0xffffffffu;
  if (value == 0.0f) return 0x80000000u;
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The float that `ordered` was given.
__device__ __forceinline__ float restored(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// What all rows have in common, and where this lane stands.
template <int kPlaces>
struct Experts {
  int count, lane;

  __device__ explicit Experts(int experts) : count(experts), lane(static_cast<int>(threadIdx.x % 32)) {}
  __device__ int at(int place) const { return place * 32 + lane; }
  __device__ bool exists(int place) const { return at(place) < count; }
};

// Scores of a row and the log-sum-exp of its logits.
template <typename T, int kPlaces>
struct RowScores {
  float logits[kPlaces], scores[kPlaces];
  float shift, total;  // softmax[e] = exp(logits[e] - shift) / total
  float lse;

  __device__ RowScores(const Experts<kPlaces>& experts, const T* row, bool sigmoid) {
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      logits[i] = experts.exists(i) ? as_float(row[experts.at(i)]) : -INFINITY;
      top = fmaxf(top, logits[i]);
    }
    top = warp_max(top);
    const bool infinite =
        top == INFINITY || top == -INFINITY;  // then the sum below is the right one for lse, and the softmax is NaN
    shift = infinite ? 0.0f : top;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) sum += experts.exists(i) ? expf(logits[i] - shift) : 0.0f;
    sum = warp_sum(sum);
    lse = shift + logf(sum);
    total = infinite ? NAN : sum;
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      scores[i] = !experts.exists(i) ? 0.0f : sigmoid ? 1.0f / (1.0f + expf(-logits[i])) : softmax(i);
    }
  }

  __device__ float softmax(int place) const { return expf(logits[place] - shift) / total; }
};

// The largest key of the warp that is left; takes its first expert out. Returns the expert; `key` is its key.
template <int kPlaces>
__device__ __forceinline__ int take_best(const Experts<kPlaces>& experts, uint32_t (&keys)[kPlaces], uint32_t& key) {
  uint32_t best = 0;
  int expert = 0x7fffffff;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    if (keys[i] > best) {
      best = keys[i];
      expert = experts.at(i);
    }
  }
  key = __reduce_max_sync(kFullWarp, best);
  expert = static_cast<int>(__reduce_min_sync(kFullWarp, best == key ? static_cast<unsigned>(expert) : 0x7fffffffu));
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    if (experts.at(i) == expert) keys[i] = 0;
  }
  return expert;
}

// Bit g: group g is one of the topk_groups best. A group counts the sum of its best values, in falling order.
template <int kPlaces>
__device__ __forceinline__ uint32_t best_groups(const TopKInputs& in, const Experts<kPlaces>& experts,
                                                const uint32_t (&values)[kPlaces]) {
  const int size = in.experts / in.groups, best = in.topk < 2 * in.topk_groups ? 1 : in.topk / in.topk_groups;
  uint32_t own = 0;  // of the group with the number of this lane
  for (int group = 0; group < in.groups; ++group) {
    uint32_t members[kPlaces];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const int expert = experts.at(i);
      members[i] = expert >= group * size && expert < (group + 1) * size ? values[i] : 0;
    }
    float sum = 0.0f;
    for (int k = 0; k < best; ++k) {
      uint32_t key;
      take_best(experts, members, key);
      sum += restored(key);
    }
    if (experts.lane == group) own = ordered(sum);
  }
  uint32_t chosen = 0;
  for (int k = 0; k < in.topk_groups; ++k) {
    const uint32_t most = __reduce_max_sync(kFullWarp, own);
    const int group = __ffs(__ballot_sync(kFullWarp, own == most)) - 1;
    chosen |= 1u << group;
    if (experts.lane == group) own = 0;
  }
  return chosen;
}

// What experts are chosen by, 0 for those that may not be.
template <typename T, int kPlaces>
__device__ __forceinline__ void selection_keys(const TopKInputs& in, const Experts<kPlaces>& experts,
                                               const RowScores<T, kPlaces>& row, uint32_t (&keys)[kPlaces]) {
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    const float value =
        in.expert_bias && experts.exists(i) ? row.scores[i] + in.expert_bias[experts.at(i)] : row.logits[i];
    keys[i] = experts.exists(i) ? ordered(value) : 0;
  }
  if (in.groups == 1) return;
  uint32_t values[kPlaces];
  const bool by_score = !in.expert_bias && (in.sigmoid || !in.renormalize);
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) values[i] = by_score && experts.exists(i) ? ordered(row.scores[i]) : keys[i];
  const uint32_t groups = best_groups(in, experts, values);
  const int size = in.experts / in.groups;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    if (experts.exists(i) && !(groups >> experts.at(i) / size & 1)) keys[i] = 0;
  }
}

}  // namespace parrot::cuda
