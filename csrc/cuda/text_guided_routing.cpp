// Torch side of the CUDA text_guided_routing. S images, T text rows, H hidden_size, E experts.
#include "text_guided_routing.h"

#include <limits>
#include <optional>
#include <tuple>

#include "host.h"

namespace parrot::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

RoutingInputs checked_inputs(const Tensor& query, const Tensor& text, const Tensor& text_start, const Tensor& text_end,
                             const Tensor& router_weight, double scale) {
  PARROT_CHECK_SHAPE(query, -1, -1);
  const int64_t images = query.size(0), hidden = query.size(1), rows = text.size(0), experts = router_weight.size(0);
  PARROT_CHECK_SHAPE(text, -1, hidden);
  PARROT_CHECK_SHAPE(router_weight, -1, hidden);
  PARROT_CHECK_SHAPE(text_start, images);
  PARROT_CHECK_SHAPE(text_end, images);
  const bool wide = text_start.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || text_start.scalar_type() == ScalarType::Int, "text_start must be int32 or int64, got ",
                  torch::headeronly::toString(text_start.scalar_type()));
  PARROT_CHECK_SAME_DTYPE(text_end, text_start);
  PARROT_CHECK_OPERAND(text, query);
  PARROT_CHECK_OPERAND(router_weight, query);
  PARROT_CHECK_DEVICE(text_start, query);
  PARROT_CHECK_DEVICE(text_end, query);
  PARROT_CHECK_CONTIGUOUS(text_start);
  PARROT_CHECK_CONTIGUOUS(text_end);
  PARROT_CHECK_ALIGNED(query);
  const int64_t vector = query.scalar_type() == ScalarType::Float ? 4 : 8;
  STD_TORCH_CHECK(hidden % vector == 0, "hidden_size must be a multiple of ", vector, ", got ", hidden);
  STD_TORCH_CHECK(images <= 1 || (query.stride(0) % vector == 0 && query.stride(0) >= hidden),
                  "rows of query must be a multiple of ", vector, " elements apart, got ", query.stride(0));
  STD_TORCH_CHECK(hidden <= 1 || query.stride(1) == 1, "the last dimension of query must be contiguous");
  STD_TORCH_CHECK(1 <= experts && experts <= kMaxExperts, "experts must be in [1, ", kMaxExperts, "], got ", experts);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 64;
  STD_TORCH_CHECK(images <= kMost && rows <= kMost && hidden <= kMost, "too many images, text rows or hidden units");
  return {query.const_data_ptr(),        text.const_data_ptr(),          text_start.const_data_ptr(),
          text_end.const_data_ptr(),     router_weight.const_data_ptr(), query.stride(0),
          static_cast<int32_t>(images),  static_cast<int32_t>(rows),     static_cast<int32_t>(hidden),
          static_cast<int32_t>(experts), float_type(query, "query"),     wide,
          static_cast<float>(scale)};
}

