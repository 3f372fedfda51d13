// Launchers that others are made of.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace parrot {

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
