// Launch of the grouped product whose reduction runs over the rows of a group.
#include "gemm_host.cuh"
#include "k_grouped_gemm.cuh"

namespace parrot::cuda {
namespace {

template <typename T, typename Shape, bool kGathers>
int launch(const KGroupedGemm& problem, void* stream) {
  const RaggedRows& rows = problem.rows;
  const int64_t n = problem.n, k = problem.k;
  KProduct<T, Shape, kGathers> product{};
  product.problem = problem;
  Maps maps(problem.bfloat16);
  maps.add(product.a_map, problem.a, result_planes(rows, n, n), kBlockK);
  if (!kGathers) maps.add(product.b_map, problem.b, source_planes(rows, k), kBlockK / 2);
  maps.add(product.c_map, problem.c, {k, n, rows.groups, k}, 64);
  return maps.error() ? maps.error() : launch_gemm(product, stream);
}

template <typename T>
int launch_k(const KGroupedGemm& problem, void* stream) {
  const RaggedRows& rows = problem.rows;
  if (gathers_rows(rows)) return launch<T, WideShape, true>(problem, stream);
  const int64_t all = static_cast<int64_t>(rows.segments) * rows.segment_rows;
  const int64_t row_blocks = static_cast<int64_t>(rows.groups) * ((problem.n + kBlockM - 1) / kBlockM);
  const int64_t steps = (all / rows.groups + kBlockK - 1) / kBlockK;  // of a group of mean size
  return prefers_short(row_blocks, problem.k, steps) ? launch<T, ShortShape, false>(problem, stream)
                                                     : launch<T, WideShape, false>(problem, stream);
}

}  // namespace

extern "C" int parrot_k_grouped_gemm(const KGroupedGemm* problem, void* stream) {
  return problem->bfloat16 ? launch_k<BFloat16>(*problem, stream) : launch_k<Float16>(*problem, stream);
}

}  // namespace parrot::cuda
