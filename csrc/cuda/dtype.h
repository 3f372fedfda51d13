// Element types by number, for launchers.
#pragma once

#include <stdint.h>

namespace parrot::cuda {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace parrot::cuda
