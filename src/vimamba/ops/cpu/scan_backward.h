// The selective scan, backward, from the states that the forward saved every kChunk steps.
//
// Layout and parallel axis as in scan.h. Chunks are walked from the last to the first; within one, for each
// block of W channels and kBackward states: the chunk's states and decays are recomputed into the
// second-level cache, then read back in the opposite order. Reads u, delta, z, dout and writes du, ddelta, dz
// once. For each state update: the forward's work, one stored state and decay, and 8 operations of gradient.
// dB and dC are sums over channels: kept as vectors (T, N, W) over all blocks of a group and reduced once.
// Sums over time are taken chunk by chunk, which keeps their rounding errors small.
#pragma once

#include "scan.h"

namespace {

#if defined(VIMAMBA_AVX512)
constexpr int kBackward = 8;
#else
constexpr int kBackward = 4;
#endif

// What the recurrence's way back works in, for one block.
struct RetreatScratch {
  float *kept_decay, *kept_state;                       // (T, kBackward, W)
  float *delta, *delta_u, *dy, *y, *ddelta, *ddelta_u;  // (T, W)

  static int64_t floats() { return (2 * kBackward + 6) * kChunk * W; }
  explicit RetreatScratch(float*& at) {
    auto take = [&at](int64_t floats, auto&... each) { ((each = at, at += floats), ...); };
    take(kChunk * kBackward * W, kept_decay, kept_state);
    take(kChunk * W, delta, delta_u, dy, y, ddelta, ddelta_u);
  }
};

struct BackwardScratch : RetreatScratch {
  float *decay, *carry, *dA, *state, *constant_B, *constant_C, *dB_constant,
      *dC_constant;                   // (blocks, N, W) each
  float *dD, *dbias;                  // (blocks, W)
  float *B, *C;                       // (T, N)
  float *dB, *dC;                     // (T, N, W)
  float *delta_slope, *u, *z, *dout;  // (T, W)

  static int64_t floats(const Scan& scan, int64_t blocks) {
    const int64_t T = kChunk, N = scan.state;
    return RetreatScratch::floats() + 8 * blocks * N * W + 2 * blocks * W + 2 * T * N * W + 4 * T * W +
           2 * T * N;
  }

