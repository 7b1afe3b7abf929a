// How one call of the fused mixer's backward divides over threads: by images, or by images and directions.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "mixer_call.h"

namespace vimamba {

// The gradient of xz in S parts, (S, B, L, 2 D), to be summed, and those of all weights.
std::tuple<Tensor, std::vector<Tensor>> mixer_backward(const Tensor given_dout, const Tensor given_xz,
                                                       std::vector<Tensor> given_weights,
                                                       std::vector<int64_t> reverse,
                                                       const Tensor given_states, double scale) {
  const Kernels& k = kernels();
  const int64_t count = reverse.size();
  const std::vector<Tensor> weights = weights_of(given_weights, count);
  STD_TORCH_CHECK(given_xz.dim() == 3 && given_xz.size(2) > 1 && given_dout.dim() == 3,
                  "vimamba_cpu: xz is not (B, L, 2 D) or dout not (B, L, D)");
  const Tensor xz = channels_last(given_xz), dout = channels_last(given_dout);
  const Tensor states = as_contiguous(given_states);
  const int64_t batch = xz.size(0), length = xz.size(1), dim = xz.size(2) / 2;
  check_rows("dout", dout, {batch, length, dim}, xz);
  const Mixer m = mixer_of(xz, weights, count, scale, {}, dout);
  STD_TORCH_CHECK(m.width <= kMaxWidth, "vimamba_cpu: a convolution takes a width of 1 to ", kMaxWidth);
  check_floats("states", states, {count, batch, chunks_of(length), dim, m.state});

  const bool whole = by_images(batch) || count == 1;
  const int64_t parts_of_dxz = whole ? 1 : count, items = whole ? batch : batch * count;
  const Tensor dxz = torch::stable::new_empty(xz, Sizes{parts_of_dxz, batch, length, 2 * dim});
  const std::vector<Direction> directions = directions_of(weights, reverse, m, states);
  std::vector<Tensor> gradients;
  for (const Tensor& weight : weights) gradients.push_back(torch::stable::empty_like(weight));
  const int64_t packed_floats = k.mixer_backward_packed(m), sum_floats = k.mixer_backward_sums(m);
  const int64_t parts = std::max<int64_t>(1, std::min(threads(), items));
  float* packed = scratch<1>(count * (packed_floats + parts * sum_floats));
  float* sums = packed + count * packed_floats;
  std::memset(sums, 0, parts * count * sum_floats * sizeof(float));
  for (int64_t d = 0; d < count; ++d) k.mixer_backward_pack(m, directions[d], packed + d * packed_floats);

  const int64_t element = m.bf16 ? 2 : 4;
  auto run = [&](int64_t part, int64_t b, int64_t d) {
    char* dx = static_cast<char*>(dxz.data_ptr()) + (whole ? 0 : d * dxz.stride(0) * element);
    const MixerGradients grad = {{dout.data_ptr(), dout.stride(0), dout.stride(1)},
                                 {dx, dxz.stride(1), dxz.stride(2)},
                                 {dx + dim * element, dxz.stride(1), dxz.stride(2)}};
    k.mixer_backward(m, directions[d], grad, packed + d * packed_floats, b, !whole || d == 0,
                     sums + (part * count + d) * sum_floats, scratch<0>(k.mixer_backward_scratch(m)));
  };
  for_each_task(parts, [&](int64_t part) {
    for (int64_t item = part * items / parts; item < (part + 1) * items / parts; ++item)
      if (whole)
        for (int64_t d = 0; d < count; ++d) run(part, item, d);
      else
        run(part, item / count, item % count);
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < count * sum_floats; ++i) sums[i] += sums[part * count * sum_floats + i];
  for (int64_t d = 0; d < count; ++d) {
    const Tensor* g = &gradients[kWeights * d];
    k.mixer_backward_unpack(m, packed + d * packed_floats, sums + d * sum_floats,
                            {data(g[0]), data(g[1]), data(g[2]), data(g[3]), data(g[4]), data(g[5]), data(g[6])});
  }
  return {dxz, gradients};
}

}  // namespace vimamba
