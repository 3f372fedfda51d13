// Launches of the grouped matrix products.
#include "k_grouped_gemm.cuh"
#include "m_grouped_gemm.cuh"

namespace parrot::cuda {
namespace {

// As many blocks as multiprocessors, each taking tiles in turn. How many tiles there are only the device knows.
device::Launch shape_of_launch(void* stream) {
  return {dim3(static_cast<unsigned>(device::multiprocessors())), kGemmThreads, sizeof(GemmShared), stream};
}

// Rows of x or b: [S, V, width] gathered, [1, J * V, width] in place.
int rows_map(device::TensorMap* map, const RaggedRows& rows, bool gathered, const void* base, bool bfloat16, int width,
             int box_rows) {
  if (gathered) {
    return device::make_tensor_map(map, base, bfloat16, width, rows.segment_rows, rows.source_segments, box_rows);
  }
  const int64_t all = static_cast<int64_t>(rows.segments) * rows.segment_rows;
  return device::make_tensor_map(map, base, bfloat16, width, all, 1, box_rows);
}

template <Weights kWeights>
int launch_m(const MGroupedGemm& problem, void* stream) {
  constexpr bool kSwiGLU = kWeights == Weights::kSwiGLU;
  device::TensorMap x_map, w_map;
  const RaggedRows& rows = problem.rows;
  int error = rows_map(&x_map, rows, rows.plan != nullptr, problem.x, problem.bfloat16, problem.k, kBlockM);
  if (error) return error;
  if (kWeights == Weights::kColumns) {
    error = device::make_tensor_map(&w_map, problem.w, problem.bfloat16, problem.n, problem.k, rows.groups, kBlockK);
  } else {
    error = device::make_tensor_map(&w_map, problem.w, problem.bfloat16, problem.k, problem.n,
                                    rows.groups * (kSwiGLU ? 2 : 1), kOutputColumns<kWeights>);
  }
  if (error) return error;
  const auto kernel =
      problem.bfloat16 ? m_grouped_gemm_kernel<BFloat16, kWeights> : m_grouped_gemm_kernel<Float16, kWeights>;
  return device::launch(shape_of_launch(stream), kernel, x_map, w_map, problem);
}

}  // namespace

extern "C" int parrot_m_grouped_gemm(const MGroupedGemm* problem, void* stream) {
  return problem->trans_w ? launch_m<Weights::kRows>(*problem, stream) : launch_m<Weights::kColumns>(*problem, stream);
}

extern "C" int parrot_m_grouped_swiglu(const MGroupedGemm* problem, void* stream) {
  return launch_m<Weights::kSwiGLU>(*problem, stream);
}

extern "C" int parrot_k_grouped_gemm(const KGroupedGemm* problem, void* stream) {
  device::TensorMap a_map, b_map;
  const RaggedRows& rows = problem->rows;
  int error = rows_map(&a_map, rows, false, problem->a, problem->bfloat16, problem->n, kBlockK);
  if (error) return error;
  error = rows_map(&b_map, rows, rows.plan != nullptr, problem->b, problem->bfloat16, problem->k, kBlockK);
  if (error) return error;
  const auto kernel = problem->bfloat16 ? k_grouped_gemm_kernel<BFloat16> : k_grouped_gemm_kernel<Float16>;
  return device::launch(shape_of_launch(stream), kernel, a_map, b_map, *problem);
}

}  // namespace parrot::cuda
