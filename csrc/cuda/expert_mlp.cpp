// Torch side of the CUDA products that only `expert_mlp` has. Names of sizes as in the contract
// (kernels/parrot_kernels/expert_mlp).
#include "expert_mlp.h"

#include <optional>
#include <tuple>

#include "ragged_rows.h"

namespace parrot::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Segments and images of a [J, V, ...], by places and experts or, without these, in the dense form.
void set_route(ExpertCombine& problem, const Tensor& a, const std::optional<Tensor>& maybe_places,
               const std::optional<Tensor>& maybe_experts, int64_t images) {
  const int64_t rows = a.size(1), experts_count = problem.experts_count;
  STD_TORCH_CHECK(maybe_places.has_value() == maybe_experts.has_value(), "places and experts come together");
  if (maybe_places) {
    const Tensor &places = *maybe_places, &experts = *maybe_experts;
    PARROT_CHECK_SHAPE(experts, images, -1);
    PARROT_CHECK_DENSE(experts, Long, a);
    PARROT_CHECK_SHAPE(places, images * experts.size(1));
    PARROT_CHECK_DENSE(places, Long, a);
    problem.places = places.const_data_ptr<int64_t>();
    problem.experts = experts.const_data_ptr<int64_t>();
    problem.topk = int32_of(experts.size(1), "topk");
    problem.images = int32_of(images, "the number of images");
    problem.rows = int32_of(rows, "rows of an image");
    problem.segments = int32_of(a.size(0), "the number of segments");
  } else {
    STD_TORCH_CHECK(a.size(0) == experts_count * images, "a must have ", experts_count * images, " segments, got ",
                    a.size(0));
    problem.topk = problem.segments = int32_of(experts_count, "the number of experts");
    problem.images = 1;
    problem.rows = int32_of(images * rows, "the number of rows");
  }
  int32_of(images * rows, "the number of rows");
}

// Plans and launches `problem`, which lacks the result and what parts of split reductions need.
Tensor combine(ExpertCombine& problem, const Tensor& residual, const Tensor& arrived) {
  Tensor y = torch::stable::new_empty(residual, {residual.size(0), residual.size(1), residual.size(2)});
  if (residual.size(0) == 0) return y;
  PARROT_CHECK_SHAPE(arrived, -1);
  PARROT_CHECK_DENSE(arrived, Int, residual);
  STD_TORCH_CHECK(problem.segments > 0, "a must have at least one segment");
  const LaunchScope scope(residual);
  parrot_plan_expert_combine(&problem);
  STD_TORCH_CHECK(parrot_combine_counters(&problem) <= arrived.size(0), "arrived must have at least ",
                  parrot_combine_counters(&problem), " entries, got ", arrived.size(0));
  Tensor partials = torch::stable::new_empty(residual, {parrot_combine_scratch_bytes(&problem) / 4}, ScalarType::Float);
  problem.residual = residual.const_data_ptr();
  problem.y = y.mutable_data_ptr();
  problem.partials = partials.mutable_data_ptr();
  problem.arrived = arrived.mutable_data_ptr<int32_t>();
  check_launch(parrot_expert_combine(&problem, scope.stream()), "expert_combine");
  return y;
}

Tensor expert_combine(const Tensor& a, const Tensor& w, const std::optional<Tensor>& maybe_places,
                      const std::optional<Tensor>& maybe_experts, const Tensor& residual, const Tensor& arrived,
                      double residual_scale) {
  ExpertCombine problem{};
  PARROT_CHECK_SHAPE(a, -1, -1, -1);
  PARROT_CHECK_SHAPE(w, -1, a.size(2), -1);
  PARROT_CHECK_SHAPE(residual, -1, a.size(1), w.size(2));
  problem.bfloat16 = is_bfloat16(a);
  PARROT_CHECK_CONTIGUOUS(a);
  PARROT_CHECK_ALIGNED(a);
  PARROT_CHECK_OPERAND(w, a);
  PARROT_CHECK_OPERAND(residual, a);
  problem.experts_count = int32_of(w.size(0), "the number of experts");
  set_route(problem, a, maybe_places, maybe_experts, residual.size(0));
  problem.depth = width_of(a.size(2), "the inner width");
  problem.width = width_of(w.size(2), "the width");
  problem.residual_scale = static_cast<float>(residual_scale);
  problem.a = a.const_data_ptr();
  problem.w = w.const_data_ptr();
  return combine(problem, residual, arrived);
}

