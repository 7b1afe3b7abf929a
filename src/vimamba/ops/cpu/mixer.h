// The inference path of a mixer, fused: convolution + SiLU -> x_proj -> dt_proj + softplus -> scan -> sum of
// the directions -> gate.
//
// Layout: x, z, out (B, L, D) rows, channels contiguous. One tile of kTile steps goes through every stage
// while it is in the first two levels of cache, so x is read once a direction, z once, out is written once a
// direction, and nothing else touches memory. Parallel axes: batch, direction x halves of time (mixer_scan
// alone: the tile's projection needs all channels), or, for more threads than that gives, time
// (mixer_project) and then channel blocks (mixer_scan with the projections given). Operations for each (step,
// channel): about 10 N + 2 R + 2 (R + 2 N) + 60.
#pragma once

#include "conv.h"
#include "linear.h"
#include "scan.h"

namespace {

// Numbers of a step's projection: dt, B and C; and their floats, up to whole vectors.
inline int64_t mixer_projected(const Mixer& m) { return m.dt_rank + 2 * m.state; }
int64_t mixer_columns(const Mixer& m) { return blocks_of(mixer_projected(m), 1, W) * W; }

// What x_proj multiplies: the convolution's output goes to its product as it would go to memory.
inline Element projection_element(const Mixer& m) {
  return kHasBf16 && m.bf16 ? Element::bfloat16 : Element::float32;
}

// A direction's weights, laid out for the kernels: for each block its vectors, then x_proj in panels.
struct PackedDirection {
  float *taps, *conv_bias, *dt_proj, *dt_bias, *decay, *skip, *x_proj;

  static int64_t floats(const Mixer& m) {
    const int64_t blocks = blocks_of(m.dim, 1, W);
    const int64_t vectors = m.width + m.dt_rank + m.state + 3;
    return blocks * W * vectors + linear_packed(linear_panels(mixer_columns(m)), m.dim);
  }

  PackedDirection(const Mixer& m, float* at) {
    const int64_t floats = blocks_of(m.dim, 1, W) * W;
    auto take = [&at](int64_t floats, auto&... each) { ((each = at, at += floats), ...); };
    take(floats, conv_bias, dt_bias, skip);
    take(floats * m.width, taps);
    take(floats * m.dt_rank, dt_proj);
    take(floats * m.state, decay);
    take(0, x_proj);
  }
};

int64_t mixer_packed(const Mixer& m) { return PackedDirection::floats(m); }

void mixer_pack(const Mixer& m, const Direction& direction, float* memory) {
  const PackedDirection packed(m, memory);
  for (int64_t i = 0; i < blocks_of(m.dim, 1, W); ++i) {
    const Block block = block_at(i, m.dim, 1);
    const int64_t d = block.channel;
    pack_taps(direction.conv_weight + d * m.width, m.width, block.lanes, packed.taps + i * m.width * W);
    store(packed.conv_bias + i * W, load(direction.conv_bias + d, block.lanes));
    pack_rows(direction.dt_proj + d * m.dt_rank, m.dt_rank, block.lanes, 1,
              packed.dt_proj + i * m.dt_rank * W);
    store(packed.dt_bias + i * W, load(direction.dt_bias + d, block.lanes));
    pack_decay_of_log(direction.A_log + d * m.state, m.state, block.lanes, packed.decay + i * m.state * W);
    store(packed.skip + i * W, load(direction.D + d, block.lanes));
  }
  const int64_t projected = mixer_projected(m);
  const auto pack = projection_element(m) == Element::bfloat16 ? linear_pack_bfloat16 : linear_pack;
  pack(direction.x_proj, projected, m.dim, 0, linear_panels(projected), packed.x_proj);
}

struct MixerScratch {
  float *c, *narrow, *projected, *delta, *delta_u, *y;  // (T, D in rows) x 2, (T, columns), (T, W) x 3

