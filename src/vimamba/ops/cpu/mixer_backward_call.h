// How one call of the fused mixer's backwards divides over threads: by images, or by images and directions.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "mixer_call.h"

namespace vimamba {

// Calls run(part, b, d, s) for every direction of every image, each thread one part of the calls: direction
// d's gradient goes into slice s of those of all images, whose first direction is s too.
template <class F>
void for_each_direction(int64_t batch, int64_t count, int64_t slices, int64_t parts, const F& run) {
  const int64_t items = batch * slices, each = count / slices;
  for_each_task(parts, [&](int64_t part) {
    for (int64_t item = part * items / parts; item < (part + 1) * items / parts; ++item)
      for (int64_t d = 0; d < each; ++d) run(part, item / slices, item % slices * each + d, item % slices);
  });
}

// How many slices keep every thread at work: one, or one a direction.
int64_t slices_of(int64_t batch, int64_t count) { return by_images(batch) ? 1 : count; }

void check_activations(const Tensor& dout, const Tensor& xz) {
  STD_TORCH_CHECK(xz.dim() == 3 && xz.size(2) > 1 && dout.dim() == 3,
                  "vimamba_cpu: xz is not (B, L, 2 D) or dout not (B, L, D)");
}

// The gradient of xz in S parts, (S, B, L, 2 D), to be summed, and those of all weights.
std::tuple<Tensor, std::vector<Tensor>> mixer_backward(const Tensor given_dout, const Tensor given_xz,
                                                       std::vector<Tensor> given_weights,
                                                       std::vector<int64_t> reverse,
                                                       const Tensor given_states, double scale) {
  const Kernels& k = kernels();
  const int64_t count = reverse.size();
  const std::vector<Tensor> weights = weights_of(given_weights, count);
  check_activations(given_dout, given_xz);
  const Tensor xz = channels_last(given_xz), dout = channels_last(given_dout);
  const Tensor states = as_contiguous(given_states);
  const int64_t batch = xz.size(0), length = xz.size(1), dim = xz.size(2) / 2;
  check_rows("dout", dout, {batch, length, dim}, xz);
  const Mixer m = mixer_of(xz, weights, count, scale, {}, dout);
  STD_TORCH_CHECK(m.width <= kMaxWidth, "vimamba_cpu: a convolution takes a width of 1 to ", kMaxWidth);
  check_floats("states", states, {count, batch, chunks_of(length), dim, m.state});

  const int64_t slices = slices_of(batch, count);
  const Tensor dxz = torch::stable::new_empty(xz, Sizes{slices, batch, length, 2 * dim});
  const std::vector<Direction> directions = directions_of(weights, reverse, m, states);
  std::vector<Tensor> gradients;
  for (const Tensor& weight : weights) gradients.push_back(torch::stable::empty_like(weight));
  const int64_t packed_floats = k.mixer_backward_packed(m), sum_floats = k.mixer_backward_sums(m);
  const int64_t parts = std::max<int64_t>(1, std::min(threads(), batch * slices));
  float* packed = scratch<1>(count * (packed_floats + parts * sum_floats));
  float* sums = packed + count * packed_floats;
  std::memset(sums, 0, parts * count * sum_floats * sizeof(float));
  for (int64_t d = 0; d < count; ++d) k.mixer_backward_pack(m, directions[d], packed + d * packed_floats);

  const int64_t element = m.bf16 ? 2 : 4;
  for_each_direction(batch, count, slices, parts, [&](int64_t part, int64_t b, int64_t d, int64_t slice) {
    char* dx = static_cast<char*>(dxz.data_ptr()) + slice * dxz.stride(0) * element;
    const MixerGradients grad = {{dout.data_ptr(), dout.stride(0), dout.stride(1)},
                                 {dx, dxz.stride(1), dxz.stride(2)},
                                 {dx + dim * element, dxz.stride(1), dxz.stride(2)}};
    k.mixer_backward(m, directions[d], grad, packed + d * packed_floats, b, d == slice,
                     sums + (part * count + d) * sum_floats, scratch<0>(k.mixer_backward_scratch(m)));
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

// The gradient of x in S parts, (S, B, L, D), to be summed, with what chooses held constant.
Tensor mixer_frozen_backward(const Tensor given_dout, const Tensor given_xz,
                             std::vector<Tensor> given_weights, std::vector<int64_t> reverse, double scale,
                             const Maybe given_gates) {
  const Kernels& k = kernels();
  const int64_t count = reverse.size();
  const std::vector<Tensor> weights = weights_of(given_weights, count);
  check_activations(given_dout, given_xz);
  const Tensor xz = channels_last(given_xz), dout = channels_last(given_dout);
  const Maybe gates = as_contiguous(given_gates);
  const Mixer m = mixer_of(xz, weights, count, scale, gates, dout);
  STD_TORCH_CHECK(m.width <= kMaxWidth, "vimamba_cpu: a convolution takes a width of 1 to ", kMaxWidth);
  const int64_t slices = slices_of(m.batch, count);
  const Tensor dx = torch::stable::new_empty(xz, Sizes{slices, m.batch, m.length, m.dim});
  const std::vector<Direction> directions = directions_of(weights, reverse, m, {});
  const int64_t packed_floats = k.mixer_packed(m), element = m.bf16 ? 2 : 4;
  float* packed = scratch<1>(count * packed_floats);
  for (int64_t d = 0; d < count; ++d) k.mixer_pack(m, directions[d], packed + d * packed_floats);
  const int64_t parts = std::max<int64_t>(1, std::min(threads(), m.batch * slices));
  for_each_direction(m.batch, count, slices, parts, [&](int64_t, int64_t b, int64_t d, int64_t slice) {
    char* to = static_cast<char*>(dx.data_ptr()) + slice * dx.stride(0) * element;
    const MixerGradients grad = {{dout.data_ptr(), dout.stride(0), dout.stride(1)},
                                 {to, dx.stride(1), dx.stride(2)}};
    k.mixer_frozen_backward(m, directions[d], grad, packed + d * packed_floats, b, d == slice,
                            scratch<0>(k.mixer_backward_scratch(m)));
  });
  return dx;
}

}  // namespace vimamba
