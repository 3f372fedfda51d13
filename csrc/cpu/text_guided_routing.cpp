// Router logits guided by text spans, float32. S images, T text rows, H hidden_size, E experts.
// `projected` [T, E] = text @ router_weight.T is formed by the caller (a BLAS product); what depends on spans is done
// here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "simd.h"

namespace parrot {
namespace {

using torch::stable::Tensor;

PARROT_INLINE float dot_body(const float* a, const float* b, int64_t size) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

PARROT_INLINE void axpy_body(float scale, const float* x, float* y, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] += scale * x[i];
}

#ifdef PARROT_X86
PARROT_AVX2 float dot_avx2(const float* a, const float* b, int64_t size) {
  return dot_body(a, b, size);
}
PARROT_AVX2 void axpy_avx2(float scale, const float* x, float* y, int64_t size) {
  axpy_body(scale, x, y, size);
}
#endif

float dot(const float* a, const float* b, int64_t size) {
#ifdef PARROT_X86
  if (has_avx2()) return dot_avx2(a, b, size);
#endif
  return dot_body(a, b, size);
}

void axpy(float scale, const float* x, float* y, int64_t size) {
#ifdef PARROT_X86
  if (has_avx2()) return axpy_avx2(scale, x, y, size);
#endif
  axpy_body(scale, x, y, size);
}

struct Inputs {
  int64_t images, rows, hidden, experts;
  const float* query;
  const float* text;
  const int64_t* start;
  const int64_t* end;
  const float* projected;

  Inputs(const Tensor& query_in, const Tensor& text_in, const Tensor& start_in, const Tensor& end_in,
         const Tensor& projected_in)
      : images(query_in.size(0)), rows(text_in.size(0)), hidden(query_in.size(1)), experts(projected_in.size(1)) {
    PARROT_CHECK_SHAPE(text_in, rows, hidden);
    PARROT_CHECK_SHAPE(start_in, images);
    PARROT_CHECK_SHAPE(end_in, images);
    PARROT_CHECK_SHAPE(projected_in, rows, experts);
    for (const Tensor* tensor : {&query_in, &text_in, &projected_in}) {
      PARROT_CHECK_CPU(*tensor);
      PARROT_CHECK_DTYPE(*tensor, Float);
      PARROT_CHECK_CONTIGUOUS(*tensor);
    }
    for (const Tensor* tensor : {&start_in, &end_in}) {
      PARROT_CHECK_CPU(*tensor);
      PARROT_CHECK_DTYPE(*tensor, Long);
      PARROT_CHECK_CONTIGUOUS(*tensor);
    }
    query = query_in.const_data_ptr<float>();
    text = text_in.const_data_ptr<float>();
    start = start_in.const_data_ptr<int64_t>();
    end = end_in.const_data_ptr<int64_t>();
    projected = projected_in.const_data_ptr<float>();
    for (int64_t s = 0; s < images; ++s) {
      STD_TORCH_CHECK(start[s] >= 0 && end[s] <= rows, "span of image ", s, " must lie in [0, ", rows, "], got [",
                      start[s], ", ", end[s], ")");
    }
  }

  int64_t length(int64_t image) const { return std::max<int64_t>(end[image] - start[image], 0); }
};

// Attention of one image over its span into `attention` [length]; returns the log-sum-exp of the scores.
float attend(const Inputs& in, int64_t image, float scale, float* attention) {
  const int64_t length = in.length(image);
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < length; ++t) {
    attention[t] = scale * dot(in.query + image * in.hidden, in.text + (in.start[image] + t) * in.hidden, in.hidden);
    top = std::max(top, attention[t]);
  }
  float total = 0.0f;
  for (int64_t t = 0; t < length; ++t) total += attention[t] = std::exp(attention[t] - top);
  for (int64_t t = 0; t < length; ++t) attention[t] /= total;
  return length ? top + std::log(total) : top;
}

std::tuple<Tensor, Tensor> fwd(const Tensor& query, const Tensor& text, const Tensor& start, const Tensor& end,
                               const Tensor& projected, double scale) {
  const Inputs in(query, text, start, end, projected);
  Tensor logits = torch::stable::new_zeros(query, {in.images, in.experts});
  Tensor lse = torch::stable::new_empty(query, {in.images});
  float* logits_data = logits.mutable_data_ptr<float>();
  float* lse_data = lse.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, in.images, 1, [&](int64_t first, int64_t last) {
    std::vector<float> attention;
    for (int64_t s = first; s < last; ++s) {
      attention.resize(static_cast<size_t>(in.length(s)));
      lse_data[s] = attend(in, s, static_cast<float>(scale), attention.data());
      for (int64_t t = 0; t < in.length(s); ++t) {
        axpy(attention[t], in.projected + (in.start[s] + t) * in.experts, logits_data + s * in.experts, in.experts);
      }
    }
  });
  return {logits, lse};
}

