// The fused mixer, backward, from the states that its forward saved every kChunk steps.
//
// Layout as in mixer.h. One task is one direction of one image: its chunks are walked from the last to the
// first, and each goes through every stage while it is in the second-level cache: convolution, x_proj and
// dt_proj again, the recurrence back and forth (scan_backward.h), then the gradients of dt_proj, x_proj and
// convolution. x, z and dout are read once a direction, dx and dz written once, and nothing else of the
// sequence touches memory. Gradients of the weights gather over all chunks and images of a thread. Operations
// for each (step, channel): about 30 N of the recurrence, 4 (R + 2 N) + 4 R + 2 (R + 2 N) of the products,
// 120.
#pragma once

#include "gather.h"
#include "mixer.h"
#include "scan_backward.h"

namespace {

// The weights as the forward has them, and the transposes of x_proj and dt_proj in panels.
struct PackedBackward : PackedDirection {
  float *x_proj_turned, *dt_proj_turned;

  static int64_t floats(const Mixer& m) {
    return PackedDirection::floats(m) + linear_packed(linear_panels(m.dim), mixer_projected(m)) +
           linear_packed(linear_panels(m.dt_rank), m.dim);
  }
  PackedBackward(const Mixer& m, float* at) : PackedDirection(m, at) {
    x_proj_turned = at + PackedDirection::floats(m);
    dt_proj_turned = x_proj_turned + linear_packed(linear_panels(m.dim), mixer_projected(m));
  }
};

int64_t mixer_backward_packed(const Mixer& m) { return PackedBackward::floats(m); }

void mixer_backward_pack(const Mixer& m, const Direction& direction, float* memory) {
  mixer_pack(m, direction, memory);
  const PackedBackward packed(m, memory);
  const auto pack = linear_pack_transposed;
  pack(direction.x_proj, m.dim, mixer_projected(m), 0, linear_panels(m.dim), packed.x_proj_turned);
  pack(direction.dt_proj, m.dt_rank, m.dim, 0, linear_panels(m.dt_rank), packed.dt_proj_turned);
}

// Gradients of one direction's weights while they gather: vectors of channels, (blocks, n, W) each.
struct MixerSums {
  float *taps, *conv_bias, *x_proj, *dt_proj, *dt_bias, *decay, *skip;

  static int64_t floats(const Mixer& m) {
    return MixerScratch::padded(m) * (m.width + mixer_projected(m) + m.dt_rank + m.state + 3);
  }
  MixerSums(const Mixer& m, float* at) {
    const int64_t floats = MixerScratch::padded(m);
    auto take = [&at](int64_t floats, auto&... each) { ((each = at, at += floats), ...); };
    take(floats, conv_bias, dt_bias, skip);
    take(floats * m.width, taps);
    take(floats * mixer_projected(m), x_proj);
    take(floats * m.dt_rank, dt_proj);
    take(floats * m.state, decay);
  }
};

int64_t mixer_backward_sums(const Mixer& m) { return MixerSums::floats(m); }

struct MixerBackwardScratch : RetreatScratch {
  float *carry, *dx_carry;       // (blocks, N, W), (blocks, width - 1, W): to the chunk walked next
  float *state, *dB, *dC;        // (N, W), (T, N, W) x 2
  float *delta_slope, *dz_of_y;  // (T, W)
  // (T, D in rows): dc is room for x_proj's c before it is dc, ddelta_raw for what comes back through x_proj
  // when dt_proj has had it.
  float *c, *slope, *dc, *ddelta_raw;
  float *projected, *dprojected;  // (T, columns)
  float* dsum;                    // (T + 2 (width - 1), W), zeros around

