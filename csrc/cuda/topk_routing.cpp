// Torch side of the CUDA topk_routing. n rows, E experts, K topk.
#include "topk_routing.h"

#include <limits>
#include <optional>
#include <tuple>

#include "host.h"

namespace parrot::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

TopKInputs checked_inputs(const Tensor& logits, int64_t topk, bool renormalize, bool sigmoid, double scaling_factor) {
  PARROT_CHECK_SHAPE(logits, -1, -1);
  PARROT_CHECK_CONTIGUOUS(logits);
  const int64_t rows = logits.size(0), experts = logits.size(1);
  STD_TORCH_CHECK(1 <= experts && experts <= kMaxRoutedExperts, "experts must be in [1, ", kMaxRoutedExperts, "], got ",
                  experts);
  STD_TORCH_CHECK(1 <= topk && topk <= experts, "topk must be in [1, num_experts=", experts, "], got ", topk);
  STD_TORCH_CHECK(rows * topk < std::numeric_limits<int32_t>::max(), "rows * topk must be less than 2^31, got ",
                  rows * topk);
  TopKInputs in{};
  in.logits = logits.const_data_ptr();
  in.rows = static_cast<int32_t>(rows);
  in.experts = static_cast<int32_t>(experts);
  in.topk = static_cast<int32_t>(topk);
  in.groups = in.topk_groups = 1;
  in.dtype = float_type(logits, "logits");
  in.renormalize = renormalize;
  in.sigmoid = sigmoid;
  in.scaling_factor = static_cast<float>(scaling_factor);
  return in;
}

Tensor new_float(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, bool zeros) {
  return zeros ? torch::stable::new_zeros(like, sizes, ScalarType::Float)
               : torch::stable::new_empty(like, sizes, ScalarType::Float);
}

Tensor new_int(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, bool zeros) {
  return zeros ? torch::stable::new_zeros(like, sizes, ScalarType::Int)
               : torch::stable::new_empty(like, sizes, ScalarType::Int);
}

using Route = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Route fwd(const Tensor& logits, int64_t topk, bool renormalize, bool sigmoid, double scaling_factor, int64_t num_groups,
          int64_t topk_groups, const Optional& expert_bias) {
  TopKInputs in = checked_inputs(logits, topk, renormalize, sigmoid, scaling_factor);
  const int64_t rows = in.rows, experts = in.experts;
  STD_TORCH_CHECK(1 <= num_groups && num_groups <= kMaxExpertGroups && experts % num_groups == 0,
                  "num_groups must be in [1, ", kMaxExpertGroups, "] and divide num_experts=", experts, ", got ",
                  num_groups);
  STD_TORCH_CHECK(1 <= topk_groups && topk_groups <= num_groups, "topk_groups must be in [1, num_groups=", num_groups,
                  "], got ", topk_groups);
  STD_TORCH_CHECK(topk <= experts / num_groups * topk_groups, "topk must be at most the experts of ", topk_groups,
                  " groups, ", experts / num_groups * topk_groups, ", got ", topk);
  in.groups = static_cast<int32_t>(num_groups);
  in.topk_groups = static_cast<int32_t>(topk_groups);
  if (expert_bias) {
    const Tensor& bias = *expert_bias;
    PARROT_CHECK_SHAPE(bias, experts);
    PARROT_CHECK_DENSE(bias, Float, logits);
    in.expert_bias = bias.const_data_ptr<float>();
  }
  const bool nothing = rows == 0;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, scratch = tiles > 1 ? tiles : 0;
  Tensor probs = new_float(logits, {rows, experts}, false), scores = new_float(logits, {rows, experts}, false);
  Tensor lse = new_float(logits, {rows}, false), score_sums = new_float(logits, {experts}, nothing);
  Tensor z_sum = new_float(logits, {}, nothing);
  Tensor topk_indices = torch::stable::new_empty(logits, {rows, topk}, ScalarType::Long);
  Tensor tokens_per_expert = new_int(logits, {experts}, nothing), offsets = new_int(logits, {experts + 1}, nothing);
  Tensor plan = torch::stable::new_empty(logits, {rows * topk}, ScalarType::Long);
  if (!nothing) {
    Tensor tile_counts = new_int(logits, {experts, scratch}, false);
    Tensor tile_sums = new_float(logits, {experts + 1, scratch}, false);
    const TopKForward out{probs.mutable_data_ptr<float>(),
                          scores.mutable_data_ptr<float>(),
                          lse.mutable_data_ptr<float>(),
                          score_sums.mutable_data_ptr<float>(),
                          z_sum.mutable_data_ptr<float>(),
                          topk_indices.mutable_data_ptr<int64_t>(),
                          tokens_per_expert.mutable_data_ptr<int32_t>(),
                          offsets.mutable_data_ptr<int32_t>(),
                          plan.mutable_data_ptr<int64_t>(),
                          tile_counts.mutable_data_ptr<int32_t>(),
                          tile_sums.mutable_data_ptr<float>()};
    const LaunchScope scope(logits);
    check_launch(parrot_topk_routing_fwd(&in, &out, scope.stream()), "topk_routing_fwd");
  }
  return {probs, scores, lse, score_sums, z_sum, topk_indices, tokens_per_expert, offsets, plan};
}