  BackwardScratch(const Scan& scan, int64_t blocks, float* at) : RetreatScratch(at) {
    const int64_t T = kChunk, N = scan.state;
    auto take = [&at](int64_t floats, auto&... each) { ((each = at, at += floats), ...); };
    take(blocks * N * W, decay, carry, dA, state, constant_B, constant_C, dB_constant, dC_constant);
    take(blocks * W, dD, dbias);
    take(T * N * W, dB, dC);
    take(T * W, delta_slope, u, z, dout);
    take(T * N, B, C);
  }
};

// Where the gradient of B_t[n] gathers: a vector a step, or one for all steps.
template <bool constant>
inline float* gradient_at(float* gradient, int64_t N, int t, int64_t n) {
  return gradient + (constant ? n : t * N + n) * W;
}

// States [first, first + count) of one block and chunk. The scratch by value: what a vector is stored to
// might be the pointers of one that lies in memory. A function by itself: among what its callers keep alive
// its loops would lose registers.
template <int count, class Power, bool constant_B, bool constant_C>
[[gnu::noinline]] void retreat(const Power power, const RetreatScratch s, int steps, int64_t first, int64_t N,
                               const float* decay, const float* state, float* carry, float* dA,
                               Coefficients<constant_B> B, Coefficients<constant_C> C, float* dB, float* dC) {
  vf h[count];
#pragma GCC unroll 8
  for (int n = 0; n < count; ++n) h[n] = load(state + (first + n) * W);
  for (int t = 0; t < steps; ++t) {
    const vf delta = load(s.delta + t * W), delta_u = load(s.delta_u + t * W), dy = load(s.dy + t * W);
    vf y = first ? load(s.y + t * W) : vf{};
#pragma GCC unroll 8
    for (int n = 0; n < count; ++n) {
      const vf a = power(delta, load(decay + (first + n) * W));
      store(s.kept_decay + (t * kBackward + n) * W, a);
      store(s.kept_state + (t * kBackward + n) * W, h[n]);
      h[n] = a * h[n] + delta_u * B(t, first + n);
      y += h[n] * C(t, first + n);
      float* to = gradient_at<constant_C>(dC, N, t, first + n);
      store(to, load(to) + dy * h[n]);
    }
    store(s.y + t * W, y);
  }
  vf g[count], dA_sum[count];
#pragma GCC unroll 8
  for (int n = 0; n < count; ++n) g[n] = load(carry + (first + n) * W), dA_sum[n] = vf{};
  for (int t = steps - 1; t >= 0; --t) {
    const vf delta = load(s.delta + t * W), delta_u = load(s.delta_u + t * W), dy = load(s.dy + t * W);
    vf ddelta = first ? load(s.ddelta + t * W) : vf{}, ddelta_u = first ? load(s.ddelta_u + t * W) : vf{};
#pragma GCC unroll 8
    for (int n = 0; n < count; ++n) {
      const vf dh = g[n] + dy * C(t, first + n);
      float* to = gradient_at<constant_B>(dB, N, t, first + n);
      store(to, load(to) + dh * delta_u);
      ddelta_u += dh * B(t, first + n);
      g[n] = dh * load(s.kept_decay + (t * kBackward + n) * W);
      const vf dexponent = g[n] * load(s.kept_state + (t * kBackward + n) * W);
      dA_sum[n] += dexponent * delta;
      ddelta += dexponent * load(decay + (first + n) * W);
    }
    store(s.ddelta + t * W, ddelta);
    store(s.ddelta_u + t * W, ddelta_u);
  }
#pragma GCC unroll 8
  for (int n = 0; n < count; ++n) {
    float* to = dA + (first + n) * W;
    store(carry + (first + n) * W, g[n]);
    store(to, load(to) + dA_sum[n]);
  }
}

template <class Power, bool constant_B, bool constant_C>
inline void retreat_states(const Power power, const RetreatScratch& s, int steps, int64_t N,
                           const float* decay, const float* state, float* carry, float* dA,
                           Coefficients<constant_B> B, Coefficients<constant_C> C, float* dB, float* dC) {
  int64_t n = 0;
  for (; n + kBackward <= N; n += kBackward)
    retreat<kBackward>(power, s, steps, n, N, decay, state, carry, dA, B, C, dB, dC);
  for (; n < N; ++n) retreat<1>(power, s, steps, n, N, decay, state, carry, dA, B, C, dB, dC);
}

template <Accuracy accuracy, bool constant_B, bool constant_C>
inline void retreat_all(const RetreatScratch& s, int steps, int64_t N, const float* decay, const float* state,
                        float* carry, float* dA, Coefficients<constant_B> B, Coefficients<constant_C> C,
                        float* dB, float* dC) {
  with_power<accuracy>(steps, s.delta, N, decay, [&](auto power) {
    retreat_states(power, s, steps, N, decay, state, carry, dA, B, C, dB, dC);
  });
}

inline void load_backward_inputs(const Scan& scan, const ScanGradients& grad, int64_t b, const Stretch& at,
                                 const Block& block, const BackwardScratch& s) {
  load_rows(scan.delta, scan.bf16, b, at, block, s.delta);
  load_rows(scan.u, scan.bf16, b, at, block, s.u);
  load_rows(grad.dout, scan.bf16, b, at, block, s.dout);
  if (scan.z.data) load_rows(scan.z, scan.bf16, b, at, block, s.z);
  const vf bias = scan.bias ? load(scan.bias + block.channel, block.lanes) : vf{};
  for (int t = 0; t < at.steps; ++t) {
    const vf raw = load(s.delta + t * W) + bias;
    vf slope = splat(1.0f);
    const vf delta = scan.softplus ? softplus(raw, slope) : raw;
    vf dy = load(s.dout + t * W);
    if (scan.z.data) dy *= silu(load(s.z + t * W));
    store(s.delta_slope + t * W, slope);
    store(s.delta_u + t * W, delta * load(s.u + t * W));
    store(s.delta + t * W, at_most(at_least(delta, -kFinite), kFinite));
    store(s.dy + t * W, dy);
  }
}

// The gradients of the block's activations take the places of what they no longer need: u, delta' and z.
inline void store_backward_outputs(const Scan& scan, const ScanGradients& grad, int64_t b, const Stretch& at,
                                   const Block& block, const BackwardScratch& s, float* dD, float* dbias) {
  const vf skip = scan.D ? load(scan.D + block.channel, block.lanes) : vf{};
  vf dD_sum = {}, dbias_sum = {};
  for (int t = 0; t < at.steps; ++t) {
    const vf u = load(s.u + t * W), delta = load(s.delta + t * W), dy = load(s.dy + t * W);
    const vf ddelta_u = load(s.ddelta_u + t * W);
    vf du = ddelta_u * delta, y = load(s.y + t * W);
    if (scan.D) du += dy * skip, y += u * skip, dD_sum += dy * u;
    const vf ddelta = (load(s.ddelta + t * W) * kLn2 + ddelta_u * u) * load(s.delta_slope + t * W);
    dbias_sum += ddelta;
    store(s.u + t * W, du);
    store(s.delta + t * W, ddelta);
    if (scan.z.data) store(s.z + t * W, load(s.dout + t * W) * y * silu_slope(load(s.z + t * W)));
  }
  store_rows(grad.du, scan.bf16, b, at, block, s.u);
  store_rows(grad.ddelta, scan.bf16, b, at, block, s.delta);
  if (scan.z.data) store_rows(grad.dz, scan.bf16, b, at, block, s.z);
  store(dD, load(dD) + dD_sum);
  store(dbias, load(dbias) + dbias_sum);
}

// Each of N vectors (N, W) summed over its lanes.
inline void sum_lanes(const float* vectors, int64_t N, float* sums) {
  for (int64_t n = 0; n < N; n += W) {
    const int count = N - n < W ? (int)(N - n) : W;
    vf square[W];
    for (int i = 0; i < W; ++i) square[i] = i < count ? load(vectors + (n + i) * W) : vf{};
    transpose(square);
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) square[i] += square[i + half];
    store(sums + n, square[0], count);
  }
}