  static int64_t floats(const Mixer& m) {
    const int64_t T = kChunk;
    return RetreatScratch::floats() + MixerScratch::padded(m) * (m.state + m.width - 1) +
           MixerScratch::row_floats(m) * 4 * T +
           W * (m.state + 2 * T * m.state + 2 * T + T + 2 * (m.width - 1)) + 2 * T * mixer_columns(m);
  }
  MixerBackwardScratch(const Mixer& m, float* at) : RetreatScratch(at) {
    const int64_t T = kChunk, padded = MixerScratch::padded(m);
    auto take = [&at](int64_t floats, auto&... each) { ((each = at, at += floats), ...); };
    take(padded * m.state, carry);
    take(padded * (m.width - 1), dx_carry);
    take(m.state * W, state);
    take(T * m.state * W, dB, dC);
    take(T * W, delta_slope, dz_of_y);
    take(T * MixerScratch::row_floats(m), c, slope, dc, ddelta_raw);
    take(T * mixer_columns(m), projected, dprojected);
    take((T + 2 * (m.width - 1)) * W, dsum);
  }
};

int64_t mixer_backward_scratch(const Mixer& m) { return MixerBackwardScratch::floats(m); }

struct MixerChunk {
  int64_t b, step;
  int steps;
  bool first;  // whether this direction is the first to write dx and dz
};

// c = SiLU(conv(x)) and its slope; with the sigmoid in it held constant, that is the sigmoid.
template <class T, bool frozen>
void convolve_chunk(const Mixer& m, const Direction& direction, const PackedDirection& packed,
                    const MixerChunk& at, const MixerBackwardScratch& s) {
  const int64_t row_floats = MixerScratch::row_floats(m);
  for_each_sum<T>(m, direction, packed, at.b, at.step, at.steps, 0, blocks_of(m.dim, 1, W),
                  [&](int t, int64_t i, vf sum) {
                    const vf s_of_sum = sigmoid<accuracy_of<T>>(sum), c = sum * s_of_sum;
                    const vf slope = frozen ? s_of_sum : s_of_sum + c * (1.0f - s_of_sum);
                    store(s.c + t * row_floats + i * W, c);
                    store(s.slope + t * row_floats + i * W, slope);
                  });
}

// One block's way back through gate and scan: dz, dc without what comes through x_proj, ddelta before
// softplus.
template <class T>
void retreat_block(const Mixer& m, const Direction& direction, const PackedBackward& packed,
                   const MixerGradients& grad, const MixerChunk& at, int64_t i, const MixerSums& sums,
                   const MixerBackwardScratch& s) {
  const int64_t N = m.state, columns = mixer_columns(m), row_floats = MixerScratch::row_floats(m);
  const Block block = block_at(i, m.dim, 1);
  const int64_t chunk = at.b * chunks_of(m.length) + at.step / kChunk;
  pack_rows(direction.states + (chunk * m.dim + block.channel) * N, N, block.lanes, 1, s.state);
  const float* c = s.c + i * W;
  for_each_delta(m, packed, i, s.projected, columns, at.steps, [&](int t, vf raw) {
    vf slope;
    const vf delta = softplus<accuracy_of<T>>(raw, slope);
    store(s.delta_slope + t * W, slope);
    store(s.delta_u + t * W, delta * load(c + t * row_floats));
    store(s.delta + t * W, at_most(delta, kFinite));
  });
  const Steps<const T> z_at = steps_from<const T>(at.step, m.z, m, direction, at.b, block);
  const Steps<const T> dout_at = steps_from<const T>(at.step, grad.dout, m, direction, at.b, block);
  const Steps<T> dz_at = steps_from<T>(at.step, grad.dz, m, direction, at.b, block);
  with_lanes(block, [&](auto lanes) {
    for (int t = 0; t < at.steps; ++t) {
      const vf z = load(z_at[t], lanes), dout = m.scale * load(dout_at[t], lanes);
      __builtin_prefetch(z_at[t] + W, 0, 2), __builtin_prefetch(dout_at[t] + W, 0, 2);  // of the next block
      const vf gate = sigmoid<accuracy_of<T>>(z), silu = z * gate;
      store(s.dy + t * W, dout * silu);
      store(s.dz_of_y + t * W, dout * (gate + silu * (1.0f - gate)));
    }
  });
  retreat_all<accuracy_of<T>, false, false>(
      s, at.steps, N, packed.decay + i * N * W, s.state, s.carry + i * N * W, sums.decay + i * N * W,
      {s.projected + m.dt_rank, columns}, {s.projected + m.dt_rank + N, columns}, s.dB, s.dC);
  const vf skip = load(packed.skip + i * W);
  float *dc = s.dc + i * W, *ddelta_raw = s.ddelta_raw + i * W;
  vf dskip = {}, dbias = {};
  with_lanes(block, [&](auto lanes) {
    for (int t = 0; t < at.steps; ++t) {
      const vf u = load(c + t * row_floats), dy = load(s.dy + t * W), ddelta_u = load(s.ddelta_u + t * W);
      const vf ddelta = (load(s.ddelta + t * W) * kLn2 + ddelta_u * u) * load(s.delta_slope + t * W);
      vf dz = load(s.dz_of_y + t * W) * (load(s.y + t * W) + u * skip);
      if (!at.first) dz += load((const T*)dz_at[t], lanes);
      store(dz_at[t], dz, lanes);
      __builtin_prefetch(dz_at[t] + W, 1, 2);
      store(dc + t * row_floats, ddelta_u * load(s.delta + t * W) + dy * skip);
      store(ddelta_raw + t * row_floats, ddelta);
      dskip += dy * u, dbias += ddelta;
    }
  });
  store(sums.skip + i * W, load(sums.skip + i * W) + dskip);
  store(sums.dt_bias + i * W, load(sums.dt_bias + i * W) + dbias);
}

// The gradient of the projection, dt's by a product over the channels, B's and C's summed over their lanes;
// what of it comes back through x_proj, in ddelta_raw's place; and the gradients of both weights.
inline void retreat_projection(const Mixer& m, const PackedBackward& packed, const MixerChunk& at,
                               const MixerSums& sums, const MixerBackwardScratch& s) {
  const int64_t N = m.state, columns = mixer_columns(m), row_floats = MixerScratch::row_floats(m);
  Product product = {.element = Element::float32, .out_bf16 = false};
  product.x = s.ddelta_raw, product.x_stride = row_floats, product.K = m.dim;
  product.out = s.dprojected, product.out_stride = columns, product.N = m.dt_rank;
  product.packed = packed.dt_proj_turned;
  linear_multiply(product, 0, at.steps, 0, linear_panels(m.dt_rank));
  for (int t = 0; t < at.steps; ++t) {
    float* dprojected = s.dprojected + t * columns + m.dt_rank;
    sum_lanes(s.dB + t * N * W, N, dprojected);
    sum_lanes(s.dC + t * N * W, N, dprojected + N);
  }
  gather(m, at.steps, s.ddelta_raw, s.projected, m.dt_rank, sums.dt_proj);
  gather(m, at.steps, s.c, s.dprojected, mixer_projected(m), sums.x_proj);
  product.x = s.dprojected, product.x_stride = columns, product.K = mixer_projected(m);
  product.out = s.ddelta_raw, product.out_stride = row_floats, product.N = m.dim;
  product.packed = packed.x_proj_turned;
  linear_multiply(product, 0, at.steps, 0, linear_panels(m.dim));
}

// dsum = (dc + what comes through x_proj) slope for one block.
inline void retreat_input(const Mixer& m, const MixerChunk& at, int64_t i, const MixerBackwardScratch& s) {
  const int64_t row_floats = MixerScratch::row_floats(m);
  const float *dc = s.dc + i * W, *through_x_proj = s.ddelta_raw + i * W, *slope = s.slope + i * W;
  float* dsum = s.dsum + (m.width - 1) * W;
  for (int64_t t = 0; t < at.steps; ++t) {
    const int64_t o = t * row_floats;
    store(dsum + t * W, (load(dc + o) + load(through_x_proj + o)) * load(slope + o));
  }
}

// Gradients of the taps: sums over the chunk of dsum and the tokens `reach` before it (behind it in reverse).
template <class T>
inline void retreat_taps(const Mixer& m, const Direction& direction, const MixerChunk& at, int64_t i,
                         const MixerSums& sums, const MixerBackwardScratch& s) {
  const Block block = block_at(i, m.dim, 1);
  const int64_t stride = direction.conv_reverse ? m.x.time_stride : -m.x.time_stride;
  const Steps<const T> x = steps_from<const T>(at.step, m.x, m, direction, at.b, block);
  const float* dsum = s.dsum + (m.width - 1) * W;
  vf taps[kMaxWidth] = {}, bias = {};
  with_lanes(block, [&](auto lanes) {
    if (m.width == 4 && reach_inside(m, direction, at.step, at.steps)) {
      vf first[4] = {};
      for (int t = 0; t < at.steps; ++t) {
        const vf d = load(dsum + t * W);
        bias += d;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) first[j] += d * load(x[t] + j * stride, lanes);
      }
      for (int j = 0; j < 4; ++j) taps[j] = first[j];
    } else {
      for (int t = 0; t < at.steps; ++t) {
        const int64_t reach = reach_of(m, direction, at.step + t);
        const vf d = load(dsum + t * W);
        bias += d;
        for (int64_t j = 0; j < m.width && j <= reach; ++j) taps[j] += d * load(x[t] + j * stride, lanes);
      }
    }
  });
  for (int64_t j = 0; j < m.width; ++j) {
    float* to = sums.taps + (i * m.width + j) * W;
    store(to, load(to) + taps[j]);
  }
  store(sums.conv_bias + i * W, load(sums.conv_bias + i * W) + bias);
}

