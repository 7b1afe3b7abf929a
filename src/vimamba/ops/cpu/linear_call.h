// One call of the product: panels of the weight x stretches of the rows.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "instruction_set.h"
#include "parallel.h"
#include "tensors.h"

namespace vimamba {

constexpr int64_t kCachedFloats = 1 << 17;  // half a megabyte of a core's second-level cache

// x (..., K) weight^T (K, N) + bias (N,). A weight that is a transpose, as in the gradient of x, is read as it is.
Tensor linear(const Tensor given_x, const Tensor given_weight, const Maybe given_bias) {
  const Kernels& k = kernels();
  STD_TORCH_CHECK(given_weight.dim() == 2, "vimamba_cpu: weight is not (N, K)");
  const bool transposed = given_weight.stride(0) == 1 && given_weight.stride(1) == given_weight.size(0);
  const Tensor x = as_contiguous(given_x), weight = transposed ? given_weight : as_contiguous(given_weight);
  const Maybe bias = as_contiguous(given_bias);
  const auto pack = transposed ? k.linear_pack_transposed : k.linear_pack;
  const int64_t N = weight.size(0), K = weight.size(1), rows = rows_of("x", x, K),
                panels = k.linear_panels(N);
  check_count("x", x, rows * K);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "vimamba_cpu: weight is not float32");
  check_floats("bias", bias, {N});
  const auto leading = x.sizes().slice(0, x.dim() - 1);
  std::vector<int64_t> sizes(leading.begin(), leading.end());
  sizes.push_back(N);
  const Tensor out = new_floats(x, sizes);
  const int64_t across = std::gcd(panels, threads()), along = threads() / across;
  for_each_task(across * along, [&](int64_t task) {
    const int64_t first = task % across * panels / across, last = (task % across + 1) * panels / across;
    const int64_t part = task / across, begin = part * rows / along, end = (part + 1) * rows / along;
    // Few rows stay in cache while one panel after the other is packed; many pass all panels, packed before.
    const int64_t group = (end - begin) * K <= kCachedFloats ? 1 : last - first;
    float* packed = scratch<0>(k.linear_packed(group, K));
    const Product product = {Element::float32, false, data(x), packed, data(bias), data(out), K, N, N, K};
    for (int64_t panel = first; panel < last; panel += group) {
      pack(data(weight), N, K, panel, panel + group, packed);
      k.linear_multiply(product, begin, end, panel, panel + group);
    }
  });
  return out;
}

}  // namespace vimamba
