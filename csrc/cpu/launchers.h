// Launchers that others are made of, and what they share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace parrot {

template <class T>
const T* data_or_null(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

torch::stable::Tensor few_rows_linear(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                                      const std::optional<torch::stable::Tensor>& norm,
                                      const std::optional<torch::stable::Tensor>& bias,
                                      const std::optional<torch::stable::Tensor>& residual, bool gated, double eps);

void paged_attention(const torch::stable::Tensor& query, const torch::stable::Tensor& keys,
                     const torch::stable::Tensor& values, const torch::stable::Tensor& table,
                     const torch::stable::Tensor& bounds, const torch::stable::Tensor& lengths,
                     const torch::stable::Tensor& columns, const torch::stable::Tensor& visible, double scale,
                     torch::stable::Tensor out, torch::stable::Tensor extra);

}  // namespace parrot
