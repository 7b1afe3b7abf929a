// The recurrence over one tile of time for one block of W channels: the innermost loops of the scan and of
// the mixer.
//
// Layout: states (N, W), the tile's inputs (T, W) and its B and C (T, N), all float32 in the first-level
// cache. Channels are the lanes, time is the loop, up to kStates states stay in registers. For each state
// update: one exp2 (about 9 operations), a multiplication and two multiply-adds; no memory beyond B_t and
// C_t, which are read as broadcast operands.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using namespace vimamba;

#if defined(VIMAMBA_AVX512)
constexpr int kStates = 16;
#elif defined(VIMAMBA_AVX2)
constexpr int kStates = 8;
#else
constexpr int kStates = 4;
#endif

constexpr int kTile = 32;  // steps a tile; divides kChunk
static_assert(kChunk % kTile == 0);

// exp2 takes finite arguments only: beyond these a product still over- or underflows as it should.
constexpr float kFinite = 1e18f;

struct Block {
  int64_t group, channel;
  int lanes;
};

inline Block block_at(int64_t index, int64_t dim, int64_t groups) {
  const int64_t dim_of_group = dim / groups;
  const int64_t blocks = (dim_of_group + W - 1) / W;
  const int64_t group = index / blocks;
  const int64_t offset = index % blocks * W;
  const int64_t left = dim_of_group - offset;
  return {group, group * dim_of_group + offset, (int)(left < W ? left : W)};
}

// The number of lanes of a block that has them all, for the compiler to know.
struct AllLanes {
  constexpr operator int() const { return W; }
};

// Calls use(lanes): what it is called with is AllLanes where that is so, and loads and stores need no check.
template <class F>
inline void with_lanes(const Block& block, const F& use) {
  if (block.lanes == W)
    use(AllLanes());
  else
    use(block.lanes);
}

// rows (lanes, N) -> packed (N, W), times `factor`, the lanes beyond the block zero.
inline void pack_rows(const float* rows, int64_t N, int lanes, float factor, float* packed) {
  for (int64_t n = 0; n < N; n += W) {
    const int count = N - n < W ? (int)(N - n) : W;
    vf square[W];
    for (int i = 0; i < W; ++i) square[i] = i < lanes ? load(rows + i * N + n, count) * factor : vf{};
    transpose(square);
    for (int i = 0; i < count; ++i) store(packed + (n + i) * W, square[i]);
  }
}

inline void unpack_rows(const float* packed, int64_t N, int lanes, float* rows) {
  for (int64_t n = 0; n < N; n += W) {
    const int count = N - n < W ? (int)(N - n) : W;
    vf square[W];
    for (int i = 0; i < W; ++i) square[i] = i < count ? load(packed + (n + i) * W) : vf{};
    transpose(square);
    for (int i = 0; i < lanes; ++i) store(rows + i * N + n, square[i], count);
  }
}

// A * log2(e), kept finite so that exp2(delta * A) needs no check of its own.
inline void pack_decay(const float* A, int64_t N, int lanes, float* packed) {
  pack_rows(A, N, lanes, kLog2e, packed);
  for (int64_t n = 0; n < N; ++n)
    store(packed + n * W, at_most(at_least(load(packed + n * W), -kFinite), kFinite));
}

// The same for A = -exp(A_log).
inline void pack_decay_of_log(const float* A_log, int64_t N, int lanes, float* packed) {
  pack_rows(A_log, N, lanes, 1.0f, packed);
  for (int64_t n = 0; n < N; ++n)
    store(packed + n * W, at_least(exp(load(packed + n * W)) * -kLog2e, -kFinite));
}

// How a step reads B_t[n] and C_t[n]: one number for all channels, or a vector that does not depend on time.
template <bool constant>
struct Coefficients {
  const float* tile;  // (T, N) with rows `stride` apart, or (N, W)
  int64_t stride;
  auto operator()(int t, int64_t n) const {
    if constexpr (constant)
      return load(tile + n * W);
    else
      return tile[t * stride + n];
  }
};

struct TileInputs {
  int steps;
  const float *delta, *delta_u;  // (T, W): delta after softplus, delta * u
};

// Whether all of a tile's decays are normal numbers.
inline bool in_reach(int steps, const float* delta, int64_t N, const float* decay) {
  vf fastest = {};
  vi beyond = {};
  for (int64_t n = 0; n < N; ++n) {
    const vf rate = absolute(load(decay + n * W));
    fastest = at_least(rate, fastest);
    beyond |= ~(rate <= kFinite);  // NaN
  }
  for (int t = 0; t < steps; ++t) beyond |= ~(absolute(load(delta + t * W)) * fastest <= 126.0f);
  int some = 0;
  for (int lane = 0; lane < W; ++lane) some |= beyond[lane];
  return !some;
}

// Calls use(power) with what gives 2^(delta * decay) in that tile.
template <Accuracy accuracy, class F>
inline void with_power(int steps, const float* delta, int64_t N, const float* decay, const F& use) {
  if constexpr (kHasNearExp2<accuracy>)
    if (in_reach(steps, delta, N, decay)) return use(NearExp2<accuracy>());
  use(AnyExp2<accuracy>());
}

// States [first, first + count): y (T, W) gains sum_n C_t[n] h_t[n].
template <int count, class Power, bool constant_B, bool constant_C>
inline void advance(const Power power, const TileInputs& in, int64_t first, int64_t N, const float* decay,
                    Coefficients<constant_B> B, Coefficients<constant_C> C, float* state, float* y) {
  vf h[count];
#pragma GCC unroll 16
  for (int n = 0; n < count; ++n) h[n] = load(state + (first + n) * W);
  for (int t = 0; t < in.steps; ++t) {
    const vf delta = load(in.delta + t * W), delta_u = load(in.delta_u + t * W);
    vf even = first ? load(y + t * W) : vf{}, odd = {};
#pragma GCC unroll 16
    for (int n = 0; n < count; ++n) {
      const vf a = power(delta, load(decay + (first + n) * W));
      h[n] = a * h[n] + delta_u * B(t, first + n);
      (n & 1 ? odd : even) += h[n] * C(t, first + n);
    }
    store(y + t * W, even + odd);
  }
#pragma GCC unroll 16
  for (int n = 0; n < count; ++n) store(state + (first + n) * W, h[n]);
}

template <class Power, bool constant_B, bool constant_C>
inline void advance_states(const Power power, const TileInputs& in, int64_t N, const float* decay,
                           Coefficients<constant_B> B, Coefficients<constant_C> C, float* state, float* y) {
  int64_t n = 0;
  for (; n + kStates <= N; n += kStates) advance<kStates>(power, in, n, N, decay, B, C, state, y);
  if constexpr (kStates > 4)
    for (; n + 4 <= N; n += 4) advance<4>(power, in, n, N, decay, B, C, state, y);
  for (; n < N; ++n) advance<1>(power, in, n, N, decay, B, C, state, y);
}

// All N states.
template <Accuracy accuracy, bool constant_B, bool constant_C>
inline void advance_all(const TileInputs& in, int64_t N, const float* decay, Coefficients<constant_B> B,
                        Coefficients<constant_C> C, float* state, float* y) {
  with_power<accuracy>(in.steps, in.delta, N, decay,
                       [&](auto power) { advance_states(power, in, N, decay, B, C, state, y); });
}

}  // namespace
