// Torch side of the CUDA grouped matrix products. Names of sizes as in the contract
// (kernels/parrot_kernels/grouped_gemm).
#include "grouped_gemm.h"

#include <optional>
#include <tuple>

#include "ragged_rows.h"

namespace parrot::cuda {
namespace {

using torch::stable::Tensor;

// How many segments there are when each of `groups` groups takes all of x, or, with offsets, those of its own.
int64_t segments_of(const Tensor& x, const std::optional<Tensor>& offsets, const std::optional<Tensor>& plan,
                    int64_t groups) {
  if (!offsets) return groups * x.size(0);
  return plan ? plan->size(0) : x.size(0);
}

Tensor m_grouped_gemm(const Tensor& x, const Tensor& w, const Tensor& offsets, const std::optional<Tensor>& plan,
                      int64_t topk, bool trans_w) {
  MGroupedGemm problem{};
  problem.bfloat16 = is_bfloat16(x);
  PARROT_CHECK_SHAPE(x, -1, -1, -1);
  PARROT_CHECK_SHAPE(w, -1, -1, -1);
  const int64_t groups = w.size(0), k = x.size(2);
  problem.rows = checked_rows(x, offsets, plan, topk, plan ? plan->size(0) : x.size(0), groups);
  PARROT_CHECK_CONTIGUOUS(x);
  PARROT_CHECK_ALIGNED(x);
  if (trans_w) {
    PARROT_CHECK_SHAPE(w, groups, -1, k);
  } else {
    PARROT_CHECK_SHAPE(w, groups, k, -1);
  }
  PARROT_CHECK_OPERAND(w, x);
  const int64_t n = w.size(trans_w ? 1 : 2);
  problem.n = width_of(n, "N");
  problem.k = width_of(k, "K");
  Tensor y = groups == 0 ? torch::stable::new_zeros(x, {problem.rows.segments, problem.rows.segment_rows, n})
                         : torch::stable::new_empty(x, {problem.rows.segments, problem.rows.segment_rows, n});
  if (groups == 0 || problem.rows.segments == 0) return y;
  problem.x = x.const_data_ptr();
  problem.w = w.const_data_ptr();
  problem.y = y.mutable_data_ptr();
  problem.trans_w = trans_w;
  const LaunchScope scope(x);
  check_launch(parrot_m_grouped_gemm(&problem, scope.stream()), "m_grouped_gemm");
  return y;
}

std::tuple<Tensor, Tensor> m_grouped_swiglu(const Tensor& x, const Tensor& w_gate_up,
                                            const std::optional<Tensor>& offsets, const std::optional<Tensor>& plan,
                                            int64_t topk, const std::optional<Tensor>& maybe_weights, bool save_z) {
  MGroupedGemm problem{};
  problem.bfloat16 = is_bfloat16(x);
  PARROT_CHECK_SHAPE(x, -1, -1, -1);
  PARROT_CHECK_SHAPE(w_gate_up, offsets ? offsets->size(0) - 1 : -1, 2, -1, x.size(2));
  const int64_t groups = w_gate_up.size(0);
  problem.rows = checked_rows(x, offsets, plan, topk, segments_of(x, offsets, plan, groups), groups);
  const int64_t segments = problem.rows.segments, rows = problem.rows.segment_rows;
  const int64_t k = x.size(2);
  PARROT_CHECK_CONTIGUOUS(x);
  PARROT_CHECK_ALIGNED(x);
  PARROT_CHECK_OPERAND(w_gate_up, x);
  const int64_t n = w_gate_up.size(2);
  problem.n = width_of(n, "I");
  problem.k = width_of(k, "K");
  if (maybe_weights) {
    const Tensor& weights = *maybe_weights;
    PARROT_CHECK_SHAPE(weights, segments);
    PARROT_CHECK_DENSE(weights, Float, x);
    problem.weights = weights.const_data_ptr<float>();
  }
  const auto output = [&](torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    return groups == 0 ? torch::stable::new_zeros(x, sizes) : torch::stable::new_empty(x, sizes);
  };
  Tensor h = output({segments, rows, n});
  Tensor z = save_z ? output({segments, rows, 2, n}) : torch::stable::new_empty(x, {0});
  if (groups == 0 || segments == 0) return {h, z};
  problem.x = x.const_data_ptr();
  problem.w = w_gate_up.const_data_ptr();
  problem.y = h.mutable_data_ptr();
  problem.z = save_z ? z.mutable_data_ptr() : nullptr;
  const LaunchScope scope(x);
  check_launch(parrot_m_grouped_swiglu(&problem, scope.stream()), "m_grouped_swiglu");
  return {h, z};
}

// A product of float8 x [S, V, K] and w [G, N, K] or [G, 2, N, K] with their scales, without where it goes: `result`,
// whose dtype decides that of all results.
MGroupedGemm scaled_problem(const Tensor& x, const Tensor& x_scales, const Tensor& w, const Tensor& w_scales,
                            const std::optional<Tensor>& offsets, const std::optional<Tensor>& plan, int64_t topk,
                            const Tensor& result, const char* name) {
  MGroupedGemm problem{};
  problem.bfloat16 = is_bfloat16(result, name);
  const int64_t groups = w.size(0), n = w.size(w.dim() - 2);
  problem.rows = checked_rows(x, offsets, plan, topk, segments_of(x, offsets, plan, groups), groups);
  problem.k = scaled_depth(x, x_scales, w, w_scales, n);
  problem.n = width_of(n, w.dim() == 4 ? "I" : "N");
  PARROT_CHECK_SHAPE(result, problem.rows.segments, problem.rows.segment_rows, n);
  PARROT_CHECK_DEVICE(result, x);
  PARROT_CHECK_CONTIGUOUS(result);
  PARROT_CHECK_ALIGNED(result);
  STD_TORCH_CHECK(groups > 0 || problem.rows.segments == 0, "there must be a group");
  problem.x = x.const_data_ptr();
  problem.w = w.const_data_ptr();
  problem.x_scales = x_scales.const_data_ptr<float>();
  problem.w_scales = w_scales.const_data_ptr<float>();
  problem.trans_w = true;
  return problem;
}

void m_grouped_gemm_fp8(const Tensor& x, const Tensor& x_scales, const Tensor& w, const Tensor& w_scales,
                        const Tensor& offsets, const std::optional<Tensor>& plan, int64_t topk, Tensor y) {
  PARROT_CHECK_SHAPE(x, -1, -1, -1);
  PARROT_CHECK_SHAPE(w, offsets.size(0) - 1, -1, x.size(2));
  MGroupedGemm problem = scaled_problem(x, x_scales, w, w_scales, offsets, plan, topk, y, "y");
  if (problem.rows.segments == 0) return;
  problem.y = y.mutable_data_ptr();
  const LaunchScope scope(x);
  check_launch(parrot_m_grouped_gemm(&problem, scope.stream()), "m_grouped_gemm");
}

void m_grouped_swiglu_fp8(const Tensor& x, const Tensor& x_scales, const Tensor& w_gate_up, const Tensor& w_scales,
                          const std::optional<Tensor>& offsets, const std::optional<Tensor>& plan, int64_t topk,
                          const std::optional<Tensor>& maybe_weights, Tensor h, std::optional<Tensor> maybe_z) {
  PARROT_CHECK_SHAPE(x, -1, -1, -1);
  PARROT_CHECK_SHAPE(w_gate_up, offsets ? offsets->size(0) - 1 : -1, 2, -1, x.size(2));
  MGroupedGemm problem = scaled_problem(x, x_scales, w_gate_up, w_scales, offsets, plan, topk, h, "h");
  const int64_t segments = problem.rows.segments, rows = problem.rows.segment_rows;
  if (maybe_weights) {
    const Tensor& weights = *maybe_weights;
    PARROT_CHECK_SHAPE(weights, segments);
    PARROT_CHECK_DENSE(weights, Float, x);
    problem.weights = weights.const_data_ptr<float>();
  }
  if (maybe_z) {
    const Tensor& z = *maybe_z;
    PARROT_CHECK_SHAPE(z, segments, rows, 2, w_gate_up.size(2));
    PARROT_CHECK_OPERAND(z, h);
    problem.z = z.mutable_data_ptr();
  }
  if (segments == 0) return;
  problem.y = h.mutable_data_ptr();
  const LaunchScope scope(x);
  check_launch(parrot_m_grouped_swiglu(&problem, scope.stream()), "m_grouped_swiglu");
}

Tensor k_grouped_gemm(const Tensor& a, const Tensor& b, const std::optional<Tensor>& offsets,
                      const std::optional<Tensor>& plan, int64_t topk) {
  KGroupedGemm problem{};
  problem.bfloat16 = is_bfloat16(a);
  PARROT_CHECK_SHAPE(a, -1, -1, -1);
  PARROT_CHECK_CONTIGUOUS(a);
  PARROT_CHECK_ALIGNED(a);
  PARROT_CHECK_SHAPE(b, -1, a.size(1), -1);
  STD_TORCH_CHECK(offsets || b.size(0) > 0, "without offsets b must have a segment");
  const int64_t groups = offsets ? offsets->size(0) - 1 : a.size(0) / b.size(0);
  problem.rows = checked_rows(b, offsets, plan, topk, a.size(0), groups);
  PARROT_CHECK_OPERAND(b, a);
  const int64_t n = a.size(2), k = b.size(2);
  problem.n = width_of(n, "N");
  problem.k = width_of(k, "K");
  if (groups == 0 || a.size(0) == 0) return torch::stable::new_zeros(a, {groups, n, k});
  Tensor c = torch::stable::new_empty(a, {groups, n, k});
  problem.a = a.const_data_ptr();
  problem.b = b.const_data_ptr();
  problem.c = c.mutable_data_ptr();
  const LaunchScope scope(a);
  check_launch(parrot_k_grouped_gemm(&problem, scope.stream()), "k_grouped_gemm");
  return c;
}

}  // namespace
}  // namespace parrot::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(PARROT_CUDA_LIBRARY, m) {
  m.def("m_grouped_gemm_cuda(Tensor x, Tensor w, Tensor offsets, Tensor? plan, int topk, bool trans_w) -> Tensor");
  m.def(
      "m_grouped_swiglu_cuda(Tensor x, Tensor w_gate_up, Tensor? offsets, Tensor? plan, int topk, Tensor? weights, "
      "bool save_z) -> (Tensor, Tensor)");
  m.def(
      "m_grouped_gemm_fp8_cuda(Tensor x, Tensor x_scales, Tensor w, Tensor w_scales, Tensor offsets, Tensor? plan, int "
      "topk, Tensor(a!) y) -> ()");
  m.def(
      "m_grouped_swiglu_fp8_cuda(Tensor x, Tensor x_scales, Tensor w_gate_up, Tensor w_scales, Tensor? offsets, "
      "Tensor? "
      "plan, int topk, Tensor? weights, Tensor(a!) h, Tensor(b!)? z) -> ()");
  m.def("k_grouped_gemm_cuda(Tensor a, Tensor b, Tensor? offsets, Tensor? plan, int topk) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(PARROT_CUDA_LIBRARY, PARROT_CUDA_KEY, m) {
  m.impl("m_grouped_gemm_cuda", TORCH_BOX(&parrot::cuda::m_grouped_gemm));
  m.impl("m_grouped_swiglu_cuda", TORCH_BOX(&parrot::cuda::m_grouped_swiglu));
  m.impl("m_grouped_gemm_fp8_cuda", TORCH_BOX(&parrot::cuda::m_grouped_gemm_fp8));
  m.impl("m_grouped_swiglu_fp8_cuda", TORCH_BOX(&parrot::cuda::m_grouped_swiglu_fp8));
  m.impl("k_grouped_gemm_cuda", TORCH_BOX(&parrot::cuda::k_grouped_gemm));
}