  static int64_t padded(const Mixer& m) { return blocks_of(m.dim, 1, W) * W; }
  // From one step's channels to the next one's: apart by an odd number of cache lines, or the steps of a
  // block would meet in few sets of the cache.
  static int64_t row_floats(const Mixer& m) { return ((padded(m) + 15) / 16 | 1) * 16; }
  static int64_t floats(const Mixer& m) { return kTile * (2 * row_floats(m) + mixer_columns(m) + 3 * W); }
  MixerScratch(const Mixer& m, float* at) {
    delta = at, delta_u = delta + kTile * W, y = delta_u + kTile * W, c = y + kTile * W,
    narrow = c + kTile * row_floats(m), projected = narrow + kTile * row_floats(m);
  }
};

int64_t mixer_scratch(const Mixer& m) { return MixerScratch::floats(m); }

// One block's channels step by step, as the recurrence goes.
template <class T>
struct Steps {
  T* first;
  int64_t stride;
  T* operator[](int64_t t) const { return first + t * stride; }
};

template <class T>
inline Steps<T> steps_from(int64_t step, const Rows& rows, const Mixer& m, const Direction& direction,
                           int64_t b, const Block& block) {
  return {row<T>(rows, b, position_of(step, m.length, direction.scan_reverse)) + block.channel,
          direction.scan_reverse ? -rows.time_stride : rows.time_stride};
}

// Taps of the convolution at a step that lie inside the sequence, beside the token itself.
inline int64_t reach_of(const Mixer& m, const Direction& direction, int64_t step) {
  return reach_at(position_of(step, m.length, direction.scan_reverse), m.length, direction.conv_reverse);
}

// Whether all taps do, at each of some steps.
inline bool reach_inside(const Mixer& m, const Direction& direction, int64_t step, int steps) {
  return reach_of(m, direction, step) >= m.width - 1 &&
         reach_of(m, direction, step + steps - 1) >= m.width - 1;
}

// Calls use(t, i, sum) with the convolution at each of some steps, for each of the blocks [begin, end).
template <class T, class F>
inline void for_each_sum(const Mixer& m, const Direction& direction, const PackedDirection& packed, int64_t b,
                         int64_t step, int steps, int64_t begin, int64_t end, const F& use) {
  const int64_t stride = direction.conv_reverse ? m.x.time_stride : -m.x.time_stride;
  const bool four = m.width == 4 && reach_inside(m, direction, step, steps);
  for (int64_t i = begin; i < end; ++i) {
    const Block block = block_at(i, m.dim, 1);
    const Taps taps{packed.taps + i * m.width * W, load(packed.conv_bias + i * W), (int)m.width};
    const Steps<const T> x = steps_from<const T>(step, m.x, m, direction, b, block);
    if (four && block.lanes == W) {
      const FourTaps in_registers = four_of(taps);
      for (int t = 0; t < steps; ++t) {
        __builtin_prefetch(x[t] + W);  // of the next block: the hardware looks ahead along rows
        use(t, i, convolve(in_registers, x[t], stride, AllLanes()));
      }
    } else {
      for (int t = 0; t < steps; ++t)
        use(t, i, convolve(taps, x[t], stride, reach_of(m, direction, step + t), block.lanes));
    }
  }
}

// c = SiLU(conv(x)) for the tile's steps and the blocks [begin, end).
template <class T>
void convolve_tile(const Mixer& m, const Direction& direction, const PackedDirection& packed, int64_t b,
                   int64_t step, int steps, int64_t begin, int64_t end, float* c) {
  const int64_t row_floats = MixerScratch::row_floats(m);
  for_each_sum<T>(m, direction, packed, b, step, steps, begin, end, [&](int t, int64_t i, vf sum) {
    store(c + t * row_floats + i * W, silu<accuracy_of<T>>(sum));
  });
}

// `narrow` is room for the tile in the type of the product.
inline void project_tile(const Mixer& m, const PackedDirection& packed, const float* c, int steps,
                         float* narrow, float* out) {
  const int64_t columns = mixer_columns(m), row_floats = MixerScratch::row_floats(m);
  const Element element = projection_element(m);
  if (element == Element::bfloat16)
    for (int t = 0; t < steps; ++t)
      for (int64_t d = t * row_floats; d < t * row_floats + MixerScratch::padded(m); d += W)
        store((bf16*)narrow + d, load(c + d));
  linear_multiply({.element = element,
                   .out_bf16 = false,
                   .x = element == Element::bfloat16 ? narrow : c,
                   .packed = packed.x_proj,
                   .bias = nullptr,
                   .out = out,
                   .x_stride = words_of(element, row_floats),
                   .out_stride = columns,
                   .N = columns,
                   .K = m.dim},
                  0, steps, 0, linear_panels(columns));
}

// Calls use(t, delta) with dt @ dt_proj + bias at `rows` steps from t on, for one block.
template <int rows, class F>
inline void some_deltas(const Mixer& m, const PackedDirection& packed, int64_t i, const float* projected,
                        int64_t columns, int t, const F& use) {
  const vf bias = load(packed.dt_bias + i * W);
  const float *weight = packed.dt_proj + i * m.dt_rank * W, *dt = projected + t * columns;
  vf delta[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) delta[r] = bias;
  for (int64_t k = 0; k < m.dt_rank; ++k) {
    const vf w = load(weight + k * W);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) delta[r] += w * dt[r * columns + k];
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) use(t + r, delta[r]);
}

