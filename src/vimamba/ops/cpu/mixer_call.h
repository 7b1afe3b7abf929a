// One call of the fused mixer: from tensors to plain pointers.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "mixer_run.h"
#include "tensors.h"

namespace vimamba {

void check_direction(const Tensor* w, const Mixer& m) {
  const int64_t projected = m.dt_rank + 2 * m.state;
  STD_TORCH_CHECK(w[0].dim() > 1, "vimamba_cpu: conv_weight is not (D, width)");
  check_count("conv_weight", w[0], m.dim * m.width);
  check_floats("conv_bias", w[1], {m.dim});
  check_floats("x_proj_weight", w[2], {projected, m.dim});
  check_floats("dt_proj_weight", w[3], {m.dim, m.dt_rank});
  check_floats("dt_bias", w[4], {m.dim});
  check_floats("A_log", w[5], {m.dim, m.state});
  check_floats("D", w[6], {m.dim});
}

// kWeights tensors a direction, contiguous.
std::vector<Tensor> weights_of(std::vector<Tensor> weights, int64_t directions) {
  STD_TORCH_CHECK(directions > 0 && static_cast<int64_t>(weights.size()) == kWeights * directions,
                  "vimamba_cpu: the mixer needs ", kWeights, " weights for each of one direction or more");
  for (Tensor& weight : weights) weight = as_contiguous(weight);
  return weights;
}

// (B, L, E) with contiguous channels.
Tensor channels_last(const Tensor& rows_BLE) {
  return rows_BLE.stride(2) == 1 ? rows_BLE : as_contiguous(rows_BLE);
}

// states: (directions, B, K, D, N) to write or to read, or none.
std::vector<Direction> directions_of(const std::vector<Tensor>& weights, const std::vector<int64_t>& reverse,
                                     const Mixer& m, const Maybe& states) {
  std::vector<Direction> directions;
  for (int64_t d = 0; d < static_cast<int64_t>(reverse.size()); ++d) {
    const Tensor* w = &weights[kWeights * d];
    check_direction(w, m);
    directions.push_back({d, data(w[0]), data(w[1]), data(w[2]), data(w[3]), data(w[4]), data(w[5]),
                          data(w[6]), (reverse[d] & kConvReverse) != 0, (reverse[d] & kScanReverse) != 0,
                          states ? data(*states) + d * states->stride(0) : nullptr});
  }
  return directions;
}

// Sizes and activations; xz with contiguous channels, gates (B, L or 1, directions) or none.
Mixer mixer_of(const Tensor& xz, const std::vector<Tensor>& weights, int64_t directions, double scale,
               const Maybe& gates, const Tensor& out) {
  const Tensor &dt_proj = weights[3], &A_log = weights[5];
  STD_TORCH_CHECK(dt_proj.dim() == 2 && A_log.dim() == 2 && A_log.size(1) > 0,
                  "vimamba_cpu: dt_proj_weight is not (D, R) or A_log not (D, N)");
  const int64_t batch = out.size(0), length = out.size(1), dim = out.size(2);
  check_rows("xz", xz, {batch, length, 2 * dim}, out);
  const bool by_token = gates && gates->dim() == 3 && gates->size(1) > 1;
  check_floats("gates", gates, {batch, by_token ? length : 1, directions});
  char* x = static_cast<char*>(xz.data_ptr());
  const int64_t element = is_bf16(xz) ? 2 : 4;
  return {.batch = batch,
          .dim = dim,
          .length = length,
          .state = A_log.size(1),
          .dt_rank = dt_proj.size(1),
          .width = weights[0].numel() / dim,
          .bf16 = is_bf16(xz),
          .scale = static_cast<float>(scale),
          .x = {x, xz.stride(0), xz.stride(1)},
          .z = {x + dim * element, xz.stride(0), xz.stride(1)},
          .out = {out.data_ptr(), out.stride(0), out.stride(1)},
          .gates = data(gates),
          .gate_batch_stride = gates ? gates->stride(0) : 0,
          .gate_time_stride = by_token ? gates->stride(1) : 0};
}

// The mixed tokens (B, L, D), and the states (directions, B, K, D, N), or (directions, 0). weights: kWeights
// tensors for each of `reverse`; gates: (B, L or 1, directions) or none.
std::tuple<Tensor, Tensor> mixer_forward(const Tensor given_xz, std::vector<Tensor> given_weights,
                                         std::vector<int64_t> reverse, double scale, const Maybe given_gates,
                                         bool save_states) {
  const int64_t count = reverse.size();
  const std::vector<Tensor> weights = weights_of(given_weights, count);
  STD_TORCH_CHECK(given_xz.dim() == 3 && given_xz.size(2) > 1 && weights[5].dim() == 2,
                  "vimamba_cpu: xz is not (B, L, 2 D) or A_log not (D, N)");
  const Tensor xz = channels_last(given_xz);
  const Maybe gates = as_contiguous(given_gates);
  const int64_t batch = xz.size(0), length = xz.size(1), dim = xz.size(2) / 2, state = weights[5].size(1);
  const Tensor out = torch::stable::new_empty(xz, Sizes{batch, length, dim});
  const Tensor states = save_states ? new_floats(xz, {count, batch, chunks_of(length), dim, state})
                                    : new_floats(xz, {count, 0});
  if (out.numel() == 0) return {out, states};
  MixerCall call = {.k = kernels(), .mixer = mixer_of(xz, weights, count, scale, gates, out)};
  call.directions = directions_of(weights, reverse, call.mixer, save_states ? Maybe(states) : Maybe());
  mix(call);
  return {out, states};
}

}  // namespace vimamba
