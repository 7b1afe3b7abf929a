// How one call of the fused mixer divides over threads: by batch elements, by opposite halves of the
// sequence, or by stretches of time and then blocks of channels.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "instruction_set.h"
#include "parallel.h"
#include "tensors.h"

namespace vimamba {

// As in vimamba/ops/direction.py: tensors a direction, and the bits of which way round it runs.
constexpr int64_t kWeights = 7;
constexpr int64_t kConvReverse = 1, kScanReverse = 2;

// One call of the fused mixer: the directions, their packed weights, and their states between phases.
struct MixerCall {
  const Kernels& k;
  Mixer mixer;
  std::vector<Direction> directions;
  int64_t blocks, packed_floats, state_floats;
  float *packed, *state;

  float* packed_of(int64_t direction) const { return packed + direction * packed_floats; }
  float* state_of(int64_t b, int64_t direction) const {
    return state + (b * static_cast<int64_t>(directions.size()) + direction) * state_floats;
  }
  bool skips(int64_t b, int64_t d) const {
    return mixer.gates && mixer.gate_time_stride == 0 && mixer.gates[b * mixer.gate_batch_stride + d] == 0;
  }
  // Whether there are directions [begin, end) and an image skips all of them.
  bool skips_all(int64_t b, int64_t begin, int64_t end) const {
    for (int64_t d = begin; d < end; ++d)
      if (!skips(b, d)) return false;
    return begin < end;
  }
  bool skips_any() const {
    for (int64_t b = 0; b < mixer.batch; ++b)
      for (size_t d = 0; d < directions.size(); ++d)
        if (skips(b, d)) return true;
    return false;
  }
  // `first` and `last` say how the directions follow each other if none is skipped.
  void scan(int64_t b, int64_t d, int64_t step_begin, int64_t step_end, int64_t begin, int64_t end,
            const float* projected, bool first, bool last) const {
    if (skips(b, d)) return;
    first = first || skips_all(b, 0, d);
    last = last || skips_all(b, d + 1, directions.size());
    k.mixer_scan(mixer, directions[d], packed_of(d), b, step_begin, step_end, begin, end, projected,
                 state_of(b, d), first, last, scratch<0>(k.mixer_scratch(mixer)));
  }
};

// A batch element a task, its directions one after the other.
void mix_by_batch(const MixerCall& call) {
  const int64_t count = call.directions.size();
  for_each_task(call.mixer.batch, [&](int64_t b) {
    for (int64_t d = 0; d < count; ++d)
      call.scan(b, d, 0, call.mixer.length, 0, call.blocks, nullptr, d == 0, d + 1 == count);
  });
}

// Two opposite directions at once, each over its own first half of the sequence; then each over the half the
// other has been through.
void mix_by_halves(const MixerCall& call) {
  const int64_t length = call.mixer.length, forward = length / 2;
  for (const bool second : {false, true})
    for_each_task(call.mixer.batch * 2, [&](int64_t task) {
      const int64_t d = task % 2;
      const int64_t meet = call.directions[d].scan_reverse ? length - forward : forward;
      call.scan(task / 2, d, second ? meet : 0, second ? length : meet, 0, call.blocks, nullptr, !second,
                second);
    });
}

// More threads than that: project all steps in parallel over time, then scan in parallel over channel blocks.
void mix_by_channels(const MixerCall& call, float* projected) {
  const int64_t count = call.directions.size(), batch = call.mixer.batch, length = call.mixer.length;
  const int64_t columns = call.k.mixer_columns(call.mixer), parts = threads();
  for_each_task(parts, [&](int64_t part) {
    float* memory = scratch<0>(call.k.mixer_scratch(call.mixer));
    for_each_stretch(batch * count, length, part, parts, [&](int64_t at, int64_t begin, int64_t end) {
      const int64_t d = at % count;
      if (call.skips(at / count, d)) return;
      call.k.mixer_project(call.mixer, call.directions[d], call.packed_of(d), at / count, begin, end,
                           projected + at * length * columns, memory);
    });
  });
  const int64_t pieces = parts_of_each(batch, call.blocks);
  for_each_task(batch * pieces, [&](int64_t task) {
    const int64_t b = task / pieces, piece = task % pieces;
    for (int64_t d = 0; d < count; ++d)
      call.scan(b, d, 0, length, piece * call.blocks / pieces, (piece + 1) * call.blocks / pieces,
                projected + (b * count + d) * length * columns, d == 0, d + 1 == count);
  });
}

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

// states: (B, K, D, N) to write or to read, or none.
Direction direction_of(int64_t index, const Tensor* w, int64_t reverse, float* states) {
  return {index,      data(w[0]), data(w[1]), data(w[2]), data(w[3]), data(w[4]), data(w[5]),
          data(w[6]), (reverse & kConvReverse) != 0, (reverse & kScanReverse) != 0, states};
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

void clear_images_without_a_direction(const MixerCall& call) {
  const Mixer& m = call.mixer;
  const int64_t image = m.out.batch_stride * (m.bf16 ? 2 : 4);  // bytes; out is contiguous
  for (int64_t b = 0; b < m.batch; ++b)
    if (call.skips_all(b, 0, call.directions.size()))
      std::memset(static_cast<char*>(m.out.data) + b * image, 0, image);
}

// Packs the weights and runs all directions, divided in the way that keeps every thread at work.
void mix(MixerCall& call) {
  const Mixer& m = call.mixer;
  const int64_t count = call.directions.size();
  call.blocks = blocks_of(m.dim, 1, call.k.lanes);
  call.packed_floats = call.k.mixer_packed(m), call.state_floats = call.blocks * m.state * call.k.lanes;
  const bool opposite = count == 2 && call.directions[0].scan_reverse != call.directions[1].scan_reverse;
  const bool by_batch = m.batch % threads() == 0 || m.batch >= 4 * threads();
  const bool even = 2 * m.batch % threads() == 0 && !call.skips_any();
  const bool by_halves = !by_batch && opposite && even && m.length > 1;
  const int64_t projected = by_batch || by_halves ? 0 : m.batch * count * m.length * call.k.mixer_columns(m);
  const int64_t packed = count * call.packed_floats, state = m.batch * count * call.state_floats;
  call.packed = scratch<1>(packed + state + projected);
  call.state = call.packed + packed;
  std::memset(call.state, 0, state * sizeof(float));
  clear_images_without_a_direction(call);
  for (int64_t d = 0; d < count; ++d) call.k.mixer_pack(m, call.directions[d], call.packed_of(d));
  if (by_batch)
    mix_by_batch(call);
  else if (by_halves)
    mix_by_halves(call);
  else
    mix_by_channels(call, call.state + state);
}

// The mixed tokens (B, L, D), and the states (directions, B, K, D, N), or (directions, 0). weights: kWeights
// tensors for each of `reverse`; gates: (B, L or 1, directions) or none.
std::tuple<Tensor, Tensor> mixer_forward(const Tensor given_xz, std::vector<Tensor> weights,
                                         std::vector<int64_t> reverse, double scale, const Maybe given_gates,
                                         bool save_states) {
  const int64_t count = reverse.size();
  STD_TORCH_CHECK(count > 0 && static_cast<int64_t>(weights.size()) == kWeights * count,
                  "vimamba_cpu: the mixer needs ", kWeights, " weights for each of one direction or more");
  STD_TORCH_CHECK(given_xz.dim() == 3 && given_xz.size(2) > 1 && weights[5].dim() == 2,
                  "vimamba_cpu: xz is not (B, L, 2 D) or A_log not (D, N)");
  for (Tensor& weight : weights) weight = as_contiguous(weight);
  const Tensor xz = given_xz.stride(2) == 1 ? given_xz : as_contiguous(given_xz);
  const Maybe gates = as_contiguous(given_gates);
  const int64_t batch = xz.size(0), length = xz.size(1), dim = xz.size(2) / 2, state = weights[5].size(1);
  const Tensor out = torch::stable::new_empty(xz, Sizes{batch, length, dim});
  const Tensor states = save_states ? new_floats(xz, {count, batch, chunks_of(length), dim, state})
                                    : new_floats(xz, {count, 0});
  if (out.numel() == 0) return {out, states};
  MixerCall call = {.k = kernels(), .mixer = mixer_of(xz, weights, count, scale, gates, out)};
  for (int64_t d = 0; d < count; ++d) {
    const Tensor* w = &weights[kWeights * d];
    check_direction(w, call.mixer);
    call.directions.push_back(
        direction_of(d, w, reverse[d], save_states ? data(states) + d * states.stride(0) : nullptr));
  }
  mix(call);
  return {out, states};
}

}  // namespace vimamba
