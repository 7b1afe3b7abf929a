// From tensors to plain pointers. Sizes and types of the tensors that reach the operators: what Python has
// checked is checked again wherever a wrong size would be read or written beyond its memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "kernels.h"

namespace vimamba {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

template <class T = float>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

float* data(const Maybe& tensor) { return tensor ? data(*tensor) : nullptr; }

bool is_bf16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Maybe as_contiguous(const Maybe& tensor) { return tensor ? Maybe(as_contiguous(*tensor)) : tensor; }

Tensor new_floats(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// (B, D, L).
Rows rows(const Maybe& tensor_BDL) {
  if (!tensor_BDL) return {nullptr, 0, 0};
  const int64_t channel_stride = tensor_BDL->size(1) == 1 ? 1 : tensor_BDL->stride(1);
  return {tensor_BDL->data_ptr(), tensor_BDL->stride(0), tensor_BDL->stride(2), channel_stride};
}

bool has_sizes(const Tensor& tensor, Sizes sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t axis = 0;
  for (const int64_t size : sizes)
    if (tensor.size(axis++) != size) return false;
  return true;
}

// A contiguous float32 tensor of these sizes.
void check_floats(const char* name, const Tensor& tensor, Sizes sizes) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && has_sizes(tensor, sizes),
      "vimamba_cpu: ", name, " is not contiguous float32 of the expected shape");
}

void check_floats(const char* name, const Maybe& tensor, Sizes sizes) {
  if (tensor) check_floats(name, *tensor, sizes);
}

// An activation: these sizes and the type of `like`, float32 or bfloat16.
void check_rows(const char* name, const Maybe& tensor, Sizes sizes, const Tensor& like) {
  if (!tensor) return;
  const ScalarType type = tensor->scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::BFloat16) && type == like.scalar_type() &&
                      has_sizes(*tensor, sizes),
                  "vimamba_cpu: ", name, " has not the expected shape and type");
}

// Rows of E channels in a contiguous float32 or bfloat16 tensor.
int64_t rows_of(const char* name, const Tensor& tensor, int64_t dim) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(dim > 0 && tensor.dim() > 0 && tensor.size(tensor.dim() - 1) == dim &&
                      tensor.is_contiguous() && (type == ScalarType::Float || type == ScalarType::BFloat16),
                  "vimamba_cpu: ", name, " is not contiguous float32 or bfloat16 rows of ", dim, " channels");
  return tensor.numel() / dim;
}

void check_same_rows(const char* name, const Maybe& tensor, int64_t count, int64_t dim) {
  STD_TORCH_CHECK(!tensor || rows_of(name, *tensor, dim) == count, "vimamba_cpu: ", name, " has not ", count,
                  " rows");
}

void check_count(const char* name, const Tensor& tensor, int64_t count) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count,
      "vimamba_cpu: ", name, " is not ", count, " contiguous float32 numbers");
}

}  // namespace vimamba
