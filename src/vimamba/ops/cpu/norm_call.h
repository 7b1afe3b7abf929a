// One call of the norm: rows, divided evenly over the threads.
#pragma once

#include <cstdint>
#include <tuple>

#include "instruction_set.h"
#include "parallel.h"
#include "tensors.h"

namespace vimamba {

// The normalised sum of x and residual (..., E), the sum, and 1 / its root mean square (...).
std::tuple<Tensor, Tensor, Tensor> norm_forward(const Tensor given_x, const Maybe given_residual,
                                                const Tensor given_weight, double eps, ScalarType out_dtype) {
  const Kernels& k = kernels();
  const Tensor x = as_contiguous(given_x), weight = as_contiguous(given_weight);
  const Maybe residual = as_contiguous(given_residual);
  const int64_t dim = weight.dim() == 1 ? weight.size(0) : 0, count = rows_of("x", x, dim);
  check_floats("weight", weight, {dim});
  check_same_rows("residual", residual, count, dim);
  const auto sizes = x.sizes();
  const Tensor normed = torch::stable::new_empty(x, sizes, out_dtype);
  check_same_rows("normed", normed, count, dim);
  const Tensor sum = torch::stable::new_empty(x, sizes, ScalarType::Float);
  const Tensor rstd = torch::stable::new_empty(x, sizes.slice(0, sizes.size() - 1), ScalarType::Float);
  const Norm norm = {count,
                     dim,
                     is_bf16(x),
                     residual && is_bf16(*residual),
                     is_bf16(normed),
                     x.data_ptr(),
                     residual ? residual->data_ptr() : nullptr,
                     data(weight),
                     static_cast<float>(eps),
                     normed.data_ptr(),
                     data(sum),
                     data(rstd)};
  const int64_t parts = threads();
  for_each_task(parts, [&](int64_t part) {
    for_each_stretch(1, norm.rows, part, parts,
                     [&](int64_t, int64_t begin, int64_t end) { k.norm_forward(norm, begin, end); });
  });
  return {normed, sum, rstd};
}

// All activations contiguous; dweight is (S, E), zero, for S parts of the rows.
void norm_backward(const Tensor dnormed, const Maybe dresidual, const Tensor sum, const Tensor weight,
                   const Tensor rstd, Tensor dsum, Tensor dweight) {
  const Kernels& k = kernels();
  const int64_t dim = weight.dim() == 1 ? weight.size(0) : 0, count = rows_of("dnormed", dnormed, dim);
  const int64_t parts = dweight.size(0);
  check_floats("weight", weight, {dim});
  if (dresidual) check_count("dresidual", *dresidual, count * dim);
  check_count("sum", sum, count * dim);
  check_count("rstd", rstd, count);
  check_count("dsum", dsum, count * dim);
  check_floats("dweight", dweight, {parts, dim});
  const NormGradients grad = {count,     dim,          is_bf16(dnormed), dnormed.data_ptr(), data(dresidual),
                              data(sum), data(weight), data(rstd),       data(dsum)};
  for_each_task(parts, [&](int64_t part) {
    for_each_stretch(1, grad.rows, part, parts, [&](int64_t, int64_t begin, int64_t end) {
      k.norm_backward(grad, begin, end, data(dweight) + part * grad.dim);
    });
  });
}

}  // namespace vimamba
