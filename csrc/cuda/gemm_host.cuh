// Host side of the matrix products: tensors as planes of rows for the copy engine, and the choice of a schedule.
#pragma once

#include "gemm_kernel.cuh"

namespace parrot::cuda {

// Rows of `width` columns that kernels read or write, in the planes that gemm_walk.cuh names: of the results, ...
inline device::Planes result_planes(const RaggedRows& rows, int64_t width, int64_t pitch) {
  const int64_t v = rows.segment_rows;
  if (gathers_segments(rows)) return {width, v, rows.segments, pitch};
  if (!rows.offsets) return {width, v * rows.source_segments, rows.groups, pitch};
  return {width, v * rows.segments, 1, pitch};
}

// ... and of the source.
inline device::Planes source_planes(const RaggedRows& rows, int64_t width) {
  const int64_t v = rows.segment_rows;
  if (rows.plan) return {width, v, rows.source_segments, width};
  return {width, v * (rows.offsets ? rows.segments : rows.source_segments), 1, width};
}

// Makes tensor maps until one fails.
class Maps {
 public:
  explicit Maps(bool bfloat16) : bfloat16_(bfloat16) {}

  void add(device::TensorMap& map, const void* base, const device::Planes& planes, int box_rows) {
    if (!error_) error_ = device::make_tensor_map(&map, base, bfloat16_, planes, box_rows);
  }
  int error() const { return error_; }

 private:
  bool bfloat16_;
  int error_ = 0;
};

// Whether tiles of 192 columns in ping-pong take less time than those of 256. Clocks of a model, not measured: the
// products of a step, and what the end of a tile costs where nothing runs beside it.
inline bool prefers_short(int64_t row_blocks, int64_t columns, int64_t steps) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  constexpr int64_t kEnd = 2500;
  const auto waves = [&](int width) {
    return ceil_div(row_blocks * ceil_div(columns, width), device::multiprocessors());
  };
  const int64_t wide = waves(WideShape::kColumns) * (steps * 1024 + kEnd);
  const int64_t narrow = waves(ShortShape::kColumns) * steps * 800 + kEnd;
  return narrow < wide;
}

}  // namespace parrot::cuda
