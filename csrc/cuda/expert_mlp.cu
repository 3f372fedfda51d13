// Launches of the products that only `expert_mlp` has.
#include "expert_combine.cuh"
#include "expert_hidden_bwd.cuh"
#include "gemm_host.cuh"

namespace parrot::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

bool is_scaled(const ExpertCombine& problem) {
  return problem.a_scales != nullptr;
}

int64_t tile_columns(const ExpertCombine& problem) {
  return is_scaled(problem) ? ScaledShape::kColumns : WideShape::kColumns;
}

int64_t pairs_of_tiles(const ExpertCombine& problem) {
  const int64_t row_blocks = ceil_div(problem.rows, kBlockM), columns = ceil_div(problem.width, tile_columns(problem));
  return problem.images * (row_blocks / 2 * columns + row_blocks % 2 * ceil_div(columns, 2));
}

template <typename T, bool kScaled>
int launch_combine(const ExpertCombine& problem, void* stream) {
  using Product = CombineProduct<T, kScaled>;
  const int64_t width = problem.width, depth = problem.depth, experts = problem.experts_count;
  Product product{};
  product.problem = problem;
  Maps maps(problem.bfloat16);
  maps.add(product.a_map, problem.a, {depth, problem.rows, problem.segments, depth}, 64);
  const auto planes =
      kScaled ? device::Planes{depth, width, experts, depth} : device::Planes{width, depth, experts, width};
  maps.add(product.w_map, problem.w, planes, Product::kWeightRows);
  maps.add(product.residual_map, problem.residual, {width, problem.rows, problem.images, width}, 64);
  maps.add(product.y_map, problem.y, {width, problem.rows, problem.images, width}, 64);
  return maps.error() ? maps.error() : launch_gemm(product, stream);
}

template <typename T>
int launch_combine(const ExpertCombine& problem, void* stream) {
  return is_scaled(problem) ? launch_combine<T, true>(problem, stream) : launch_combine<T, false>(problem, stream);
}

template <typename T>
int launch_hidden_bwd(const ExpertHiddenBackward& problem, void* stream) {
  using Product = HiddenBackwardProduct<T>;
  const RaggedRows& rows = problem.rows;
  const int64_t width = problem.width, depth = problem.depth;
  Product product{};
  product.problem = problem;
  Maps maps(problem.bfloat16);
  maps.add(product.grad_map, problem.grad, source_planes(rows, depth), 64);
  maps.add(product.w_map, problem.w_down, {depth, width, rows.groups, depth}, Product::kWeightRows);
  maps.add(product.h_map, problem.h, result_planes(rows, width, width), 64);
  const device::Planes half = result_planes(rows, width, 2 * width);
  maps.add(product.gate_map, problem.z, half, 64);
  maps.add(product.up_map, static_cast<const T*>(problem.z) + width, half, 64);
  maps.add(product.grad_gate_map, problem.grad_z, half, 64);
  maps.add(product.grad_up_map, static_cast<T*>(problem.grad_z) + width, half, 64);
  return maps.error() ? maps.error() : launch_gemm(product, stream);
}

}  // namespace

// The fewest clocks of a model, not measured: products of a step, the end of a tile, and a part's way through memory.
extern "C" void parrot_plan_expert_combine(ExpertCombine* problem) {
  const int64_t kStep = is_scaled(*problem) ? 512 : 1024;
  constexpr int64_t kEnd = 2500, kPart = 3000;
  constexpr int kMostParts = 8;
  const int64_t clusters = blocks_of_gemm() / kCluster, pairs = pairs_of_tiles(*problem), rest = pairs % clusters;
  const int64_t steps = problem->topk * ceil_div(problem->depth, kBlockK);
  int64_t best = 0;
  problem->split = {};
  for (int parts = 1; rest && parts <= kMostParts && parts <= steps; ++parts) {
    const int64_t ends = kEnd + (parts > 1 ? kPart * (1 + parts) : 0);
    const int64_t clocks = ceil_div(rest * parts, clusters) * (ceil_div(steps, parts) * kStep + ends);
    if (parts > 1 && clocks >= best) continue;
    best = clocks;
    problem->split = {static_cast<int32_t>(pairs - rest), parts};
  }
}

extern "C" int64_t parrot_combine_scratch_bytes(const ExpertCombine* problem) {
  const SplitTail& split = problem->split;
  if (split.parts <= 1) return 0;
  const int64_t bytes = is_scaled(*problem) ? kPartBytes<ScaledShape> : kPartBytes<WideShape>;
  return (pairs_of_tiles(*problem) - split.whole) * kCluster * split.parts * bytes;
}

extern "C" int64_t parrot_combine_counters(const ExpertCombine* problem) {
  if (problem->split.parts <= 1) return 0;
  return (pairs_of_tiles(*problem) - problem->split.whole) * kCluster * kWarpGroups;
}

extern "C" int32_t parrot_hidden_backward_blocks(int32_t width) {
  return static_cast<int32_t>(ceil_div(width, FusedShape::kColumns));
}

extern "C" int parrot_expert_combine(const ExpertCombine* problem, void* stream) {
  return problem->bfloat16 ? launch_combine<BFloat16>(*problem, stream) : launch_combine<Float16>(*problem, stream);
}

extern "C" int parrot_expert_hidden_bwd(const ExpertHiddenBackward* problem, void* stream) {
  return problem->bfloat16 ? launch_hidden_bwd<BFloat16>(*problem, stream)
                           : launch_hidden_bwd<Float16>(*problem, stream);
}

}  // namespace parrot::cuda
