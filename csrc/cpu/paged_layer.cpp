// A decoder layer for the rows of a step over a paged cache: products, rotation, writing and attention in one call, as
// the host needs longer for twelve calls than they take. T rows, g key heads of width d with r query heads each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../common/check.h"
#include "launchers.h"
#include "simd.h"

namespace parrot {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct Rows {
  const T* mixed;          // [T, g, r + 2, d]: queries, key, value
  const T* q_norm;         // [d], or null
  const T* k_norm;         // [d], or null
  const T* cos;            // [T, d / 2]
  const T* sin;            // [T, 2, d / 2], with the signs of both halves
  const int64_t* blocks;   // [T]
  const int64_t* offsets;  // [T]
  T* query;                // [T, g, r, d]
  T* keys;                 // [B, g, N, d]
  T* values;               // [B, g, N, d]
  int64_t rows, groups, repeat, width, block_size;
  float eps;
};

// One head, normed where there is a norm, and turned.
template <class T>
PARROT_INLINE void turn_head(const Rows<T>& in, const T* head, const T* norm, int64_t row, float* normed, T* out) {
  const int64_t width = in.width, half = width / 2;
  float sum = 0.0f;
  for (int64_t i = 0; i < width; ++i) {
    normed[i] = load(head[i]);
    sum += normed[i] * normed[i];
  }
  if (norm != nullptr) {
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(width) + in.eps);
    for (int64_t i = 0; i < width; ++i) normed[i] *= factor * load(norm[i]);
  }
  const T *cos = in.cos + row * half, *sin = in.sin + row * width;
  for (int64_t i = 0; i < half; ++i) {
    const float first = normed[i], second = normed[half + i], c = load(cos[i]);
    store(&out[i], first * c + second * load(sin[i]));
    store(&out[half + i], second * c + first * load(sin[half + i]));
  }
}

// Queries are turned into `query`; keys and values go to their places in the cache.
template <class T>
void distribute(const Rows<T>& in) {
  std::vector<float> normed(static_cast<size_t>(in.width));
  for (int64_t row = 0; row < in.rows; ++row) {
    for (int64_t group = 0; group < in.groups; ++group) {
      const int64_t head = row * in.groups + group;
      const T* mixed = in.mixed + head * (in.repeat + 2) * in.width;
      for (int64_t r = 0; r < in.repeat; ++r) {
        T* out = in.query + (head * in.repeat + r) * in.width;
        turn_head(in, mixed + r * in.width, in.q_norm, row, normed.data(), out);
      }
      const int64_t place = (in.blocks[row] * in.groups + group) * in.block_size + in.offsets[row];
      const T *key = mixed + in.repeat * in.width, *value = key + in.width;
      turn_head(in, key, in.k_norm, row, normed.data(), in.keys + place * in.width);
      for (int64_t i = 0; i < in.width; ++i) in.values[place * in.width + i] = value[i];
    }
  }
}

void check_places(const Tensor& blocks, const Tensor& offsets, int64_t rows, const Tensor& keys) {
  for (const Tensor* tensor : {&blocks, &offsets}) {
    PARROT_CHECK_CPU(*tensor);
    PARROT_CHECK_CONTIGUOUS(*tensor);
    PARROT_CHECK_DTYPE(*tensor, Long);
    PARROT_CHECK_SHAPE(*tensor, rows);
  }
  const int64_t *block = blocks.const_data_ptr<int64_t>(), *offset = offsets.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(block[row] >= 0 && block[row] < keys.size(0) && offset[row] >= 0 && offset[row] < keys.size(2),
                    "row ", row, " must be in a cache of ", keys.size(0), " blocks of ", keys.size(2),
                    " rows, got block ", block[row], ", row ", offset[row]);
  }
}

}  // namespace