// The same at all steps.
template <class F>
inline void for_each_delta(const Mixer& m, const PackedDirection& packed, int64_t i, const float* projected,
                           int64_t columns, int steps, const F& use) {
  constexpr int kTogether = 8;
  int t = 0;
  for (; t + kTogether <= steps; t += kTogether)
    some_deltas<kTogether>(m, packed, i, projected, columns, t, use);
  for (; t < steps; ++t) some_deltas<1>(m, packed, i, projected, columns, t, use);
}

// delta' = softplus(delta) and delta' c for one block.
template <class T>
inline void expand_delta(const Mixer& m, const PackedDirection& packed, int64_t i, const float* projected,
                         int64_t columns, int steps, const MixerScratch& s) {
  const int64_t row_floats = MixerScratch::row_floats(m);
  const float* c = s.c + i * W;
  for_each_delta(m, packed, i, projected, columns, steps, [&](int t, vf delta) {
    const vf positive = softplus<accuracy_of<T>>(delta);
    store(s.delta_u + t * W, positive * load(c + t * row_floats));
    store(s.delta + t * W, at_most(positive, kFinite));
  });
}

inline float gate_of(const Mixer& m, const Direction& direction, int64_t b, int64_t position) {
  return m.gates[b * m.gate_batch_stride + position * m.gate_time_stride + direction.index];
}

// out gains gate (y + D c); the last direction to pass also applies scale * SiLU(z).
template <class T>
inline void add_tile(const Mixer& m, const Direction& direction, const PackedDirection& packed, int64_t b,
                     int64_t i, int64_t step, int steps, bool first, bool last, const MixerScratch& s) {
  const Block block = block_at(i, m.dim, 1);
  const vf skip = load(packed.skip + i * W);
  const int64_t row_floats = MixerScratch::row_floats(m);
  const float* c = s.c + i * W;
  const Steps<T> out = steps_from<T>(step, m.out, m, direction, b, block);
  const Steps<const T> z = steps_from<const T>(step, m.z, m, direction, b, block);
  with_lanes(block, [&](auto lanes) {
    for (int t = 0; t < steps; ++t) {
      vf y = load(s.y + t * W) + skip * load(c + t * row_floats);
      if (m.gates) y *= gate_of(m, direction, b, position_of(step + t, m.length, direction.scan_reverse));
      __builtin_prefetch(out[t] + W, 1);
      if (!first) y += load((const T*)out[t], lanes);
      if (last) {
        __builtin_prefetch(z[t] + W);
        y *= m.scale * silu<accuracy_of<T>>(load(z[t], lanes));
      }
      store(out[t], y, lanes);
    }
  });
}

