// Torch side of the CUDA grouped matrix products. Names of sizes as in the contract
// (kernels/parrot_kernels/grouped_gemm).
#include "grouped_gemm.h"

#include <limits>
#include <optional>
#include <tuple>

#include "host.h"

namespace parrot::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1024;  // row numbers are int32 on the device

int32_t int32_of(int64_t value, const char* name) {
  STD_TORCH_CHECK(0 <= value && value <= kMost, name, " must be in [0, ", kMost, "], got ", value);
  return static_cast<int32_t>(value);
}

void check_width(int64_t width, const char* name) {
  STD_TORCH_CHECK(width > 0 && width % 8 == 0, name, " must be a positive multiple of 8, got ", width);
  int32_of(width, name);
}

bool is_bfloat16(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "x must be bfloat16 or float16, got ",
                  torch::headeronly::toString(dtype));
  return dtype == ScalarType::BFloat16;
}

// Rows that are read through the plan when there is one; `segments` is J.
RaggedRows checked_rows(const Tensor& source, const Tensor& offsets, const std::optional<Tensor>& maybe_plan,
                        int64_t topk, int64_t segments) {
  PARROT_CHECK_SHAPE(source, -1, -1, -1);
  PARROT_CHECK_SHAPE(offsets, -1);
  PARROT_CHECK_DEVICE(offsets, source);
  PARROT_CHECK_CONTIGUOUS(offsets);
  const bool wide = offsets.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || offsets.scalar_type() == ScalarType::Int, "offsets must be int32 or int64, got ",
                  torch::headeronly::toString(offsets.scalar_type()));
  STD_TORCH_CHECK(offsets.size(0) >= 1, "offsets must have at least one entry");
  const int64_t* plan_data = nullptr;
  if (maybe_plan) {
    const Tensor& plan = *maybe_plan;
    PARROT_CHECK_SHAPE(plan, segments);
    PARROT_CHECK_DENSE(plan, Long, source);
    plan_data = plan.const_data_ptr<int64_t>();
    STD_TORCH_CHECK(topk >= 1, "topk must be at least 1, got ", topk);
  } else {
    PARROT_CHECK_SHAPE(source, segments, -1, -1);
  }
  const int64_t rows = source.size(1);
  STD_TORCH_CHECK(rows > 0, "segments must have at least one row");
  int32_of(segments * rows, "the number of rows");
  return {offsets.const_data_ptr(),
          plan_data,
          wide,
          int32_of(topk, "topk"),
          int32_of(offsets.size(0) - 1, "the number of groups"),
          int32_of(segments, "the number of segments"),
          int32_of(rows, "rows of a segment"),
          int32_of(source.size(0), "the number of source segments")};
}

int64_t segments_of(const Tensor& x, const std::optional<Tensor>& plan) {
  return plan ? plan->size(0) : x.size(0);
}

Tensor m_grouped_gemm(const Tensor& x, const Tensor& w, const Tensor& offsets, const std::optional<Tensor>& plan,
                      int64_t topk, bool trans_w) {
  MGroupedGemm problem{};
  problem.bfloat16 = is_bfloat16(x);
  problem.rows = checked_rows(x, offsets, plan, topk, segments_of(x, plan));
  const int64_t groups = problem.rows.groups, k = x.size(2);
  PARROT_CHECK_CONTIGUOUS(x);
  PARROT_CHECK_ALIGNED(x);
  if (trans_w) {
    PARROT_CHECK_SHAPE(w, groups, -1, k);
  } else {
    PARROT_CHECK_SHAPE(w, groups, k, -1);
  }
  PARROT_CHECK_OPERAND(w, x);
  const int64_t n = w.size(trans_w ? 1 : 2);
  check_width(k, "K");
  check_width(n, "N");
  Tensor y = groups == 0 ? torch::stable::new_zeros(x, {problem.rows.segments, problem.rows.segment_rows, n})
                         : torch::stable::new_empty(x, {problem.rows.segments, problem.rows.segment_rows, n});
  if (groups == 0 || problem.rows.segments == 0) return y;
  problem.x = x.const_data_ptr();
  problem.w = w.const_data_ptr();
  problem.y = y.mutable_data_ptr();
  problem.n = static_cast<int32_t>(n);
  problem.k = static_cast<int32_t>(k);
  problem.trans_w = trans_w;
  const LaunchScope scope(x);
  check_launch(parrot_m_grouped_gemm(&problem, scope.stream()), "m_grouped_gemm");
  return y;
}