Tensor paged_layer(const Tensor& hidden, const Tensor& norm_1, const Tensor& w_qkv, const std::optional<Tensor>& b_qkv,
                   const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, const Tensor& cos,
                   const Tensor& sin, Tensor keys, Tensor values, const Tensor& blocks, const Tensor& offsets,
                   const Tensor& table, const Tensor& bounds, const Tensor& lengths, const Tensor& w_out,
                   const Tensor& norm_2, const Tensor& w_gate_up, const Tensor& w_down, double eps, double scale) {
  PARROT_CHECK_SHAPE(hidden, -1, -1);
  PARROT_CHECK_SHAPE(keys, -1, -1, -1, -1);
  const int64_t rows = hidden.size(0), groups = keys.size(1), width = keys.size(3);
  PARROT_CHECK_SHAPE(values, keys.size(0), groups, keys.size(2), width);
  PARROT_CHECK_SHAPE(w_out, hidden.size(1), -1);
  const int64_t heads = w_out.size(1) / width, repeat = heads / groups;
  STD_TORCH_CHECK(width % 2 == 0 && heads * width == w_out.size(1) && repeat * groups == heads,
                  "w_out must have columns for heads of an even width ", width, ", as many as are shared by ", groups,
                  " key heads, got ", w_out.size(1));
  PARROT_CHECK_SHAPE(w_qkv, (heads + 2 * groups) * width, hidden.size(1));
  PARROT_CHECK_SHAPE(cos, rows, 1, 1, 1, width / 2);
  PARROT_CHECK_SHAPE(sin, rows, 1, 1, 2, width / 2);
  check_places(blocks, offsets, rows, keys);
  for (const Tensor* tensor : {&cos, &sin, &static_cast<const Tensor&>(keys), &static_cast<const Tensor&>(values)}) {
    PARROT_CHECK_CPU(*tensor);
    PARROT_CHECK_CONTIGUOUS(*tensor);
    STD_TORCH_CHECK(tensor->scalar_type() == hidden.scalar_type(), "cos, sin and caches must have the dtype of hidden");
  }
  for (const std::optional<Tensor>* norm : {&q_norm, &k_norm}) {
    if (!norm->has_value()) continue;
    PARROT_CHECK_SHAPE(**norm, width);
    PARROT_CHECK_CONTIGUOUS(**norm);
    STD_TORCH_CHECK((*norm)->scalar_type() == hidden.scalar_type(), "norms must have the dtype of hidden");
  }
  const Tensor mixed = few_rows_linear(hidden, w_qkv, norm_1, b_qkv, std::nullopt, false, eps);
  const Tensor query = torch::stable::new_empty(hidden, {rows, heads, width});
  const auto launch = [&]<class T>(T) {
    distribute(Rows<T>{.mixed = mixed.const_data_ptr<T>(),
                       .q_norm = data_or_null<T>(q_norm),
                       .k_norm = data_or_null<T>(k_norm),
                       .cos = cos.const_data_ptr<T>(),
                       .sin = sin.const_data_ptr<T>(),
                       .blocks = blocks.const_data_ptr<int64_t>(),
                       .offsets = offsets.const_data_ptr<int64_t>(),
                       .query = query.mutable_data_ptr<T>(),
                       .keys = keys.mutable_data_ptr<T>(),
                       .values = values.mutable_data_ptr<T>(),
                       .rows = rows,
                       .groups = groups,
                       .repeat = repeat,
                       .width = width,
                       .block_size = keys.size(2),
                       .eps = static_cast<float>(eps)});
  };
  if (hidden.scalar_type() == ScalarType::BFloat16) {
    launch(BFloat16{});
  } else {
    PARROT_CHECK_DTYPE(hidden, Float);
    launch(0.0f);
  }
  const Tensor read = torch::stable::new_empty(hidden, {rows, heads, width});
  const Tensor columns = torch::stable::new_empty(hidden, {0, 2}, ScalarType::Float);
  const Tensor visible = torch::stable::new_empty(hidden, {0}, ScalarType::Bool);
  const Tensor extra = torch::stable::new_empty(hidden, {0}, ScalarType::Float);
  paged_attention(query, keys, values, table, bounds, lengths, columns, visible, scale, read, extra);
  const Tensor flat = torch::stable::view(read, {rows, heads * width});
  const Tensor attended = few_rows_linear(flat, w_out, std::nullopt, std::nullopt, hidden, false, eps);
  const Tensor gates = few_rows_linear(attended, w_gate_up, norm_2, std::nullopt, std::nullopt, false, eps);
  return few_rows_linear(gates, w_down, std::nullopt, std::nullopt, attended, true, eps);
}

}  // namespace parrot

STABLE_TORCH_LIBRARY_FRAGMENT(parrot_ext, m) {
  m.def(
      "paged_layer(Tensor hidden, Tensor norm_1, Tensor w_qkv, Tensor? b_qkv, Tensor? q_norm, Tensor? k_norm, "
      "Tensor cos, Tensor sin, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor blocks, Tensor offsets, "
      "Tensor block_tables, Tensor cu_seqlens_q, Tensor kv_lengths, Tensor w_out, Tensor norm_2, Tensor w_gate_up, "
      "Tensor w_down, float eps, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(parrot_ext, CPU, m) {
  m.impl("paged_layer", TORCH_BOX(&parrot::paged_layer));
}
