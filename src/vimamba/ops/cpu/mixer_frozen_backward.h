// The gradient of x in the fused mixer with what chooses held constant: delta, B, C, z and the sigmoids of
// the SiLUs. The mixer is linear then, and this is its transpose.
//
// Layout and tasks as in mixer_backward.h, but no states are needed: for each step, walked back, the
// channel's g = exp(delta A) (g + C dy) of the step behind is all that it has to know. Operations for each
// (step, channel): those of the forward, and the convolution once more.
#pragma once

#include "mixer_backward.h"

namespace {

// States [first, first + count) of one block and chunk: ddelta_u gains sum_n B_t[n] (g[n] + C_t[n] dy_t).
template <int count, class Power>
inline void retreat_frozen(const Power power, const RetreatScratch& s, int steps, int64_t first,
                           const float* decay, float* carry, Coefficients<false> B, Coefficients<false> C) {
  vf g[count];
#pragma GCC unroll 16
  for (int n = 0; n < count; ++n) g[n] = load(carry + (first + n) * W);
  for (int t = steps - 1; t >= 0; --t) {
    const vf delta = load(s.delta + t * W), dy = load(s.dy + t * W);
    vf even = first ? load(s.ddelta_u + t * W) : vf{}, odd = {};
#pragma GCC unroll 16
    for (int n = 0; n < count; ++n) {
      const vf dh = g[n] + dy * C(t, first + n);
      (n & 1 ? odd : even) += dh * B(t, first + n);
      g[n] = dh * power(delta, load(decay + (first + n) * W));
    }
    store(s.ddelta_u + t * W, even + odd);
  }
#pragma GCC unroll 16
  for (int n = 0; n < count; ++n) store(carry + (first + n) * W, g[n]);
}

template <class Power>
inline void retreat_frozen_states(const Power power, const RetreatScratch& s, int steps, int64_t N,
                                  const float* decay, float* carry, Coefficients<false> B,
                                  Coefficients<false> C) {
  int64_t n = 0;
  for (; n + kStates <= N; n += kStates) retreat_frozen<kStates>(power, s, steps, n, decay, carry, B, C);
  if constexpr (kStates > 4)
    for (; n + 4 <= N; n += 4) retreat_frozen<4>(power, s, steps, n, decay, carry, B, C);
  for (; n < N; ++n) retreat_frozen<1>(power, s, steps, n, decay, carry, B, C);
}

// One block's way back through gate, scan and SiLU, to the sums of its convolution.
template <class T>
void retreat_frozen_block(const Mixer& m, const Direction& direction, const PackedDirection& packed,
                          const MixerGradients& grad, const MixerChunk& at, int64_t i,
                          const MixerBackwardScratch& s) {
  const int64_t N = m.state, columns = mixer_columns(m), row_floats = MixerScratch::row_floats(m);
  const Block block = block_at(i, m.dim, 1);
  for_each_delta(m, packed, i, s.projected, columns, at.steps, [&](int t, vf raw) {
    store(s.delta + t * W, at_most(softplus<accuracy_of<T>>(raw), kFinite));
  });
  const Steps<const T> z = steps_from<const T>(at.step, m.z, m, direction, at.b, block);
  const Steps<const T> dout = steps_from<const T>(at.step, grad.dout, m, direction, at.b, block);
  with_lanes(block, [&](auto lanes) {
    for (int t = 0; t < at.steps; ++t) {
      vf dy = m.scale * load(dout[t], lanes);
      if (m.gates)
        dy *= gate_of(m, direction, at.b, position_of(at.step + t, m.length, direction.scan_reverse));
      store(s.dy + t * W, dy * silu<accuracy_of<T>>(load(z[t], lanes)));
    }
  });
  const float* decay = packed.decay + i * N * W;
  const Coefficients<false> B = {s.projected + m.dt_rank, columns}, C = {B.tile + N, columns};
  with_power<accuracy_of<T>>(at.steps, s.delta, N, decay, [&](auto power) {
    retreat_frozen_states(power, s, at.steps, N, decay, s.carry + i * N * W, B, C);
  });
  const vf skip = load(packed.skip + i * W);
  float* dsum = s.dsum + (m.width - 1) * W;
  for (int t = 0; t < at.steps; ++t) {
    const vf dc = load(s.ddelta_u + t * W) * load(s.delta + t * W) + load(s.dy + t * W) * skip;
    store(dsum + t * W, dc * load(s.slope + t * row_floats + i * W));
  }
}

template <class T>
void mixer_frozen_backward_typed(const Mixer& m, const Direction& direction, const MixerGradients& grad,
                                 const PackedDirection& packed, int64_t b, bool first,
                                 const MixerBackwardScratch& s) {
  walk_back<T, true>(m, direction, packed, b, first, s, [&](const MixerChunk& at) {
    memset(s.dsum, 0, (at.steps + 2 * (m.width - 1)) * W * sizeof(float));
    for (int64_t i = 0; i < blocks_of(m.dim, 1, W); ++i) {
      retreat_frozen_block<T>(m, direction, packed, grad, at, i, s);
      retreat_tokens<T>(m, direction, packed, grad, at, i, s);
    }
  });
}

// dx of one direction of one image, stored if it is the `first`, else added. `memory` is that of mixer_pack,
// `scratch` as large as for mixer_backward.
void mixer_frozen_backward(const Mixer& m, const Direction& direction, const MixerGradients& grad,
                           float* memory, int64_t b, bool first, float* scratch) {
  const PackedDirection packed(m, memory);
  const MixerBackwardScratch s(m, scratch);
  with_type(m, [&](auto type) {
    mixer_frozen_backward_typed<decltype(type)>(m, direction, grad, packed, b, first, s);
  });
}

}  // namespace
