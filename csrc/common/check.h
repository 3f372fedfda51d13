// Argument checks for op entry points. Every message names the argument, what was wanted and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

namespace parrot {

// "[2, 3]" of a tensor's sizes.
inline std::string shape_string(const torch::stable::Tensor& tensor) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << "]";
  return out.str();
}

// A negative entry of `wanted` accepts every size.
inline bool shape_is(const torch::stable::Tensor& tensor, const std::vector<int64_t>& wanted) {
  if (tensor.dim() != static_cast<int64_t>(wanted.size())) return false;
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (wanted[i] >= 0 && tensor.size(static_cast<int64_t>(i)) != wanted[i]) return false;
  }
  return true;
}

inline std::string shape_string(const std::vector<int64_t>& wanted) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < wanted.size(); ++i) {
    out << (i ? ", " : "");
    if (wanted[i] < 0) {
      out << "any";
    } else {
      out << wanted[i];
    }
  }
  out << "]";
  return out.str();
}

}  // namespace parrot

// PARROT_CHECK_SHAPE(x, rows, 16): x must be [rows, 16]; a negative size accepts every size.
#define PARROT_CHECK_SHAPE(x, ...)                                              \
  STD_TORCH_CHECK(::parrot::shape_is(x, {__VA_ARGS__}), #x " must have shape ", \
                  ::parrot::shape_string(std::vector<int64_t>{__VA_ARGS__}), ", got ", ::parrot::shape_string(x))

// PARROT_CHECK_DTYPE(x, Float): the name of a torch::headeronly::ScalarType.
#define PARROT_CHECK_DTYPE(x, dtype)                                                                                 \
  STD_TORCH_CHECK((x).scalar_type() == torch::headeronly::ScalarType::dtype, #x " must have dtype " #dtype ", got ", \
                  torch::headeronly::toString((x).scalar_type()))

#define PARROT_CHECK_CONTIGUOUS(x) \
  STD_TORCH_CHECK((x).is_contiguous(), #x " must be contiguous, got a strided view; call .contiguous() on it")

#define PARROT_CHECK_CPU(x) STD_TORCH_CHECK((x).is_cpu(), #x " must be a CPU tensor, got a tensor on another device")