// dx of one block: what the chunk's sums give to its own tokens, and to width - 1 neighbours that lie in the
// chunk walked next (they wait in dx_carry) or, where convolution and scan run opposite ways, in the last
// one.
template <class T>
inline void retreat_tokens(const Mixer& m, const Direction& direction, const PackedDirection& packed,
                           const MixerGradients& grad, const MixerChunk& at, int64_t i,
                           const MixerBackwardScratch& s) {
  const Block block = block_at(i, m.dim, 1);
  const int64_t reach = m.width - 1, last = at.step + at.steps - 1;
  const bool along = direction.conv_reverse == direction.scan_reverse;
  // In steps: a sum took in tokens of `reach` earlier steps, or of later ones.
  const int64_t sign = along ? 1 : -1;
  const float *taps = packed.taps + i * m.width * W, *dsum = s.dsum + reach * W;
  float* carry = s.dx_carry + i * reach * W;
  vf tap[kMaxWidth] = {};
  for (int64_t j = 0; j < m.width; ++j) tap[j] = load(taps + j * W);
  auto gradient = [&](int64_t t) {
    const float* from = dsum + t * W;
    if (m.width == 4)
      return convolve(FourTaps{{}, {tap[0], tap[1], tap[2], tap[3]}}, from, sign * W, AllLanes());
    vf dx = {};
    for (int64_t j = 0; j < m.width; ++j) dx += tap[j] * load(from + sign * j * W);
    return dx;
  };
  const Steps<T> dx_at = steps_from<T>(at.step, grad.dx, m, direction, at.b, block);
  with_lanes(block, [&](auto lanes) {
    for (int64_t t = 0; t < at.steps; ++t) {
      vf dx = gradient(t);
      const int64_t waits = t - (at.steps - reach);  // from the chunk of later steps
      if (along && waits >= 0) dx += load(carry + waits * W);
      if (!at.first) dx += load((const T*)dx_at[t], lanes);
      store(dx_at[t], dx, lanes);
      __builtin_prefetch(dx_at[t] + W, 1, 2);
    }
    for (int64_t k = 0; k < reach; ++k) {
      if (along) {
        store(carry + k * W, gradient(k - reach));
      } else if (last + 1 + k < m.length) {
        T* to = dx_at[at.steps + k];
        store(to, load((const T*)to, lanes) + gradient(at.steps + k), lanes);
      }
    }
  });
}

