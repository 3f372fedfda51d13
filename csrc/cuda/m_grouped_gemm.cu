// Launches of the grouped products whose groups have rows of their own.
#include "gemm_host.cuh"
#include "m_grouped_gemm.cuh"

namespace parrot::cuda {
namespace {

template <typename T, Weights kWeights, typename Shape, bool kGathers, bool kScaled>
int launch(const MGroupedGemm& problem, void* stream) {
  using Product = MProduct<T, kWeights, Shape, kGathers, kScaled>;
  constexpr bool kSwiGLU = kWeights == Weights::kSwiGLU;
  const RaggedRows& rows = problem.rows;
  const int64_t n = problem.n, k = problem.k;
  Product product{};
  product.problem = problem;
  Maps maps(problem.bfloat16);
  if (!kGathers) maps.add(product.x_map, problem.x, source_planes(rows, k), 64);
  if (kWeights == Weights::kColumns) {
    maps.add(product.w_map, problem.w, {n, k, rows.groups, n}, Product::kWeightRows);
  } else {
    maps.add(product.w_map, problem.w, {k, n, rows.groups * (kSwiGLU ? 2 : 1), k}, Product::kWeightRows);
  }
  maps.add(product.y_map, problem.y, result_planes(rows, n, n), 64);
  if (problem.z) {
    const device::Planes planes = result_planes(rows, n, 2 * n);
    maps.add(product.gate_map, problem.z, planes, 64);
    maps.add(product.up_map, static_cast<T*>(problem.z) + n, planes, 64);
  }
  return maps.error() ? maps.error() : launch_gemm(product, stream);
}

template <typename T, Weights kWeights, typename Shape, bool kScaled = false>
int launch_m(const MGroupedGemm& problem, void* stream) {
  return gathers_rows(problem.rows) ? launch<T, kWeights, Shape, true, kScaled>(problem, stream)
                                    : launch<T, kWeights, Shape, false, kScaled>(problem, stream);
}

template <typename T>
int launch_plain(const MGroupedGemm& problem, void* stream) {
  if (problem.x_scales) return launch_m<T, Weights::kRows, ScaledShape, true>(problem, stream);
  const int64_t rows = static_cast<int64_t>(problem.rows.segments) * problem.rows.segment_rows;
  // (Rows that are gathered leave no registers for tiles in ping-pong.)
  if (!gathers_rows(problem.rows) &&
      prefers_short((rows + kBlockM - 1) / kBlockM, problem.n, (problem.k + kBlockK - 1) / kBlockK)) {
    return problem.trans_w ? launch<T, Weights::kRows, ShortShape, false, false>(problem, stream)
                           : launch<T, Weights::kColumns, ShortShape, false, false>(problem, stream);
  }
  return problem.trans_w ? launch_m<T, Weights::kRows, WideShape>(problem, stream)
                         : launch_m<T, Weights::kColumns, WideShape>(problem, stream);
}

template <typename T>
int launch_swiglu(const MGroupedGemm& problem, void* stream) {
  return problem.x_scales ? launch_m<T, Weights::kSwiGLU, ScaledShape, true>(problem, stream)
                          : launch_m<T, Weights::kSwiGLU, WideShape>(problem, stream);
}

}  // namespace

extern "C" int parrot_m_grouped_gemm(const MGroupedGemm* problem, void* stream) {
  return problem->bfloat16 ? launch_plain<BFloat16>(*problem, stream) : launch_plain<Float16>(*problem, stream);
}

extern "C" int parrot_m_grouped_swiglu(const MGroupedGemm* problem, void* stream) {
  return problem->bfloat16 ? launch_swiglu<BFloat16>(*problem, stream) : launch_swiglu<Float16>(*problem, stream);
}

}  // namespace parrot::cuda
