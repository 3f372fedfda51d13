// What the CPU kernels share: float <-> storage conversions and exp() written so that compilers vectorise the loops
// they stand in, and a choice between two builds of a loop by what the processor has.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <bit>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define PARROT_X86 1
#define PARROT_AVX2 __attribute__((target("avx2,fma")))
#endif
#define PARROT_INLINE inline __attribute__((always_inline))

namespace parrot {

using BFloat16 = torch::headeronly::BFloat16;

// The binary is built for any x86-64; loops that gain from AVX2 exist twice and this picks one.
inline bool has_avx2() {
#ifdef PARROT_X86
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
#else
  return false;
#endif
}

PARROT_INLINE float load(float value) {
  return value;
}
PARROT_INLINE float load(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.x) << 16);
}

PARROT_INLINE void store(float* to, float value) {
  *to = value;
}
// Round to nearest even; a NaN becomes the quiet NaN 0x7fc0. Without branches, unlike c10's conversion.
PARROT_INLINE void store(BFloat16* to, float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->x = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// exp(x) to about 2 ulp for x in [-87, 88], the end values outside; NaN stays NaN. Range reduction and polynomial of
// Cephes.
PARROT_INLINE float exp_clamped(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  // Adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits of the mantissa.
  const float shifted = x * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const uint32_t exponent = (std::bit_cast<uint32_t>(shifted) - 0x4b400000u + 127u) << 23;
  return p * std::bit_cast<float>(exponent);
}

PARROT_INLINE float sigmoid(float x) {
  return 1.0f / (1.0f + exp_clamped(-x));
}

}  // namespace parrot
