#include "ragged_rows.h"

#include <limits>

namespace parrot::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1024;

int32_t int32_of(int64_t value, const char* name) {
  STD_TORCH_CHECK(0 <= value && value <= kMost, name, " must be in [0, ", kMost, "], got ", value);
  return static_cast<int32_t>(value);
}

int32_t width_of(int64_t width, const char* name) {
  STD_TORCH_CHECK(width > 0 && width % 8 == 0, name, " must be a positive multiple of 8, got ", width);
  return int32_of(width, name);
}

bool is_bfloat16(const Tensor& x, const char* name) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  " must be bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  return dtype == ScalarType::BFloat16;
}

RaggedRows checked_rows(const Tensor& source, const std::optional<Tensor>& maybe_offsets,
                        const std::optional<Tensor>& maybe_plan, int64_t topk, int64_t segments, int64_t groups) {
  PARROT_CHECK_SHAPE(source, -1, -1, -1);
  RaggedRows rows{};
  if (maybe_offsets) {
    const Tensor& offsets = *maybe_offsets;
    PARROT_CHECK_SHAPE(offsets, groups + 1);
    PARROT_CHECK_DEVICE(offsets, source);
    PARROT_CHECK_CONTIGUOUS(offsets);
    rows.wide_offsets = offsets.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(rows.wide_offsets || offsets.scalar_type() == ScalarType::Int,
                    "offsets must be int32 or int64, got ", torch::headeronly::toString(offsets.scalar_type()));
    rows.offsets = offsets.const_data_ptr();
  } else {
    STD_TORCH_CHECK(!maybe_plan, "a plan needs offsets");
    STD_TORCH_CHECK(segments == groups * source.size(0), "without offsets there must be ", groups, " * ",
                    source.size(0), " segments, got ", segments);
  }
  if (maybe_plan) {
    const Tensor& plan = *maybe_plan;
    PARROT_CHECK_SHAPE(plan, segments);
    PARROT_CHECK_DENSE(plan, Long, source);
    rows.plan = plan.const_data_ptr<int64_t>();
    STD_TORCH_CHECK(topk >= 1, "topk must be at least 1, got ", topk);
  } else if (maybe_offsets) {
    PARROT_CHECK_SHAPE(source, segments, -1, -1);
  }
  STD_TORCH_CHECK(source.size(1) > 0, "segments must have at least one row");
  int32_of(segments * source.size(1), "the number of rows");
  rows.topk = int32_of(topk, "topk");
  rows.groups = int32_of(groups, "the number of groups");
  rows.segments = int32_of(segments, "the number of segments");
  rows.segment_rows = int32_of(source.size(1), "rows of a segment");
  rows.source_segments = int32_of(source.size(0), "the number of source segments");
  return rows;
}

int32_t scaled_depth(const Tensor& x, const Tensor& x_scales, const Tensor& w, const Tensor& w_scales, int64_t n) {
  PARROT_CHECK_DTYPE(x, Float8_e4m3fn);
  PARROT_CHECK_CONTIGUOUS(x);
  PARROT_CHECK_ALIGNED(x);
  PARROT_CHECK_OPERAND(w, x);
  const int64_t k = x.size(2), blocks = blocks_of_scales(k);
  STD_TORCH_CHECK(k > 0 && k % 16 == 0, "K must be a positive multiple of 16, got ", k);
  PARROT_CHECK_SHAPE(x_scales, x.size(0), x.size(1), blocks);
  PARROT_CHECK_DENSE(x_scales, Float, x);
  PARROT_CHECK_SHAPE(w_scales, w.size(0) * (w.dim() == 4 ? 2 : 1), blocks_of_scales(n), blocks);
  PARROT_CHECK_DENSE(w_scales, Float, x);
  return int32_of(k / 2, "K");
}

}  // namespace parrot::cuda
