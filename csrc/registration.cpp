// The library `parrot_ext`. Each op defines its schema beside its implementation (STABLE_TORCH_LIBRARY_FRAGMENT in
// csrc/cpu and csrc/cuda), so this file only answers what the binary was built with.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace {

bool has_cuda_kernels() {
#ifdef PARROT_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(parrot_ext, m) {
  m.def("has_cuda_kernels() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(parrot_ext, CompositeImplicitAutograd, m) {
  m.impl("has_cuda_kernels", TORCH_BOX(&has_cuda_kernels));
}
