// What the torch side of every CUDA op needs: library and dispatch key, checks, the stream, and errors as exceptions.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/check.h"

// Tests build the same files with kernels that run on the CPU (tests/cuda_emulator): another library, another key.
#ifdef PARROT_DEVICE_EMULATOR
#define PARROT_CUDA_LIBRARY parrot_emulated
#define PARROT_CUDA_KEY CPU
#else
#define PARROT_CUDA_LIBRARY parrot_ext
#define PARROT_CUDA_KEY CUDA
// It lives in libtorch_cuda: null where torch is built for the CPU, where this binary must load too.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));
#endif

namespace parrot::cuda {

// Makes the device of `tensor` the current one for a launch on its current stream.
class LaunchScope {
 public:
#ifdef PARROT_DEVICE_EMULATOR
  explicit LaunchScope(const torch::stable::Tensor&) {}
#else
  explicit LaunchScope(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
#endif
  void* stream() const { return stream_; }

 private:
#ifndef PARROT_DEVICE_EMULATOR
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

// The number of a tensor's element type, for launchers.
int32_t float_type(const torch::stable::Tensor& tensor, const char* name);

// Throws when a launcher returned something else than cudaSuccess.
void check_launch(int error, const char* launcher);

inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

}  // namespace parrot::cuda

#define PARROT_CHECK_DEVICE(x, like)                                                                      \
  STD_TORCH_CHECK((x).is_cpu() == (like).is_cpu() && (x).get_device_index() == (like).get_device_index(), \
                  #x " must be on the device of " #like)

#define PARROT_CHECK_SAME_DTYPE(x, like)                                                               \
  STD_TORCH_CHECK((x).scalar_type() == (like).scalar_type(), #x " must have the dtype of " #like ", ", \
                  torch::headeronly::toString((like).scalar_type()), ", got ",                         \
                  torch::headeronly::toString((x).scalar_type()))

#define PARROT_CHECK_ALIGNED(x) \
  STD_TORCH_CHECK(::parrot::cuda::is_aligned((x).const_data_ptr()), #x " must start at a multiple of 16 bytes")

// A dense operand beside `like`: same device, same dtype, contiguous, aligned for 16-byte accesses.
#define PARROT_CHECK_OPERAND(x, like) \
  PARROT_CHECK_DEVICE(x, like);       \
  PARROT_CHECK_SAME_DTYPE(x, like);   \
  PARROT_CHECK_CONTIGUOUS(x);         \
  PARROT_CHECK_ALIGNED(x)

// A dense operand of a given dtype on the device of `like`.
#define PARROT_CHECK_DENSE(x, dtype, like) \
  PARROT_CHECK_DEVICE(x, like);            \
  PARROT_CHECK_DTYPE(x, dtype);            \
  PARROT_CHECK_CONTIGUOUS(x)
