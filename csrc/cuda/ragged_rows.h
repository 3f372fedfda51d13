// Torch side of ragged rows: checks of what the products of rows in groups have in common.
#pragma once

#include <optional>

#include "grouped_gemm.h"
#include "host.h"

namespace parrot::cuda {

// `value` as int32; row numbers are int32 on the device.
int32_t int32_of(int64_t value, const char* name);

// A width must be a positive multiple of 8.
int32_t width_of(int64_t width, const char* name);

// Blocks of numbers of float8 that share a scale.
inline int64_t blocks_of_scales(int64_t width) {
  return (width + kScaleBlock - 1) / kScaleBlock;
}

// Whether x is bfloat16; else it must be float16.
bool is_bfloat16(const torch::stable::Tensor& x, const char* name = "x");

// Rows of `source` [S, V, ...] in `segments` = J segments: read through the plan when there is one; without offsets
// each of the `groups` groups takes all of them, J = groups * S.
RaggedRows checked_rows(const torch::stable::Tensor& source, const std::optional<torch::stable::Tensor>& offsets,
                        const std::optional<torch::stable::Tensor>& plan, int64_t topk, int64_t segments,
                        int64_t groups);

// Checks float8 x [S, V, K] and w [P, N, K] or [G, 2, N, K] with their scales, and returns K as pairs of numbers.
int32_t scaled_depth(const torch::stable::Tensor& x, const torch::stable::Tensor& x_scales,
                     const torch::stable::Tensor& w, const torch::stable::Tensor& w_scales, int64_t n);

}  // namespace parrot::cuda
