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

// Whether x is bfloat16; else it must be float16.
bool is_bfloat16(const torch::stable::Tensor& x);

// Rows of `source` [S, V, ...] in `segments` = J segments: read through the plan when there is one; without offsets
// each of the `groups` groups takes all of them, J = groups * S.
RaggedRows checked_rows(const torch::stable::Tensor& source, const std::optional<torch::stable::Tensor>& offsets,
                        const std::optional<torch::stable::Tensor>& plan, int64_t topk, int64_t segments,
                        int64_t groups);

}  // namespace parrot::cuda
