// Attention of requests' rows to a paged cache. T query rows, S requests, n = g * r heads, d head width, blocks of N
// rows. key_cache, value_cache [B, g, N, d]. The r query heads of a key head are rows of one product: each key is read
// once for all of them, and for several query rows of a request.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../common/check.h"
#include "launchers.h"
#include "simd.h"

namespace parrot {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 32;         // keys that are scored before their values are added up
constexpr int64_t kRowsPerTask = 16;  // query rows times heads of a task, unless a single query row has more heads

template <class T>
struct Inputs {
  const T* query;        // [T, g, r, d]
  const T* keys;         // [B, g, N, d]
  const T* values;       // [B, g, N, d]
  const int32_t* table;  // [S, W]
  const float* columns;  // [P, 2]
  const bool* visible;   // [B, N], or null
  T* out;                // [T, g, r, d]
  float* extra;          // [g, r, T, 2]
  int64_t rows, groups, repeat, width, block_size, table_width, positions;
  bool has_columns;
  float scale;
};

// Query rows [first, last) of a request, whose first position is `position`, and one key head.
struct Task {
  int64_t request, group, first, last, position;
};

// Of `count` <= kTile positions from `start` on: where each row is in the caches.
template <class T>
PARROT_INLINE void locate(const Inputs<T>& in, const Task& task, int64_t start, int64_t count, int64_t* at,
                          bool* seen) {
  const int32_t* table = in.table + task.request * in.table_width;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t block = table[(start + j) / in.block_size], row = (start + j) % in.block_size;
    at[j] = ((block * in.groups + task.group) * in.block_size + row) * in.width;
    seen[j] = in.visible == nullptr || in.visible[block * in.block_size + row];
  }
}

// scores[j] = query . key j, four keys at a time so that the query is read once for them.
template <class T>
PARROT_INLINE void score(const float* query, const T* keys, const int64_t* at, int64_t count, int64_t width,
                         float* scores) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const T *k0 = keys + at[j], *k1 = keys + at[j + 1], *k2 = keys + at[j + 2], *k3 = keys + at[j + 3];
    float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < width; ++i) {
      s0 += query[i] * load(k0[i]);
      s1 += query[i] * load(k1[i]);
      s2 += query[i] * load(k2[i]);
      s3 += query[i] * load(k3[i]);
    }
    scores[j] = s0, scores[j + 1] = s1, scores[j + 2] = s2, scores[j + 3] = s3;
  }
  for (; j < count; ++j) {
    const T* key = keys + at[j];
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += query[i] * load(key[i]);
    scores[j] = sum;
  }
}

// sums += weights . values
template <class T>
PARROT_INLINE void add_values(const float* weights, const T* values, const int64_t* at, int64_t count, int64_t width,
                              float* sums) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const T *v0 = values + at[j], *v1 = values + at[j + 1], *v2 = values + at[j + 2], *v3 = values + at[j + 3];
    const float w0 = weights[j], w1 = weights[j + 1], w2 = weights[j + 2], w3 = weights[j + 3];
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      sums[i] += w0 * load(v0[i]) + w1 * load(v1[i]) + w2 * load(v2[i]) + w3 * load(v3[i]);
    }
  }
  for (; j < count; ++j) {
    const T* value = values + at[j];
    const float weight = weights[j];
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) sums[i] += weight * load(value[i]);
  }
}

// State of one row of the online softmax.
struct Row {
  float top, total, extra0, extra1;
};

// Scores [count] of one row become weights; returns the factor of what was summed before.
PARROT_INLINE float to_weights(float* scores, const bool* seen, int64_t count, Row* row) {
  float top = row->top;
  for (int64_t j = 0; j < count; ++j) top = seen[j] && scores[j] > top ? scores[j] : top;
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < count; ++j) {
    const float weight = seen[j] ? exp_clamped(scores[j] - top) : 0.0f;
    scores[j] = weight;
    total += weight;
  }
  const float shrink = row->total > 0.0f ? exp_clamped(row->top - top) : 0.0f;
  row->top = top;
  row->total = row->total * shrink + total;
  return shrink;
}