// dB or dC of one of its own groups while the group's blocks pass: cleared before the first of them, summed
// over the lanes after the last. vectors (T, N, W); gradient (S, B, own groups, L, N).
struct ProjectionGradient {
  const Projection& of;
  float *vectors, *gradient;
  int64_t blocks;  // that read one own group

  ProjectionGradient(const Projection& of, const Scan& scan, float* vectors, float* gradient)
      : of(of),
        vectors(vectors),
        gradient(gradient),
        blocks(of.share * (blocks_of(scan.dim, scan.groups, W) / scan.groups)) {}

  void begin(const Scan& scan, const Stretch& at) const {
    memset(vectors, 0, at.steps * scan.state * W * sizeof(float));
  }
  void end(const Scan& scan, int64_t split, int64_t b, int64_t group, const Stretch& at) const {
    const int64_t own_groups = scan.groups / of.share;
    float* to =
        gradient + ((split * scan.batch + b) * own_groups + group / of.share) * scan.length * scan.state;
    for (int t = 0; t < at.steps; ++t)
      sum_lanes(vectors + t * scan.state * W, scan.state, to + (at.position + t * at.sign) * scan.state);
  }
};

template <bool constant_B, bool constant_C>
void begin_backward(const Scan& scan, const ScanGradients& grad, int64_t b, int64_t begin, int64_t end,
                    const BackwardScratch& s) {
  const int64_t N = scan.state, size = N * W, blocks = end - begin;
  memset(s.carry, 0, blocks * size * sizeof(float));
  memset(s.dA, 0, blocks * size * sizeof(float));
  memset(s.dB_constant, 0, 2 * blocks * size * sizeof(float));
  memset(s.dD, 0, 2 * blocks * W * sizeof(float));
  for (int64_t i = 0; i < blocks; ++i) {
    const Block block = block_at(begin + i, scan.dim, scan.groups);
    pack_decay(scan.A + block.channel * N, N, block.lanes, s.decay + i * size);
    if (grad.dlast)
      pack_rows(grad.dlast + (b * scan.dim + block.channel) * N, N, block.lanes, 1, s.carry + i * size);
    if (constant_B)
      pack_rows((const float*)scan.B.data + block.channel * N, N, block.lanes, 1, s.constant_B + i * size);
    if (constant_C)
      pack_rows((const float*)scan.C.data + block.channel * N, N, block.lanes, 1, s.constant_C + i * size);
  }
}