inline int tile_steps(int64_t step, int64_t end) {
  const int64_t stop = (step / kTile + 1) * kTile;
  return (int)((stop < end ? stop : end) - step);
}

template <class T>
void mixer_project_typed(const Mixer& m, const Direction& direction, const PackedDirection& packed, int64_t b,
                         int64_t step_begin, int64_t step_end, float* projected, const MixerScratch& s) {
  int steps;
  for (int64_t step = step_begin; step < step_end; step += steps) {
    steps = tile_steps(step, step_end);
    convolve_tile<T>(m, direction, packed, b, step, steps, 0, blocks_of(m.dim, 1, W), s.c);
    project_tile(m, packed, s.c, steps, s.narrow, projected + step * mixer_columns(m));
  }
}

template <class T>
void mixer_scan_typed(const Mixer& m, const Direction& direction, const PackedDirection& packed, int64_t b,
                      int64_t step_begin, int64_t step_end, int64_t begin, int64_t end, const float* given,
                      float* state, bool first, bool last, const MixerScratch& s) {
  const int64_t N = m.state, columns = mixer_columns(m);
  int steps;
  for (int64_t step = step_begin; step < step_end; step += steps) {
    steps = tile_steps(step, step_end);
    convolve_tile<T>(m, direction, packed, b, step, steps, begin, end, s.c);
    if (!given) project_tile(m, packed, s.c, steps, s.narrow, s.projected);
    const float* projected = given ? given + step * columns : s.projected;
    for (int64_t i = begin; i < end; ++i) {
      const Block block = block_at(i, m.dim, 1);
      if (direction.states && step % kChunk == 0) {
        const int64_t chunk = b * chunks_of(m.length) + step / kChunk;
        unpack_rows(state + i * N * W, N, block.lanes,
                    direction.states + (chunk * m.dim + block.channel) * N);
      }
      expand_delta<T>(m, packed, i, projected, columns, steps, s);
      const TileInputs inputs = {steps, s.delta, s.delta_u};
      const float* decay = packed.decay + i * N * W;
      const Coefficients<false> B = {projected + m.dt_rank, columns}, C = {B.tile + N, columns};
      advance_all<accuracy_of<T>>(inputs, N, decay, B, C, state + i * N * W, s.y);
      add_tile<T>(m, direction, packed, b, i, step, steps, first, last, s);
    }
  }
}

// Calls use(T()) with the type of the activations.
template <class F>
inline void with_type(const Mixer& m, const F& use) {
  if (m.bf16)
    use(bf16());
  else
    use(float());
}

void mixer_project(const Mixer& m, const Direction& direction, float* packed, int64_t b, int64_t step_begin,
                   int64_t step_end, float* projected, float* scratch) {
  const PackedDirection weights(m, packed);
  const MixerScratch s(m, scratch);
  with_type(m, [&](auto type) {
    mixer_project_typed<decltype(type)>(m, direction, weights, b, step_begin, step_end, projected, s);
  });
}

void mixer_scan(const Mixer& m, const Direction& direction, float* packed, int64_t b, int64_t step_begin,
                int64_t step_end, int64_t begin, int64_t end, const float* projected, float* state,
                bool first, bool last, float* scratch) {
  const PackedDirection weights(m, packed);
  const MixerScratch s(m, scratch);
  with_type(m, [&](auto type) {
    mixer_scan_typed<decltype(type)>(m, direction, weights, b, step_begin, step_end, begin, end, projected,
                                     state, first, last, s);
  });
}

}  // namespace