template <class T>
PARROT_INLINE void attend(const Inputs<T>& in, const Task& task, std::vector<float>& buffer) {
  const int64_t width = in.width, count = (task.last - task.first) * in.repeat;
  buffer.assign(static_cast<size_t>(count * 2 * width), 0.0f);
  float *queries = buffer.data(), *sums = queries + count * width;
  std::vector<Row> rows(static_cast<size_t>(count), Row{-std::numeric_limits<float>::infinity(), 0.0f, 0.0f, 0.0f});
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = ((task.first + r / in.repeat) * in.groups + task.group) * in.repeat + r % in.repeat;
    for (int64_t i = 0; i < width; ++i) queries[r * width + i] = load(in.query[at * width + i]) * in.scale;
  }
  int64_t at[kTile];
  bool seen[kTile];
  float scores[kTile];
  const int64_t length = task.position + task.last - task.first;
  for (int64_t start = 0; start < length; start += kTile) {
    const int64_t tile = std::min(kTile, length - start);
    locate(in, task, start, tile, at, seen);
    const bool any = std::any_of(seen, seen + tile, [](bool one) { return one; });
    for (int64_t r = 0; any && r < count; ++r) {
      // Rows before the last one see fewer keys.
      const int64_t own = std::min(tile, task.position + r / in.repeat + 1 - start);
      if (own <= 0 || std::none_of(seen, seen + own, [](bool one) { return one; })) continue;
      score(queries + r * width, in.keys, at, own, width, scores);
      const float shrink = to_weights(scores, seen, own, &rows[r]);
      float* sum = sums + r * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) sum[i] *= shrink;
      add_values(scores, in.values, at, own, width, sum);
      if (!in.has_columns) continue;
      rows[r].extra0 *= shrink, rows[r].extra1 *= shrink;
      for (int64_t j = 0; j < std::min(own, in.positions - start); ++j) {
        rows[r].extra0 += scores[j] * in.columns[2 * (start + j)];
        rows[r].extra1 += scores[j] * in.columns[2 * (start + j) + 1];
      }
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = task.first + r / in.repeat, head = task.group * in.repeat + r % in.repeat;
    const float inverse = rows[r].total > 0.0f ? 1.0f / rows[r].total : 0.0f;
    T* out = in.out + (row * in.groups * in.repeat + head) * width;
    for (int64_t i = 0; i < width; ++i) store(&out[i], sums[r * width + i] * inverse);
    if (!in.has_columns) continue;
    float* extra = in.extra + (head * in.rows + row) * 2;
    extra[0] = rows[r].extra0 * inverse, extra[1] = rows[r].extra1 * inverse;
  }
}

#ifdef PARROT_X86
template <class T>
PARROT_AVX2 void attend_avx2(const Inputs<T>& in, const Task& task, std::vector<float>& buffer) {
  attend(in, task, buffer);
}
#endif

template <class T>
void run(const Inputs<T>& in, const std::vector<Task>& tasks) {
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer;
    for (int64_t index = begin; index < end; ++index) {
#ifdef PARROT_X86
      if (has_avx2()) {
        attend_avx2(in, tasks[static_cast<size_t>(index)], buffer);
        continue;
      }
#endif
      attend(in, tasks[static_cast<size_t>(index)], buffer);
    }
  });
}

struct Sizes {
  int64_t rows, heads, width, blocks, groups, block_size, requests, table_width;
};

std::vector<Task> make_tasks(const Sizes& s, const Tensor& table, const Tensor& bounds_in, const Tensor& lengths_in) {
  const int32_t *bounds = bounds_in.const_data_ptr<int32_t>(), *lengths = lengths_in.const_data_ptr<int32_t>();
  const int32_t* blocks = table.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(bounds[0] == 0 && bounds[s.requests] == s.rows, "cu_seqlens_q must go from 0 to ", s.rows, ", got ",
                  bounds[0], " to ", bounds[s.requests]);
  std::vector<Task> tasks;
  const int64_t step = std::max<int64_t>(1, kRowsPerTask / (s.heads / s.groups));
  for (int64_t request = 0; request < s.requests; ++request) {
    const int64_t first = bounds[request], last = bounds[request + 1], length = lengths[request];
    STD_TORCH_CHECK(first <= last && last - first <= length && length <= s.table_width * s.block_size, "request ",
                    request, " has ", last - first, " query rows and ", length, " positions in a table of ",
                    s.table_width, " blocks of ", s.block_size, " rows");
    for (int64_t at = 0; first < last && at < length; at += s.block_size) {
      const int64_t block = blocks[request * s.table_width + at / s.block_size];
      STD_TORCH_CHECK(block >= 0 && block < s.blocks, "block_tables of request ", request, " must be in [0, ", s.blocks,
                      "), got ", block);
    }
    for (int64_t group = 0; group < s.groups; ++group) {
      for (int64_t row = first; row < last; row += step) {
        const int64_t stop = std::min(row + step, last);
        tasks.push_back({request, group, row, stop, length - (last - row)});
      }
    }
  }
  return tasks;
}