// Calls retreat(chunk) for every chunk, the last first, with c, its slope and the projections there anew.
template <class T, bool frozen, class F>
void walk_back(const Mixer& m, const Direction& direction, const PackedDirection& packed, int64_t b,
               bool first, const MixerBackwardScratch& s, const F& retreat) {
  const int64_t row_floats = MixerScratch::row_floats(m);
  memset(s.carry, 0, row_floats * m.state * sizeof(float));
  memset(s.dx_carry, 0, row_floats * (m.width - 1) * sizeof(float));
  for (int64_t chunk = chunks_of(m.length) - 1; chunk >= 0; --chunk) {
    const int64_t step = chunk * kChunk;
    const MixerChunk at = {b, step, (int)(m.length - step < kChunk ? m.length - step : kChunk), first};
    convolve_chunk<T, frozen>(m, direction, packed, at, s);
    project_tile(m, packed, s.c, at.steps, s.dc, s.projected);
    retreat(at);
  }
}

template <class T>
void mixer_backward_typed(const Mixer& m, const Direction& direction, const MixerGradients& grad,
                          const PackedBackward& packed, int64_t b, bool first, const MixerSums& sums,
                          const MixerBackwardScratch& s) {
  const int64_t N = m.state;
  walk_back<T, false>(m, direction, packed, b, first, s, [&](const MixerChunk& at) {
    memset(s.dB, 0, at.steps * N * W * sizeof(float));
    memset(s.dC, 0, at.steps * N * W * sizeof(float));
    for (int64_t i = 0; i < blocks_of(m.dim, 1, W); ++i)
      retreat_block<T>(m, direction, packed, grad, at, i, sums, s);
    retreat_projection(m, packed, at, sums, s);
    memset(s.dsum, 0, (at.steps + 2 * (m.width - 1)) * W * sizeof(float));
    for (int64_t i = 0; i < blocks_of(m.dim, 1, W); ++i) {
      retreat_input(m, at, i, s);
      retreat_taps<T>(m, direction, at, i, sums, s);
      retreat_tokens<T>(m, direction, packed, grad, at, i, s);
    }
  });
}