// Returns the gradients of query and projected, and the share of the text's gradient that comes through the scores (the
// share through `projected` is a BLAS product of the caller). Gradients of query and text that nobody needs come back
// empty.
std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& grad_logits, const Tensor& grad_lse, const Tensor& query,
                                       const Tensor& text, const Tensor& start, const Tensor& end,
                                       const Tensor& projected, double scale, bool needs_query, bool needs_text) {
  const Inputs in(query, text, start, end, projected);
  PARROT_CHECK_SHAPE(grad_logits, in.images, in.experts);
  PARROT_CHECK_SHAPE(grad_lse, in.images);
  PARROT_CHECK_CONTIGUOUS(grad_logits);
  PARROT_CHECK_CONTIGUOUS(grad_lse);
  Tensor grad_query = torch::stable::new_zeros(query, {needs_query ? in.images : 0, in.hidden});
  Tensor grad_text = torch::stable::new_zeros(query, {needs_text ? in.rows : 0, in.hidden});
  Tensor grad_projected = torch::stable::new_zeros(query, {in.rows, in.experts});
  const float* grad_data = grad_logits.const_data_ptr<float>();
  const float* grad_lse_data = grad_lse.const_data_ptr<float>();
  float* grad_query_data = grad_query.mutable_data_ptr<float>();
  float* grad_text_data = grad_text.mutable_data_ptr<float>();
  float* grad_projected_data = grad_projected.mutable_data_ptr<float>();

  std::vector<int64_t> offset(static_cast<size_t>(in.images) + 1, 0);
  for (int64_t s = 0; s < in.images; ++s) offset[s + 1] = offset[s] + in.length(s);
  std::vector<float> attention(static_cast<size_t>(offset[in.images])), grad_scores(attention.size());

  // Image by image: attention, gradient of the scores, gradient of the query.
  torch::stable::parallel_for(0, in.images, 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const int64_t length = in.length(s);
      float* own = attention.data() + offset[s];
      float* grad = grad_scores.data() + offset[s];
      attend(in, s, static_cast<float>(scale), own);
      double mean = -static_cast<double>(grad_lse_data[s]);
      for (int64_t t = 0; t < length; ++t) {
        grad[t] = dot(grad_data + s * in.experts, in.projected + (in.start[s] + t) * in.experts, in.experts);
        mean += static_cast<double>(own[t]) * grad[t];
      }
      for (int64_t t = 0; t < length; ++t) {
        grad[t] = own[t] * (grad[t] - static_cast<float>(mean)) * static_cast<float>(scale);
        if (!needs_query) continue;
        axpy(grad[t], in.text + (in.start[s] + t) * in.hidden, grad_query_data + s * in.hidden, in.hidden);
      }
    }
  });
  // Text row by text row, images in rising order: images share spans, and no two tasks may write one row.
  torch::stable::parallel_for(0, in.rows, 16, [&](int64_t first, int64_t last) {
    for (int64_t s = 0; s < in.images; ++s) {
      const int64_t begin = std::max(first, in.start[s]), stop = std::min(last, in.end[s]);
      for (int64_t t = begin; t < stop; ++t) {
        const int64_t at = offset[s] + t - in.start[s];
        if (needs_text) axpy(grad_scores[at], in.query + s * in.hidden, grad_text_data + t * in.hidden, in.hidden);
        axpy(attention[at], grad_data + s * in.experts, grad_projected_data + t * in.experts, in.experts);
      }
    }
  });
  return {grad_query, grad_text, grad_projected};
}

}  // namespace
}  // namespace parrot

STABLE_TORCH_LIBRARY_FRAGMENT(parrot_ext, m) {
  m.def(
      "text_guided_routing_fwd(Tensor query, Tensor text, Tensor start, Tensor end, Tensor projected, float scale) -> "
      "(Tensor, Tensor)");
  m.def(
      "text_guided_routing_bwd(Tensor grad_logits, Tensor grad_lse, Tensor query, Tensor text, Tensor start, Tensor "
      "end, "
      "Tensor projected, float scale, bool needs_query, bool needs_text) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(parrot_ext, CPU, m) {
  m.impl("text_guided_routing_fwd", TORCH_BOX(&parrot::fwd));
  m.impl("text_guided_routing_bwd", TORCH_BOX(&parrot::bwd));
}
