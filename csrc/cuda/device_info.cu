#include "device_info.h"

#include <cuda_runtime.h>

extern "C" const char* parrot_cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