// dx and dz of one direction of one image, stored if it is the `first`, else added; its weights' gradients
// are added to `sums`.
void mixer_backward(const Mixer& m, const Direction& direction, const MixerGradients& grad, float* memory,
                    int64_t b, bool first, float* sums, float* scratch) {
  const PackedBackward packed(m, memory);
  const MixerSums gathered(m, sums);
  const MixerBackwardScratch s(m, scratch);
  with_type(m, [&](auto type) {
    mixer_backward_typed<decltype(type)>(m, direction, grad, packed, b, first, gathered, s);
  });
}

// What has gathered, as the weights lie.
void mixer_backward_unpack(const Mixer& m, float* packed_memory, float* sums, const DirectionGradients& out) {
  const PackedDirection packed(m, packed_memory);
  const MixerSums s(m, sums);
  const int64_t N = m.state, R = m.dt_rank, E = mixer_projected(m);
  for (int64_t i = 0; i < blocks_of(m.dim, 1, W); ++i) {
    const Block block = block_at(i, m.dim, 1);
    const int64_t d = block.channel;
    float* taps = s.taps + i * m.width * W;
    for (int lane = 0; lane < block.lanes; ++lane)
      for (int64_t j = 0; j < m.width; ++j)
        out.conv_weight[(d + lane) * m.width + m.width - 1 - j] = taps[j * W + lane];
    for (int64_t n = 0; n < N; ++n) {
      float* to = s.decay + (i * N + n) * W;  // dA becomes dA_log: A is -exp(A_log)
      store(to, load(to) * load(packed.decay + (i * N + n) * W) * kLn2);
    }
    unpack_rows(s.decay + i * N * W, N, block.lanes, out.A_log + d * N);
    unpack_rows(s.dt_proj + i * R * W, R, block.lanes, out.dt_proj + d * R);
    for (int64_t e = 0; e < E; ++e)
      store(out.x_proj + e * m.dim + d, load(s.x_proj + (i * E + e) * W), block.lanes);
    store(out.conv_bias + d, load(s.conv_bias + i * W), block.lanes);
    store(out.dt_bias + d, load(s.dt_bias + i * W), block.lanes);
    store(out.D + d, load(s.skip + i * W), block.lanes);
  }
}

}  // namespace