Tensor new_float(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

float* floats(Tensor& tensor) {
  return tensor.mutable_data_ptr<float>();
}

// The counters of the images: at least one of each.
int32_t* checked_counters(const Tensor& arrived, const Tensor& query) {
  PARROT_CHECK_SHAPE(arrived, -1);
  PARROT_CHECK_DENSE(arrived, Int, query);
  STD_TORCH_CHECK(arrived.size(0) >= query.size(0), "arrived must have one element an image, at least ", query.size(0),
                  ", got ", arrived.size(0));
  return arrived.mutable_data_ptr<int32_t>();
}

std::tuple<Tensor, Tensor> fwd(const Tensor& query, const Tensor& text, const Tensor& text_start,
                               const Tensor& text_end, const Tensor& router_weight, const Tensor& arrived,
                               double scale) {
  const RoutingInputs in = checked_inputs(query, text, text_start, text_end, router_weight, scale);
  const int64_t images = in.images, rows = in.rows, experts = in.experts;
  Tensor logits = new_float(query, {images, experts}), lse = new_float(query, {images});
  if (images == 0) return {logits, lse};
  Tensor projected = new_float(query, {rows, experts}), scores = new_float(query, {images, rows});
  const RoutingForward out{floats(logits), floats(lse), floats(projected), floats(scores),
                           checked_counters(arrived, query)};
  const LaunchScope scope(query);
  check_launch(parrot_text_guided_routing_fwd(&in, &out, scope.stream()), "text_guided_routing_fwd");
  return {logits, lse};
}

// A gradient of `like`, or an empty tensor when nobody needs it.
Tensor new_gradient(const Tensor& like, bool needed, bool zeros) {
  if (!needed) return torch::stable::new_empty(like, {0});
  const auto sizes = like.sizes();
  return zeros ? torch::stable::new_zeros(like, sizes) : torch::stable::new_empty(like, sizes);
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& grad_logits, const std::optional<Tensor>& maybe_grad_lse,
                                       const Tensor& query, const Tensor& text, const Tensor& text_start,
                                       const Tensor& text_end, const Tensor& router_weight, const Tensor& lse,
                                       const Tensor& arrived, double scale, bool needs_query, bool needs_text,
                                       bool needs_router_weight) {
  const RoutingInputs in = checked_inputs(query, text, text_start, text_end, router_weight, scale);
  const int64_t images = in.images, rows = in.rows, experts = in.experts;
  PARROT_CHECK_SHAPE(grad_logits, images, experts);
  PARROT_CHECK_SHAPE(lse, images);
  PARROT_CHECK_DENSE(grad_logits, Float, query);
  PARROT_CHECK_DENSE(lse, Float, query);
  const float* grad_lse_data = nullptr;
  if (maybe_grad_lse) {
    const Tensor& grad_lse = *maybe_grad_lse;
    PARROT_CHECK_SHAPE(grad_lse, images);
    PARROT_CHECK_DENSE(grad_lse, Float, query);
    grad_lse_data = grad_lse.const_data_ptr<float>();
  }
  const bool nothing = images == 0 || rows == 0;
  Tensor grad_query = new_gradient(query, needs_query, nothing);
  Tensor grad_text = new_gradient(text, needs_text, nothing);
  Tensor grad_router_weight = new_gradient(router_weight, needs_router_weight, nothing);
  if (nothing) return {grad_query, grad_text, grad_router_weight};
  Tensor projected = new_float(query, {rows, experts}), scores = new_float(query, {images, rows});
  Tensor means = new_float(query, {images}), grad_projected = new_float(query, {rows, experts});
  const auto pointer = [](Tensor& tensor, bool needed) { return needed ? tensor.mutable_data_ptr() : nullptr; };
  const RoutingBackward out{grad_logits.const_data_ptr<float>(),
                            grad_lse_data,
                            lse.const_data_ptr<float>(),
                            pointer(grad_query, needs_query),
                            pointer(grad_text, needs_text),
                            pointer(grad_router_weight, needs_router_weight),
                            floats(projected),
                            floats(scores),
                            floats(means),
                            floats(grad_projected),
                            checked_counters(arrived, query)};
  const LaunchScope scope(query);
  check_launch(parrot_text_guided_routing_bwd(&in, &out, scope.stream()), "text_guided_routing_bwd");
  return {grad_query, grad_text, grad_router_weight};
}

}  // namespace
}  // namespace parrot::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(PARROT_CUDA_LIBRARY, m) {
  m.def(
      "text_guided_routing_cuda_fwd(Tensor query, Tensor text, Tensor text_start, Tensor text_end, "
      "Tensor router_weight, Tensor(a!) arrived, float scale) -> (Tensor, Tensor)");
  m.def(
      "text_guided_routing_cuda_bwd(Tensor grad_logits, Tensor? grad_lse, Tensor query, Tensor text, "
      "Tensor text_start, Tensor text_end, Tensor router_weight, Tensor lse, Tensor(a!) arrived, float scale, "
      "bool needs_query, bool needs_text, bool needs_router_weight) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(PARROT_CUDA_LIBRARY, PARROT_CUDA_KEY, m) {
  m.impl("text_guided_routing_cuda_fwd", TORCH_BOX(&parrot::cuda::fwd));
  m.impl("text_guided_routing_cuda_bwd", TORCH_BOX(&parrot::cuda::bwd));
}