Sizes check_inputs(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& table,
                   const Tensor& bounds, const Tensor& lengths, const Tensor& columns, const Tensor& visible,
                   const Tensor& out, const Tensor& extra) {
  PARROT_CHECK_SHAPE(query, -1, -1, -1);
  PARROT_CHECK_SHAPE(table, -1, -1);
  PARROT_CHECK_SHAPE(keys, -1, -1, -1, query.size(2));
  const Sizes s{query.size(0), query.size(1), query.size(2), keys.size(0),
                keys.size(1),  keys.size(2),  table.size(0), table.size(1)};
  PARROT_CHECK_SHAPE(values, s.blocks, s.groups, s.block_size, s.width);
  PARROT_CHECK_SHAPE(bounds, s.requests + 1);
  PARROT_CHECK_SHAPE(lengths, s.requests);
  PARROT_CHECK_SHAPE(columns, -1, 2);
  PARROT_CHECK_SHAPE(out, s.rows, s.heads, s.width);
  if (visible.numel()) PARROT_CHECK_SHAPE(visible, s.blocks, s.block_size);
  if (extra.numel()) PARROT_CHECK_SHAPE(extra, s.heads, s.rows, 2);
  STD_TORCH_CHECK(s.groups > 0 && s.heads % s.groups == 0, "query heads must be a multiple of key heads, got ", s.heads,
                  " and ", s.groups);
  for (const Tensor* tensor : {&query, &keys, &values, &table, &bounds, &lengths, &columns, &visible, &out, &extra}) {
    PARROT_CHECK_CPU(*tensor);
    PARROT_CHECK_CONTIGUOUS(*tensor);
  }
  for (const Tensor* tensor : {&table, &bounds, &lengths}) PARROT_CHECK_DTYPE(*tensor, Int);
  for (const Tensor* tensor : {&keys, &values, &out}) {
    STD_TORCH_CHECK(tensor->scalar_type() == query.scalar_type(), "caches and out must have the dtype of query");
  }
  PARROT_CHECK_DTYPE(columns, Float);
  PARROT_CHECK_DTYPE(extra, Float);
  PARROT_CHECK_DTYPE(visible, Bool);
  return s;
}

}  // namespace

void paged_attention(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& table,
                     const Tensor& bounds, const Tensor& lengths, const Tensor& columns, const Tensor& visible,
                     double scale, Tensor out, Tensor extra) {
  const Sizes s = check_inputs(query, keys, values, table, bounds, lengths, columns, visible, out, extra);
  const std::vector<Task> tasks = make_tasks(s, table, bounds, lengths);
  const auto launch = [&]<class T>(T) {
    run(Inputs<T>{.query = query.const_data_ptr<T>(),
                  .keys = keys.const_data_ptr<T>(),
                  .values = values.const_data_ptr<T>(),
                  .table = table.const_data_ptr<int32_t>(),
                  .columns = columns.const_data_ptr<float>(),
                  .visible = visible.numel() ? visible.const_data_ptr<bool>() : nullptr,
                  .out = out.mutable_data_ptr<T>(),
                  .extra = extra.mutable_data_ptr<float>(),
                  .rows = s.rows,
                  .groups = s.groups,
                  .repeat = s.heads / s.groups,
                  .width = s.width,
                  .block_size = s.block_size,
                  .table_width = s.table_width,
                  .positions = columns.size(0),
                  .has_columns = extra.numel() > 0,
                  .scale = static_cast<float>(scale)},
        tasks);
  };
  if (query.scalar_type() == ScalarType::BFloat16) return launch(BFloat16{});
  PARROT_CHECK_DTYPE(query, Float);
  launch(0.0f);
}

}  // namespace parrot

STABLE_TORCH_LIBRARY_FRAGMENT(parrot_ext, m) {
  m.def(
      "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor cu_seqlens_q, "
      "Tensor kv_lengths, Tensor columns, Tensor visible, float scale, Tensor(a!) out, Tensor(b!) extra) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(parrot_ext, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&parrot::paged_attention));
}
