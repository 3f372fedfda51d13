// Launches of topk_routing: one for up to kTileRows rows, else three; one for the backward pass.
#include "topk_routing_bwd.cuh"
#include "topk_routing_fwd.cuh"

namespace parrot::cuda {
namespace {

unsigned blocks_for(int64_t work, int64_t of_one) {
  return static_cast<unsigned>((work + of_one - 1) / of_one);
}

template <typename T, int kPlaces>
int fwd(const TopKInputs& in, const TopKForward& out, void* stream) {
  const unsigned tiles = blocks_for(in.rows, kTileRows);
  const device::Launch by_tile{dim3(tiles), kRouteThreads, sizeof(RouteShared<kPlaces>), stream};
  int error = device::launch(by_tile, topk_routing_tiles_kernel<T, kPlaces>, in, out);
  if (error || tiles == 1) return error;
  const device::Launch by_expert{dim3(blocks_for(in.experts + 1, kRouteWarps)), kRouteThreads, 0, stream};
  error = device::launch(by_expert, topk_routing_totals_kernel, in, out, static_cast<int>(tiles));
  if (error) return error;
  return device::launch(by_tile, topk_routing_plan_kernel<kPlaces>, in, out);
}

template <typename T, int kPlaces>
int bwd(const TopKInputs& in, const TopKBackward& out, void* stream) {
  const device::Launch shape{dim3(blocks_for(in.rows, kGradientThreads / 32)), kGradientThreads, 0, stream};
  return device::launch(shape, topk_routing_bwd_kernel<T, kPlaces>, in, out);
}

template <int kPlaces>
int run(const TopKInputs& in, const TopKForward& out, void* stream) {
  switch (in.dtype) {
    case kFloat32:
      return fwd<float, kPlaces>(in, out, stream);
    case kBFloat16:
      return fwd<BFloat16, kPlaces>(in, out, stream);
    default:
      return fwd<Float16, kPlaces>(in, out, stream);
  }
}

template <int kPlaces>
int run(const TopKInputs& in, const TopKBackward& out, void* stream) {
  switch (in.dtype) {
    case kFloat32:
      return bwd<float, kPlaces>(in, out, stream);
    case kBFloat16:
      return bwd<BFloat16, kPlaces>(in, out, stream);
    default:
      return bwd<Float16, kPlaces>(in, out, stream);
  }
}

// By experts that a lane holds.
template <typename Outputs>
int run_for_experts(const TopKInputs& in, const Outputs& out, void* stream) {
  if (in.experts <= 32) return run<1>(in, out, stream);
  if (in.experts <= 128) return run<4>(in, out, stream);
  if (in.experts <= 256) return run<8>(in, out, stream);
  return run<16>(in, out, stream);
}

}  // namespace

extern "C" int parrot_topk_routing_fwd(const TopKInputs* in, const TopKForward* out, void* stream) {
  return run_for_experts(*in, *out, stream);
}

extern "C" int parrot_topk_routing_bwd(const TopKInputs* in, const TopKBackward* out, void* stream) {
  return run_for_experts(*in, *out, stream);
}

}  // namespace parrot::cuda
