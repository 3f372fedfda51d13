// Products of a few rows with the weights of a linear layer, [M, K] x [N, K]^T. A row's sums do not depend on how many
// other rows there are: each output is one chain of eight partial sums over K.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simd.h"

namespace parrot {

constexpr int64_t kLanes = 8;
constexpr int64_t kColumns = 12;  // weights whose sums are worked out together; a multiple of the tiles below

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef float LooseLanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef uint16_t HalfLanes __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(2), may_alias));
typedef uint32_t IntLanes __attribute__((vector_size(kLanes * sizeof(uint32_t))));

PARROT_INLINE void load_lanes(const float* from, Lanes& to) {
  to = *reinterpret_cast<const LooseLanes*>(from);
}
PARROT_INLINE void load_lanes(const BFloat16* from, Lanes& to) {
  const HalfLanes half = *reinterpret_cast<const HalfLanes*>(from);
  to = reinterpret_cast<Lanes>(__builtin_convertvector(half, IntLanes) << 16);
}

PARROT_INLINE float sum_lanes(const Lanes& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// out[m * stride + n] = row m of x . weight n, for MR rows and NR weights. Their sums must stay in registers, so all
// indices are known before the compiler lays out arrays: folds, not loops.
template <int MR, int NR, class T, int... M, int... N, int... I>
PARROT_INLINE void dot_tile(const float* x, const T* w, int64_t depth, float* out, int64_t stride,
                            std::integer_sequence<int, M...>, std::integer_sequence<int, N...>,
                            std::integer_sequence<int, I...>) {
  Lanes sums[MR * NR] = {};
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Lanes weights[NR], rows[MR];
    (load_lanes(w + N * depth + k, weights[N]), ...);
    (load_lanes(x + M * depth + k, rows[M]), ...);
    ((sums[I] += rows[I / NR] * weights[I % NR]), ...);
  }
  float totals[MR * NR] = {sum_lanes(sums[I])...};
  for (; k < depth; ++k) {
    ((totals[I] += x[I / NR * depth + k] * load(w[I % NR * depth + k])), ...);
  }
  ((out[I / NR * stride + I % NR] = totals[I]), ...);
}

template <int MR, int NR, class T>
PARROT_INLINE void dot_columns(const float* x, const T* w, int64_t depth, int64_t count, float* out, int64_t stride) {
  constexpr std::make_integer_sequence<int, MR> rows;
  int64_t n = 0;
  for (; n + NR <= count; n += NR) {
    dot_tile<MR, NR>(x, w + n * depth, depth, out + n, stride, rows, std::make_integer_sequence<int, NR>(),
                     std::make_integer_sequence<int, MR * NR>());
  }
  for (; n < count; ++n) {
    dot_tile<MR, 1>(x, w + n * depth, depth, out + n, stride, rows, std::make_integer_sequence<int, 1>(), rows);
  }
}

// Columns [first, last) of out [rows, stride] = x [rows, depth] times weights [first, last) of w [N, depth].
template <class T>
PARROT_INLINE void multiply(const float* x, int64_t rows, const T* w, int64_t depth, int64_t first, int64_t last,
                            float* out, int64_t stride) {
  for (int64_t n = first; n < last; n += kColumns) {
    const int64_t count = std::min(kColumns, last - n);
    const T* own = w + n * depth;
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) dot_columns<4, 3>(x + m * depth, own, depth, count, out + m * stride + n, stride);
    const float* rest = x + m * depth;
    float* to = out + m * stride + n;
    if (rows - m == 3) dot_columns<3, 4>(rest, own, depth, count, to, stride);
    if (rows - m == 2) dot_columns<2, 4>(rest, own, depth, count, to, stride);
    if (rows - m == 1) dot_columns<1, 6>(rest, own, depth, count, to, stride);
  }
}

}  // namespace parrot
