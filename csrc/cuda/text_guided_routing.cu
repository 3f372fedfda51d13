// Launches of text_guided_routing: one for the forward pass, three for the backward pass.
#include "text_guided_routing_bwd.cuh"
#include "text_guided_routing_fwd.cuh"

namespace parrot::cuda {
namespace {

int64_t blocks_for(int64_t work, int64_t of_one) {
  return (work + of_one - 1) / of_one;
}

// A launch of `kernel` over the chunks of rows: a block for each, at most two per multiprocessor. A short text leaves
// most of them free: then each chunk gets a cluster, whose blocks share its columns.
template <typename Shared, typename Outputs>
int launch_chunks(void (*kernel)(RoutingInputs, Outputs), const RoutingInputs& in, const Outputs& out, void* stream) {
  const int64_t enough = 2 * static_cast<int64_t>(device::multiprocessors());
  int64_t blocks = blocks_for(in.rows, kChunk);
  if (blocks == 0) blocks = 1;  // images without text have results too
  if (blocks > enough) blocks = enough;
  const int parts = blocks * kMostParts <= enough ? kMostParts : 1;
  const dim3 grid(static_cast<unsigned>(blocks * parts));
  return device::launch({grid, kThreads, sizeof(Shared), stream, parts}, kernel, in, out);
}

template <typename T>
int fwd(const RoutingInputs& in, const RoutingForward& out, void* stream) {
  if (in.experts <= 8) return launch_chunks<ForwardShared<1>>(routing_fwd_kernel<T, 1>, in, out, stream);
  return launch_chunks<ForwardShared<8>>(routing_fwd_kernel<T, 8>, in, out, stream);
}

template <typename T, int kExpertTiles>
int bwd_coefficients(const RoutingInputs& in, const RoutingBackward& out, void* stream) {
  const int error = launch_chunks<MeanShared<kExpertTiles>>(routing_bwd_means_kernel<T, kExpertTiles>, in, out, stream);
  if (error) return error;
  const auto blocks = static_cast<unsigned>(blocks_for(in.rows, kCoefficientRows));
  return device::launch({dim3(blocks), kCoefficientRows, 0, stream}, routing_bwd_coefficients_kernel<kExpertTiles>, in,
                        out);
}

template <typename T>
int bwd(const RoutingInputs& in, const RoutingBackward& out, void* stream) {
  const int error = in.experts <= 8 ? bwd_coefficients<T, 1>(in, out, stream) : bwd_coefficients<T, 8>(in, out, stream);
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
