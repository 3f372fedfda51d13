// Launches of text_guided_routing: one for the forward pass, two for the backward pass.
#include "text_guided_routing_bwd.cuh"
#include "text_guided_routing_fwd.cuh"

namespace parrot::cuda {
namespace {

int64_t blocks_for(int64_t work, int64_t of_one) {
  return (work + of_one - 1) / of_one;
}

// A cooperative launch of `kernel`: as many blocks as there is work for, at most two per multiprocessor, all resident.
template <typename Shared, typename Outputs>
int launch_resident(void (*kernel)(RoutingInputs, Outputs), const RoutingInputs& in, const Outputs& out, void* stream) {
  const int resident = device::resident_blocks(kernel, kThreads, sizeof(Shared));
  if (resident == 0) return device::kLaunchFailure;
  int64_t blocks = blocks_for(in.rows, kChunk);
  if (blocks < in.images) blocks = in.images;
  if (blocks > resident) blocks = resident;
  const int64_t enough = 2 * static_cast<int64_t>(device::multiprocessors());
  if (blocks > enough) blocks = enough;
  return device::launch({dim3(static_cast<unsigned>(blocks)), kThreads, sizeof(Shared), stream, true}, kernel, in, out);
}

template <typename T>
int fwd(const RoutingInputs& in, const RoutingForward& out, void* stream) {
  if (in.experts <= 8) return launch_resident<ForwardShared<1>>(routing_fwd_kernel<T, 1>, in, out, stream);
  return launch_resident<ForwardShared<8>>(routing_fwd_kernel<T, 8>, in, out, stream);
}

template <typename T>
int bwd(const RoutingInputs& in, const RoutingBackward& out, void* stream) {
  const int error = in.experts <= 8
                        ? launch_resident<CoefficientShared<1>>(routing_bwd_coefficients_kernel<T, 1>, in, out, stream)
                        : launch_resident<CoefficientShared<8>>(routing_bwd_coefficients_kernel<T, 8>, in, out, stream);
  if (error) return error;
  const int64_t slices = blocks_for(in.hidden, kSliceVectors * kVector<T>);
  GradientBlocks blocks{};
  if (out.grad_router_weight) blocks.router_weight = slices * blocks_for(in.experts, kExpertGroup);
  if (out.grad_query) blocks.query = slices * in.images;
  if (out.grad_text) blocks.text = blocks_for(in.rows, kTextRows);
  const int64_t all = blocks.router_weight + blocks.query + blocks.text;
  if (all == 0) return 0;
  const device::Launch shape{dim3(static_cast<unsigned>(all)), kThreads, sizeof(GradientShared<T>), stream};
  return device::launch(shape, routing_bwd_gradients_kernel<T>, in, out, blocks);
}

}  // namespace

extern "C" int parrot_text_guided_routing_fwd(const RoutingInputs* in, const RoutingForward* out, void* stream) {
  switch (in->dtype) {
    case kFloat32:
      return fwd<float>(*in, *out, stream);
    case kBFloat16:
      return fwd<BFloat16>(*in, *out, stream);
    default:
      return fwd<Float16>(*in, *out, stream);
  }
}

extern "C" int parrot_text_guided_routing_bwd(const RoutingInputs* in, const RoutingBackward* out, void* stream) {
  switch (in->dtype) {
    case kFloat32:
      return bwd<float>(*in, *out, stream);
    case kBFloat16:
      return bwd<BFloat16>(*in, *out, stream);
    default:
      return bwd<Float16>(*in, *out, stream);
  }
}

}  // namespace parrot::cuda
