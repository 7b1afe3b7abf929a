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

struct BackwardScratch {
  float *decay, *carry, *dA, *state, *constant_B, *constant_C, *dB_constant,
      *dC_constant;                                           // (blocks, N, W) each
  float *dD, *dbias;                                          // (blocks, W)
  float *B, *C;                                               // (T, N)
  float *dB, *dC;                                             // (T, N, W)
  float *kept_decay, *kept_state;                             // (T, kBackward, W)
  float *raw, *delta, *drive, *u, *dy, *y, *ddelta, *ddrive;  // (T, W)

  static int64_t floats(const Scan& scan, int64_t blocks) {
    const int64_t T = kChunk, N = scan.state;
    return 8 * blocks * N * W + 2 * blocks * W + 2 * T * N * W + 2 * T * kBackward * W + 8 * T * W +
           2 * T * N;
  }

  BackwardScratch(const Scan& scan, int64_t blocks, float* at) {
    const int64_t T = kChunk, N = scan.state;
    auto take = [&at](int64_t floats, auto&... each) { ((each = at, at += floats), ...); };
    take(blocks * N * W, decay, carry, dA, state, constant_B, constant_C, dB_constant, dC_constant);
    take(blocks * W, dD, dbias);
    take(T * N * W, dB, dC);
    take(T * kBackward * W, kept_decay, kept_state);
    take(T * W, raw, delta, drive, u, dy, y, ddelta, ddrive);
    take(T * N, B, C);
  }
};

// Where the gradient of B_t[n] gathers: a vector a step, or one for all steps.
template <bool constant>
inline float* gradient_at(float* gradient, int64_t N, int t, int64_t n) {
  return gradient + (constant ? n : t * N + n) * W;
}

