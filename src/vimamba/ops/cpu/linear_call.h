// One call of the product: panels of the weight x stretches of the rows.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "instruction_set.h"
#include "parallel.h"
#include "tensors.h"

namespace vimamba {

constexpr int64_t kCachedWords = 1 << 17;  // half a megabyte of a core's second-level cache

Tensor new_outputs(const Tensor& x, int64_t N) {
  const auto leading = x.sizes().slice(0, x.dim() - 1);
  std::vector<int64_t> sizes(leading.begin(), leading.end());
  sizes.push_back(N);
  return new_floats(x, sizes);
}

// All rows by all panels; pack(begin, end, packed) packs some of these.
template <class F>
void multiply_all(const Kernels& k, Product product, int64_t rows, const F& pack) {
  const int64_t panels = k.linear_panels(product.N), words = words_of(product.element, product.K);
  const int64_t across = std::gcd(panels, threads()), along = threads() / across;
  for_each_task(across * along, [&](int64_t task) {
    const int64_t first = task % across * panels / across, last = (task % across + 1) * panels / across;
    const int64_t part = task / across, begin = part * rows / along, end = (part + 1) * rows / along;
    // Few rows stay in cache while one panel after the other is packed; many pass all panels, packed before.
    const int64_t group = (end - begin) * words <= kCachedWords ? 1 : last - first;
    float* packed = scratch<0>(k.linear_packed(group, words));
    Product part_of_product = product;
    part_of_product.packed = packed;
    for (int64_t panel = first; panel < last; panel += group) {
      pack(panel, panel + group, packed);
      k.linear_multiply(part_of_product, begin, end, panel, panel + group);
    }
  });
}

// x (..., K) weight^T (K, N) + bias (N,). A weight that is a transpose, as in the gradient of x, is read as
// it is.
Tensor linear(const Tensor given_x, const Tensor given_weight, const Maybe given_bias) {
  const Kernels& k = kernels();
  STD_TORCH_CHECK(given_weight.dim() == 2, "vimamba_cpu: weight is not (N, K)");
  const bool transposed = given_weight.stride(0) == 1 && given_weight.stride(1) == given_weight.size(0);
  const Tensor x = as_contiguous(given_x), weight = transposed ? given_weight : as_contiguous(given_weight);
  const Maybe bias = as_contiguous(given_bias);
  const auto pack = transposed ? k.linear_pack_transposed : k.linear_pack;
  const int64_t N = weight.size(0), K = weight.size(1), rows = rows_of("x", x, K);
  check_count("x", x, rows * K);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "vimamba_cpu: weight is not float32");
  check_floats("bias", bias, {N});
  const Tensor out = new_outputs(x, N);
  const Product product = {Element::float32, false, data(x), nullptr, data(bias), data(out), K, N, N, K};
  multiply_all(k, product, rows, [&](int64_t begin, int64_t end, float* packed) {
    pack(data(weight), N, K, begin, end, packed);
  });
  return out;
}

// The same with a weight of 8-bit integers, each output feature of a scale (N,) of its own, and with the rows
// of x as 8-bit integers, each of a scale of its own.
Tensor quantized_linear(const Tensor given_x, const Tensor given_weight, const Tensor given_scales,
                        const Maybe given_bias) {
  const Kernels& k = kernels();
  const Tensor x = as_contiguous(given_x), weight = as_contiguous(given_weight),
               scales = as_contiguous(given_scales);
  const Maybe bias = as_contiguous(given_bias);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Char,
                  "vimamba_cpu: weight is not (N, K) 8-bit integers");
  const int64_t N = weight.size(0), K = weight.size(1), rows = rows_of("x", x, K);
  check_count("x", x, rows * K);
  check_floats("scales", scales, {N});
  check_floats("bias", bias, {N});
  const int64_t words = words_of(Element::int8, K);
  const Tensor integers = new_floats(x, {rows, words}), of_rows = new_floats(x, {2, rows});
  float* const row_scales = data(of_rows);
  int32_t* const row_sums = reinterpret_cast<int32_t*>(row_scales + rows);
  const int64_t parts = threads();
  for_each_task(parts, [&](int64_t part) {
    const int64_t begin = part * rows / parts, end = (part + 1) * rows / parts;
    k.linear_quantize(data(x) + begin * K, end - begin, K,
                      reinterpret_cast<int8_t*>(data(integers) + begin * words), row_scales + begin,
                      row_sums + begin);
  });
  const Tensor out = new_outputs(x, N);
  Product product = {Element::int8, false, data(integers), nullptr, data(bias), data(out), words, N, N, K};
  product.x_scales = row_scales, product.x_sums = row_sums, product.scales = data(scales);
  multiply_all(k, product, rows, [&](int64_t begin, int64_t end, float* packed) {
    k.linear_pack_int8(static_cast<const int8_t*>(weight.data_ptr()), N, K, begin, end, packed);
  });
  return out;
}

}  // namespace vimamba