std::tuple<Tensor, Tensor> m_grouped_swiglu(const Tensor& x, const Tensor& w_gate_up, const Tensor& offsets,
                                            const std::optional<Tensor>& plan, int64_t topk,
                                            const std::optional<Tensor>& maybe_weights, bool save_z) {
  MGroupedGemm problem{};
  problem.bfloat16 = is_bfloat16(x);
  problem.rows = checked_rows(x, offsets, plan, topk, segments_of(x, plan));
  const int64_t groups = problem.rows.groups, segments = problem.rows.segments, rows = problem.rows.segment_rows;
  const int64_t k = x.size(2);
  PARROT_CHECK_CONTIGUOUS(x);
  PARROT_CHECK_ALIGNED(x);
  PARROT_CHECK_SHAPE(w_gate_up, groups, 2, -1, k);
  PARROT_CHECK_OPERAND(w_gate_up, x);
  const int64_t n = w_gate_up.size(2);
  check_width(k, "K");
  check_width(n, "I");
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
  problem.n = static_cast<int32_t>(n);
  problem.k = static_cast<int32_t>(k);
  const LaunchScope scope(x);
  check_launch(parrot_m_grouped_swiglu(&problem, scope.stream()), "m_grouped_swiglu");
  return {h, z};
}

Tensor k_grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& offsets, const std::optional<Tensor>& plan,
                      int64_t topk) {
  KGroupedGemm problem{};
  problem.bfloat16 = is_bfloat16(a);
  PARROT_CHECK_SHAPE(a, -1, -1, -1);
  PARROT_CHECK_CONTIGUOUS(a);
  PARROT_CHECK_ALIGNED(a);
  problem.rows = checked_rows(b, offsets, plan, topk, a.size(0));
  PARROT_CHECK_SHAPE(b, -1, a.size(1), -1);
  PARROT_CHECK_OPERAND(b, a);
  const int64_t groups = problem.rows.groups, n = a.size(2), k = b.size(2);
  check_width(n, "N");
  check_width(k, "K");
  if (groups == 0 || a.size(0) == 0) return torch::stable::new_zeros(a, {groups, n, k});
  Tensor c = torch::stable::new_empty(a, {groups, n, k});
  problem.a = a.const_data_ptr();
  problem.b = b.const_data_ptr();
  problem.c = c.mutable_data_ptr();
  problem.n = static_cast<int32_t>(n);
  problem.k = static_cast<int32_t>(k);
  const LaunchScope scope(a);
  check_launch(parrot_k_grouped_gemm(&problem, scope.stream()), "k_grouped_gemm");
  return c;
}

}  // namespace
}  // namespace parrot::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(PARROT_CUDA_LIBRARY, m) {
  m.def("m_grouped_gemm_cuda(Tensor x, Tensor w, Tensor offsets, Tensor? plan, int topk, bool trans_w) -> Tensor");
  m.def(
      "m_grouped_swiglu_cuda(Tensor x, Tensor w_gate_up, Tensor offsets, Tensor? plan, int topk, Tensor? weights, "
      "bool save_z) -> (Tensor, Tensor)");
  m.def("k_grouped_gemm_cuda(Tensor a, Tensor b, Tensor offsets, Tensor? plan, int topk) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(PARROT_CUDA_LIBRARY, PARROT_CUDA_KEY, m) {
  m.impl("m_grouped_gemm_cuda", TORCH_BOX(&parrot::cuda::m_grouped_gemm));
  m.impl("m_grouped_swiglu_cuda", TORCH_BOX(&parrot::cuda::m_grouped_swiglu));
  m.impl("k_grouped_gemm_cuda", TORCH_BOX(&parrot::cuda::k_grouped_gemm));
}