// States [first, first + count) of one block and chunk.
template <int count, bool constant_B, bool constant_C>
inline void retreat(const BackwardScratch& s, int steps, int64_t first, int64_t N, const float* decay,
                    const float* state, float* carry, float* dA, Coefficients<constant_B> B,
                    Coefficients<constant_C> C, float* dB, float* dC) {
  vf h[count];
#pragma GCC unroll 8
  for (int n = 0; n < count; ++n) h[n] = load(state + (first + n) * W);
  for (int t = 0; t < steps; ++t) {
    const vf delta = load(s.delta + t * W), drive = load(s.drive + t * W), dy = load(s.dy + t * W);
    vf y = first ? load(s.y + t * W) : vf{};
#pragma GCC unroll 8
    for (int n = 0; n < count; ++n) {
      const vf a = exp2(delta * load(decay + (first + n) * W));
      store(s.kept_decay + (t * kBackward + n) * W, a);
      store(s.kept_state + (t * kBackward + n) * W, h[n]);
      h[n] = a * h[n] + drive * B(t, first + n);
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
    const vf delta = load(s.delta + t * W), drive = load(s.drive + t * W), dy = load(s.dy + t * W);
    vf ddelta = first ? load(s.ddelta + t * W) : vf{}, ddrive = first ? load(s.ddrive + t * W) : vf{};
#pragma GCC unroll 8
    for (int n = 0; n < count; ++n) {
      const vf dh = g[n] + dy * C(t, first + n);
      float* to = gradient_at<constant_B>(dB, N, t, first + n);
      store(to, load(to) + dh * drive);
      ddrive += dh * B(t, first + n);
      g[n] = dh * load(s.kept_decay + (t * kBackward + n) * W);
      const vf dexponent = g[n] * load(s.kept_state + (t * kBackward + n) * W);
      dA_sum[n] += dexponent * delta;
      ddelta += dexponent * load(decay + (first + n) * W);
    }
    store(s.ddelta + t * W, ddelta);
    store(s.ddrive + t * W, ddrive);
  }
#pragma GCC unroll 8
  for (int n = 0; n < count; ++n) {
    float* to = dA + (first + n) * W;
    store(carry + (first + n) * W, g[n]);
    store(to, load(to) + dA_sum[n]);
  }
}

template <bool constant_B, bool constant_C>
inline void retreat_all(const BackwardScratch& s, int steps, int64_t N, const float* decay,
                        const float* state, float* carry, float* dA, Coefficients<constant_B> B,
                        Coefficients<constant_C> C, float* dB, float* dC) {
  int64_t n = 0;
  for (; n + kBackward <= N; n += kBackward)
    retreat<kBackward>(s, steps, n, N, decay, state, carry, dA, B, C, dB, dC);
  for (; n < N; ++n) retreat<1>(s, steps, n, N, decay, state, carry, dA, B, C, dB, dC);
}

template <class T>
inline void load_backward_tile(const Scan& scan, const ScanGradients& grad, int64_t b, int64_t step,
                               int steps, const Block& block, const BackwardScratch& s) {
  const vf bias = scan.bias ? load(scan.bias + block.channel, block.lanes) : vf{};
  for (int t = 0; t < steps; ++t) {
    const int64_t position = scan.reverse ? scan.length - 1 - (step + t) : step + t;
    const vf raw = load(row<const T>(scan.delta, b, position) + block.channel, block.lanes) + bias;
    const vf delta = scan.softplus ? softplus(raw) : raw;
    const vf u = load(row<const T>(scan.u, b, position) + block.channel, block.lanes);
    vf dy = load(row<const T>(grad.dout, b, position) + block.channel, block.lanes);
    if (scan.z.data) dy *= silu(load(row<const T>(scan.z, b, position) + block.channel, block.lanes));
    store(s.raw + t * W, raw);
    store(s.u + t * W, u);
    store(s.drive + t * W, delta * u);
    store(s.delta + t * W, at_most(at_least(delta, -kFinite), kFinite));
    store(s.dy + t * W, dy);
  }
}

template <class T>
inline void store_backward_tile(const Scan& scan, const ScanGradients& grad, int64_t b, int64_t step,
                                int steps, const Block& block, const BackwardScratch& s, float* dD,
                                float* dbias) {
  const vf skip = scan.D ? load(scan.D + block.channel, block.lanes) : vf{};
  vf dD_sum = {}, dbias_sum = {};
  for (int t = 0; t < steps; ++t) {
    const int64_t position = scan.reverse ? scan.length - 1 - (step + t) : step + t;
    const vf u = load(s.u + t * W), delta = load(s.delta + t * W), dy = load(s.dy + t * W);
    const vf ddrive = load(s.ddrive + t * W);
    vf du = ddrive * delta, y = load(s.y + t * W);
    if (scan.D) du += dy * skip, y += u * skip, dD_sum += dy * u;
    vf ddelta = load(s.ddelta + t * W) * kLn2 + ddrive * u;
    if (scan.softplus) ddelta *= sigmoid(load(s.raw + t * W));
    dbias_sum += ddelta;
    store(row<T>(grad.du, b, position) + block.channel, du, block.lanes);
    store(row<T>(grad.ddelta, b, position) + block.channel, ddelta, block.lanes);
    if (scan.z.data) {
      const vf dout = load(row<const T>(grad.dout, b, position) + block.channel, block.lanes);
      const vf z = load(row<const T>(scan.z, b, position) + block.channel, block.lanes);
      store(row<T>(grad.dz, b, position) + block.channel, dout * y * silu_slope(z), block.lanes);
    }
  }
  store(dD, load(dD) + dD_sum);
  store(dbias, load(dbias) + dbias_sum);
}

// The vectors (T, N, W) of one group and chunk, summed over the lanes, into (L, N).
inline void reduce_projection(const Scan& scan, const float* vectors, int64_t step, int steps,
                              float* gradient_LN) {
  for (int t = 0; t < steps; ++t) {
    const int64_t position = scan.reverse ? scan.length - 1 - (step + t) : step + t;
    for (int64_t n = 0; n < scan.state; ++n)
      gradient_LN[position * scan.state + n] = sum(load(vectors + (t * scan.state + n) * W));
  }
}

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

template <class T, bool constant_B, bool constant_C>
void scan_backward_task(const Scan& scan, const ScanGradients& grad, int64_t b, int64_t split, int64_t begin,
                        int64_t end, float* memory) {
  const int64_t N = scan.state, size = N * W, chunks = chunks_of(scan.length);
  const int64_t per_group = blocks_of(scan.dim, scan.groups, W) / scan.groups;
  const BackwardScratch s(scan, end - begin, memory);
  begin_backward<constant_B, constant_C>(scan, grad, b, begin, end, s);
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t step = chunk * kChunk;
    const int steps = (int)(scan.length - step < kChunk ? scan.length - step : kChunk);
    for (int64_t i = 0; i < end - begin; ++i) {
      const Block block = block_at(begin + i, scan.dim, scan.groups);
      if (i == 0 || (begin + i) % per_group == 0) {
        if (!constant_B) pack_projection<T>(scan.B, scan, b, block.group, step, steps, s.B);
        if (!constant_C) pack_projection<T>(scan.C, scan, b, block.group, step, steps, s.C);
        memset(s.dB, 0, steps * size * sizeof(float));
        memset(s.dC, 0, steps * size * sizeof(float));
      }
      pack_rows(scan.states + ((b * chunks + chunk) * scan.dim + block.channel) * N, N, block.lanes, 1,
                s.state);
      load_backward_tile<T>(scan, grad, b, step, steps, block, s);
      retreat_all<constant_B, constant_C>(
          s, steps, N, s.decay + i * size, s.state, s.carry + i * size, s.dA + i * size,
          {constant_B ? s.constant_B + i * size : s.B, N}, {constant_C ? s.constant_C + i * size : s.C, N},
          constant_B ? s.dB_constant + i * size : s.dB, constant_C ? s.dC_constant + i * size : s.dC);
      store_backward_tile<T>(scan, grad, b, step, steps, block, s, s.dD + i * W, s.dbias + i * W);
      if (i + 1 == end - begin || (begin + i + 1) % per_group == 0) {
        const int64_t at = ((split * scan.batch + b) * scan.groups + block.group) * scan.length * N;
        if (!constant_B) reduce_projection(scan, s.dB, step, steps, grad.dB + at);
        if (!constant_C) reduce_projection(scan, s.dC, step, steps, grad.dC + at);
      }
    }
  }
  finish_backward<constant_B, constant_C>(scan, grad, b, begin, end, s);
}

template <class T>
void scan_backward_typed(const Scan& scan, const ScanGradients& grad, int64_t b, int64_t split, int64_t begin,
                         int64_t end, float* scratch) {
  const int kind = (scan.B.constant ? 1 : 0) + (scan.C.constant ? 2 : 0);
  if (kind == 0) return scan_backward_task<T, false, false>(scan, grad, b, split, begin, end, scratch);
  if (kind == 1) return scan_backward_task<T, true, false>(scan, grad, b, split, begin, end, scratch);
  if (kind == 2) return scan_backward_task<T, false, true>(scan, grad, b, split, begin, end, scratch);
  return scan_backward_task<T, true, true>(scan, grad, b, split, begin, end, scratch);
}

int64_t scan_backward_scratch(const Scan& scan, int64_t blocks) {
  return BackwardScratch::floats(scan, blocks);
}

void scan_backward(const Scan& scan, const ScanGradients& grad, int64_t b, int64_t split, int64_t begin,
                   int64_t end, float* scratch) {
  if (scan.bf16)
    scan_backward_typed<bf16>(scan, grad, b, split, begin, end, scratch);
  else
    scan_backward_typed<float>(scan, grad, b, split, begin, end, scratch);
}

}  // namespace
