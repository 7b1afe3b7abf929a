// One call of the convolution: stretches of batch x time, one a thread.
#pragma once

#include <cstdint>

#include "instruction_set.h"
#include "parallel.h"
#include "tensors.h"

namespace vimamba {

Conv conv_of(const Tensor& x, const Tensor& y, const Tensor& weight, const Maybe& bias, bool silu,
             bool reverse) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && weight.size(1) >= 1 && weight.size(1) <= kMaxWidth,
                  "vimamba_cpu: a convolution takes x (B, D, L) and a width of 1 to ", kMaxWidth);
  check_rows("x", x, {x.size(0), x.size(1), x.size(2)}, x);
  check_rows("y", y, {x.size(0), x.size(1), x.size(2)}, x);
  check_floats("weight", weight, {x.size(1), weight.size(1)});
  check_floats("bias", bias, {x.size(1)});
  return {x.size(0), x.size(1), x.size(2), weight.size(1), is_bf16(x), silu,
          reverse,   rows(x),   rows(y),   data(weight),   data(bias)};
}

Tensor conv_forward(const Tensor x, const Tensor given_weight, const Maybe given_bias, bool silu,
                    bool reverse) {
  const Kernels& k = kernels();
  const Tensor weight = as_contiguous(given_weight), y = torch::stable::empty_like(x);
  const Maybe bias = as_contiguous(given_bias);
  const Conv conv = conv_of(x, y, weight, bias, silu, reverse);
  const int64_t parts = threads();
  for_each_task(parts, [&](int64_t part) {
    for_each_stretch(conv.batch, conv.length, part, parts,
                     [&](int64_t b, int64_t begin, int64_t end) { k.conv_forward(conv, b, begin, end); });
  });
  return y;
}

// dweight is (S, D, W) and dbias (S, D), zero, for S parts of the work.
void conv_backward(const Tensor dy, const Tensor x, const Tensor weight, const Maybe bias, bool silu,
                   bool reverse, Tensor dx, Tensor dweight, Maybe dbias) {
  const Kernels& k = kernels();
  const Conv conv = conv_of(x, dy, weight, bias, silu, reverse);
  const int64_t parts = dweight.size(0);
  check_rows("dx", dx, {conv.batch, conv.dim, conv.length}, x);
  check_floats("dweight", dweight, {parts, conv.dim, conv.width});
  check_floats("dbias", dbias, {parts, conv.dim});
  const ConvGradients grad = {rows(dx), data(dweight), data(dbias)};
  for_each_task(parts, [&](int64_t part) {
    float* memory = scratch<0>(k.conv_backward_scratch(conv));
    for_each_stretch(conv.batch, conv.length, part, parts, [&](int64_t b, int64_t begin, int64_t end) {
      k.conv_backward(conv, grad, b, begin, end, part, memory);
    });
  });
}

}  // namespace vimamba
