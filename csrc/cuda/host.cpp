#include "host.h"

#include "device_info.h"
#include "dtype.h"

namespace parrot::cuda {

int32_t float_type(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

void check_launch(int error, const char* launcher) {
  STD_TORCH_CHECK(error == 0, launcher, ": ", parrot_cuda_error_string(error), " (error ", error, ")");
}

}  // namespace parrot::cuda