Tensor expert_combine_fp8(const Tensor& a, const Tensor& a_scales, const Tensor& w, const Tensor& w_scales,
                          const std::optional<Tensor>& maybe_places, const std::optional<Tensor>& maybe_experts,
                          const Tensor& residual, const Tensor& arrived, double residual_scale) {
  ExpertCombine problem{};
  PARROT_CHECK_SHAPE(a, -1, -1, -1);
  PARROT_CHECK_SHAPE(w, -1, -1, a.size(2));
  PARROT_CHECK_SHAPE(residual, -1, a.size(1), w.size(1));
  problem.bfloat16 = is_bfloat16(residual, "residual");
  PARROT_CHECK_DEVICE(residual, a);
  PARROT_CHECK_CONTIGUOUS(residual);
  PARROT_CHECK_ALIGNED(residual);
  problem.experts_count = int32_of(w.size(0), "the number of experts");
  set_route(problem, a, maybe_places, maybe_experts, residual.size(0));
  problem.depth = scaled_depth(a, a_scales, w, w_scales, w.size(1));
  problem.width = width_of(w.size(1), "the width");
  problem.residual_scale = static_cast<float>(residual_scale);
  problem.a = a.const_data_ptr();
  problem.w = w.const_data_ptr();
  problem.a_scales = a_scales.const_data_ptr<float>();
  problem.w_scales = w_scales.const_data_ptr<float>();
  return combine(problem, residual, arrived);
}

std::tuple<Tensor, Tensor, Tensor> expert_hidden_bwd(const Tensor& grad, const Tensor& w_down, const Tensor& z,
                                                     const Tensor& weights, const std::optional<Tensor>& offsets,
                                                     const std::optional<Tensor>& plan, int64_t topk) {
  ExpertHiddenBackward problem{};
  PARROT_CHECK_SHAPE(grad, -1, -1, -1);
  PARROT_CHECK_SHAPE(w_down, -1, -1, grad.size(2));
  problem.bfloat16 = is_bfloat16(grad);
  PARROT_CHECK_CONTIGUOUS(grad);
  PARROT_CHECK_ALIGNED(grad);
  PARROT_CHECK_OPERAND(w_down, grad);
  PARROT_CHECK_SHAPE(z, -1, grad.size(1), 2, w_down.size(1));
  PARROT_CHECK_OPERAND(z, grad);
  const int64_t segments = z.size(0), rows = z.size(1), width = w_down.size(1);
  PARROT_CHECK_SHAPE(weights, segments);
  PARROT_CHECK_DENSE(weights, Float, grad);
  STD_TORCH_CHECK(offsets.has_value() == plan.has_value(), "offsets and plan come together");
  problem.rows = checked_rows(grad, offsets, plan, topk, segments, w_down.size(0));
  problem.width = width_of(width, "I");
  problem.depth = width_of(grad.size(2), "H");
  const int64_t blocks = parrot_hidden_backward_blocks(problem.width);
  Tensor h = torch::stable::new_empty(grad, {segments, rows, width});
  Tensor grad_z = torch::stable::new_empty(grad, {segments, rows, 2, width});
  Tensor sums = torch::stable::new_empty(weights, {blocks, segments, rows});
  if (segments == 0) return {h, grad_z, sums};
  problem.grad = grad.const_data_ptr();
  problem.w_down = w_down.const_data_ptr();
  problem.z = z.const_data_ptr();
  problem.weights = weights.const_data_ptr<float>();
  problem.h = h.mutable_data_ptr();
  problem.grad_z = grad_z.mutable_data_ptr();
  problem.sums = sums.mutable_data_ptr<float>();
  const LaunchScope scope(grad);
  check_launch(parrot_expert_hidden_bwd(&problem, scope.stream()), "expert_hidden_bwd");
  return {h, grad_z, sums};
}

}  // namespace
}  // namespace parrot::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(PARROT_CUDA_LIBRARY, m) {
  m.def(
      "expert_combine_cuda(Tensor a, Tensor w, Tensor? places, Tensor? experts, Tensor residual, Tensor(a!) arrived, "
      "float residual_scale) -> Tensor");
  m.def(
      "expert_combine_fp8_cuda(Tensor a, Tensor a_scales, Tensor w, Tensor w_scales, Tensor? places, Tensor? experts, "
      "Tensor residual, Tensor(a!) arrived, float residual_scale) -> Tensor");
  m.def(
      "expert_hidden_bwd_cuda(Tensor grad, Tensor w_down, Tensor z, Tensor weights, Tensor? offsets, Tensor? plan, int "
      "topk) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(PARROT_CUDA_LIBRARY, PARROT_CUDA_KEY, m) {
  m.impl("expert_combine_cuda", TORCH_BOX(&parrot::cuda::expert_combine));
  m.impl("expert_combine_fp8_cuda", TORCH_BOX(&parrot::cuda::expert_combine_fp8));
  m.impl("expert_hidden_bwd_cuda", TORCH_BOX(&parrot::cuda::expert_hidden_bwd));
}