const float* gradient(const Optional& grad, const Tensor& logits, const std::vector<int64_t>& sizes, const char* name) {
  if (!grad) return nullptr;
  STD_TORCH_CHECK(shape_is(*grad, sizes), name, " must have shape ", shape_string(sizes), ", got ",
                  shape_string(*grad));
  STD_TORCH_CHECK(grad->scalar_type() == ScalarType::Float && grad->is_contiguous(), name,
                  " must be contiguous and float32");
  STD_TORCH_CHECK(grad->get_device_index() == logits.get_device_index(), name, " must be on the device of logits");
  return grad->const_data_ptr<float>();
}

Tensor bwd(const Optional& grad_probs, const Optional& grad_scores, const Optional& grad_lse,
           const Optional& grad_score_sums, const Optional& grad_z_sum, const Tensor& logits,
           const Tensor& topk_indices, bool renormalize, bool sigmoid, double scaling_factor) {
  PARROT_CHECK_SHAPE(topk_indices, logits.size(0), -1);
  PARROT_CHECK_DENSE(topk_indices, Long, logits);
  const TopKInputs in = checked_inputs(logits, topk_indices.size(1), renormalize, sigmoid, scaling_factor);
  const int64_t rows = in.rows, experts = in.experts;
  Tensor grad_logits = torch::stable::new_empty(logits, {rows, experts});
  const TopKBackward out{gradient(grad_probs, logits, {rows, experts}, "grad_probs"),
                         gradient(grad_scores, logits, {rows, experts}, "grad_scores"),
                         gradient(grad_lse, logits, {rows}, "grad_lse"),
                         gradient(grad_score_sums, logits, {experts}, "grad_score_sums"),
                         gradient(grad_z_sum, logits, {}, "grad_z_sum"),
                         topk_indices.const_data_ptr<int64_t>(),
                         grad_logits.mutable_data_ptr()};
  if (rows == 0) return grad_logits;
  const LaunchScope scope(logits);
  check_launch(parrot_topk_routing_bwd(&in, &out, scope.stream()), "topk_routing_bwd");
  return grad_logits;
}

}  // namespace
}  // namespace parrot::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(PARROT_CUDA_LIBRARY, m) {
  m.def(
      "topk_routing_cuda_fwd(Tensor logits, int topk, bool renormalize, bool sigmoid, float scaling_factor, "
      "int num_groups, int topk_groups, Tensor? expert_bias) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "topk_routing_cuda_bwd(Tensor? grad_probs, Tensor? grad_scores, Tensor? grad_lse, Tensor? grad_score_sums, "
      "Tensor? grad_z_sum, Tensor logits, Tensor topk_indices, bool renormalize, bool sigmoid, "
      "float scaling_factor) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(PARROT_CUDA_LIBRARY, PARROT_CUDA_KEY, m) {
  m.impl("topk_routing_cuda_fwd", TORCH_BOX(&parrot::cuda::fwd));
  m.impl("topk_routing_cuda_bwd", TORCH_BOX(&parrot::cuda::bwd));
}
