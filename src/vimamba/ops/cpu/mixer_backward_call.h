// How one call of the fused mixer's backwards divides over threads: by images, or by images and directions.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "mixer_call.h"

namespace vimamba {

// What both backwards are called with, and their slices: gradients are gathered in one, or in one a
// direction, whichever keeps every thread at work.
struct BackwardCall {
  Tensor xz, dout;
  std::vector<Tensor> weights;
  Maybe gates;
  Mixer m = {};
  int64_t count = 0, slices = 0, parts = 0;

  Rows dout_rows() const { return {dout.data_ptr(), dout.stride(0), dout.stride(1)}; }

  // Calls run(part, b, d, to, first) for every direction of every image, each thread one part of the calls:
  // the gradient goes to `to`, a slice of `out`, and is stored if it is the `first` there.
  template <class F>
  void for_each_direction(const Tensor& out, const F& run) const {
    const int64_t items = m.batch * slices, each = count / slices, bytes = out.stride(0) * element_bytes();
    for_each_task(parts, [&](int64_t part) {
      for (int64_t item = part * items / parts; item < (part + 1) * items / parts; ++item) {
        const int64_t slice = item % slices;
        char* to = static_cast<char*>(out.data_ptr()) + slice * bytes;
        for (int64_t d = 0; d < each; ++d) run(part, item / slices, slice * each + d, to, d == 0);
      }
    });
  }
  int64_t element_bytes() const { return m.bf16 ? 2 : 4; }
};

BackwardCall backward_call(const Tensor& dout, const Tensor& xz, const std::vector<Tensor>& weights,
                           int64_t count, double scale, const Maybe& gates) {
  STD_TORCH_CHECK(xz.dim() == 3 && xz.size(2) > 1 && dout.dim() == 3,
                  "vimamba_cpu: xz is not (B, L, 2 D) or dout not (B, L, D)");
  BackwardCall call = {channels_last(xz), channels_last(dout), weights_of(weights, count),
                       as_contiguous(gates)};
  check_rows("dout", call.dout, {xz.size(0), xz.size(1), xz.size(2) / 2}, call.xz);
  call.m = mixer_of(call.xz, call.weights, count, scale, call.gates, call.dout);
  STD_TORCH_CHECK(call.m.width <= kMaxWidth, "vimamba_cpu: a convolution takes a width of 1 to ", kMaxWidth);
  call.count = count, call.slices = by_images(call.m.batch) ? 1 : count;
  call.parts = std::max<int64_t>(1, std::min(threads(), call.m.batch * call.slices));
  return call;
}

// The gradient of xz in S parts, (S, B, L, 2 D), to be summed, and those of all weights.
std::tuple<Tensor, std::vector<Tensor>> mixer_backward(const Tensor given_dout, const Tensor given_xz,
                                                       std::vector<Tensor> given_weights,
                                                       std::vector<int64_t> reverse,
                                                       const Tensor given_states, double scale) {
  const Kernels& k = kernels();
  const int64_t count = reverse.size();
  const BackwardCall call = backward_call(given_dout, given_xz, given_weights, count, scale, {});
  const Mixer& m = call.m;
  const Tensor states = as_contiguous(given_states);
  check_floats("states", states, {count, m.batch, chunks_of(m.length), m.dim, m.state});

  const Tensor dxz = torch::stable::new_empty(call.xz, Sizes{call.slices, m.batch, m.length, 2 * m.dim});
  const std::vector<Direction> directions = directions_of(call.weights, reverse, m, states);
  std::vector<Tensor> gradients;
  for (const Tensor& weight : call.weights) gradients.push_back(torch::stable::empty_like(weight));
  const int64_t packed_floats = k.mixer_backward_packed(m), sum_floats = k.mixer_backward_sums(m);
  float* packed = scratch<1>(count * (packed_floats + call.parts * sum_floats));
  float* sums = packed + count * packed_floats;
  std::memset(sums, 0, call.parts * count * sum_floats * sizeof(float));
  for_each_task(count, [&](int64_t d) {
    k.mixer_backward_pack(m, directions[d], packed + d * packed_floats);
  });

  call.for_each_direction(dxz, [&](int64_t part, int64_t b, int64_t d, char* dx, bool first) {
    const MixerGradients grad = {call.dout_rows(),
                                 {dx, dxz.stride(1), dxz.stride(2)},
                                 {dx + m.dim * call.element_bytes(), dxz.stride(1), dxz.stride(2)}};
    k.mixer_backward(m, directions[d], grad, packed + d * packed_floats, b, first,
                     sums + (part * count + d) * sum_floats, scratch<0>(k.mixer_backward_scratch(m)));
  });
  for (int64_t part = 1; part < call.parts; ++part)
    for (int64_t i = 0; i < count * sum_floats; ++i) sums[i] += sums[part * count * sum_floats + i];
  for_each_task(count, [&](int64_t d) {
    const Tensor* g = &gradients[kWeights * d];
    k.mixer_backward_unpack(m, packed + d * packed_floats, sums + d * sum_floats,
                            {data(g[0]), data(g[1]), data(g[2]), data(g[3]), data(g[4]), data(g[5]), data(g[6])});
  });
  return {dxz, gradients};
}

// The gradient of x in S parts, (S, B, L, D), to be summed, with what chooses held constant.
Tensor mixer_frozen_backward(const Tensor given_dout, const Tensor given_xz,
                             std::vector<Tensor> given_weights, std::vector<int64_t> reverse, double scale,
                             const Maybe given_gates) {
  const Kernels& k = kernels();
  const int64_t count = reverse.size();
  const BackwardCall call = backward_call(given_dout, given_xz, given_weights, count, scale, given_gates);
  const Mixer& m = call.m;
  const Tensor dx = torch::stable::new_empty(call.xz, Sizes{call.slices, m.batch, m.length, m.dim});
  const std::vector<Direction> directions = directions_of(call.weights, reverse, m, {});
  const int64_t packed_floats = k.mixer_packed(m);
  float* packed = scratch<1>(count * packed_floats);
  for_each_task(count, [&](int64_t d) { k.mixer_pack(m, directions[d], packed + d * packed_floats); });
  call.for_each_direction(dx, [&](int64_t, int64_t b, int64_t d, char* to, bool first) {
    const MixerGradients grad = {call.dout_rows(), {to, dx.stride(1), dx.stride(2)}};
    k.mixer_frozen_backward(m, directions[d], grad, packed + d * packed_floats, b, first,
                            scratch<0>(k.mixer_backward_scratch(m)));
  });
  return dx;
}

}  // namespace vimamba