template <bool constant_B, bool constant_C>
void finish_backward(const Scan& scan, const ScanGradients& grad, int64_t b, int64_t begin, int64_t end,
                     const BackwardScratch& s) {
  const int64_t N = scan.state, size = N * W;
  for (int64_t i = 0; i < end - begin; ++i) {
    const Block block = block_at(begin + i, scan.dim, scan.groups);
    const int64_t channel = b * scan.dim + block.channel;
    unpack_rows(s.dA + i * size, N, block.lanes, grad.dA + channel * N);
    if (constant_B) unpack_rows(s.dB_constant + i * size, N, block.lanes, grad.dB + channel * N);
    if (constant_C) unpack_rows(s.dC_constant + i * size, N, block.lanes, grad.dC + channel * N);
    if (grad.dD) store(grad.dD + channel, load(s.dD + i * W), block.lanes);
    if (grad.dbias) store(grad.dbias + channel, load(s.dbias + i * W), block.lanes);
  }
}

template <bool constant_B, bool constant_C>
void scan_backward_task(const Scan& scan, const ScanGradients& grad, int64_t b, int64_t split, int64_t begin,
                        int64_t end, float* memory) {
  const int64_t N = scan.state, size = N * W, chunks = chunks_of(scan.length);
  const BackwardScratch s(scan, end - begin, memory);
  const ProjectionGradient dB(scan.B, scan, s.dB, grad.dB), dC(scan.C, scan, s.dC, grad.dC);
  begin_backward<constant_B, constant_C>(scan, grad, b, begin, end, s);
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t step = chunk * kChunk;
    const int steps = (int)(scan.length - step < kChunk ? scan.length - step : kChunk);
    const Stretch at = stretch_of(scan, step, steps, true);
    int64_t packed_group = -1;
    for (int64_t i = begin; i < end; ++i) {
      const Block block = block_at(i, scan.dim, scan.groups);
      const int64_t o = (i - begin) * size;
      if (block.group != packed_group) {
        if (!constant_B) pack_projection(scan.B, scan, b, block.group, at, s.B);
        if (!constant_C) pack_projection(scan.C, scan, b, block.group, at, s.C);
        packed_group = block.group;
      }
      if (!constant_B && (i == begin || i % dB.blocks == 0)) dB.begin(scan, at);
      if (!constant_C && (i == begin || i % dC.blocks == 0)) dC.begin(scan, at);
      pack_rows(scan.states + ((b * chunks + chunk) * scan.dim + block.channel) * N, N, block.lanes, 1,
                s.state);
      load_backward_inputs(scan, grad, b, at, block, s);
      retreat_all<Accuracy::full, constant_B, constant_C>(
          s, steps, N, s.decay + o, s.state, s.carry + o, s.dA + o, {constant_B ? s.constant_B + o : s.B, N},
          {constant_C ? s.constant_C + o : s.C, N}, constant_B ? s.dB_constant + o : s.dB,
          constant_C ? s.dC_constant + o : s.dC);
      store_backward_outputs(scan, grad, b, at, block, s, s.dD + (i - begin) * W, s.dbias + (i - begin) * W);
      if (!constant_B && (i + 1 == end || (i + 1) % dB.blocks == 0)) dB.end(scan, split, b, block.group, at);
      if (!constant_C && (i + 1 == end || (i + 1) % dC.blocks == 0)) dC.end(scan, split, b, block.group, at);
    }
  }
  finish_backward<constant_B, constant_C>(scan, grad, b, begin, end, s);
}

int64_t scan_backward_scratch(const Scan& scan, int64_t blocks) {
  return BackwardScratch::floats(scan, blocks);
}

void scan_backward(const Scan& scan, const ScanGradients& grad, int64_t b, int64_t split, int64_t begin,
                   int64_t end, float* scratch) {
  if (scan.B.constant && scan.C.constant)
    return scan_backward_task<true, true>(scan, grad, b, split, begin, end, scratch);
  if (scan.B.constant) return scan_backward_task<true, false>(scan, grad, b, split, begin, end, scratch);
  if (scan.C.constant) return scan_backward_task<false, true>(scan, grad, b, split, begin, end, scratch);
  scan_backward_task<false, false>(scan, grad, b, split, begin, end, scratch);
}

}  // namespace
