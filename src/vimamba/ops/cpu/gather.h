// The gradients of weights that stand between numbers of a step and all channels: sums over time of their
// products.
//
// Layout: vectors (T, D in rows), numbers (T, columns), sums (blocks, numbers, W). A few numbers of two
// blocks stay in registers while time is the loop.
#pragma once

#include "mixer.h"

namespace {

// sums (blocks, n, W), `sums_stride` from block to block, gain sum_t vector_t number_t[n]: of neighbouring
// blocks, and for `count` numbers a step.
template <int blocks, int count>
inline void gather_some(int steps, const float* vectors, int64_t vector_stride, const float* numbers,
                        int64_t number_stride, float* sums, int64_t sums_stride) {
  vf total[blocks][count];
#pragma GCC unroll 2
  for (int i = 0; i < blocks; ++i)
#pragma GCC unroll 6
    for (int n = 0; n < count; ++n) total[i][n] = load(sums + i * sums_stride + n * W);
  for (int t = 0; t < steps; ++t) {
    vf vector[blocks];
#pragma GCC unroll 2
    for (int i = 0; i < blocks; ++i) vector[i] = load(vectors + t * vector_stride + i * W);
#pragma GCC unroll 6
    for (int n = 0; n < count; ++n)
#pragma GCC unroll 2
      for (int i = 0; i < blocks; ++i) total[i][n] += vector[i] * numbers[t * number_stride + n];
  }
#pragma GCC unroll 2
  for (int i = 0; i < blocks; ++i)
#pragma GCC unroll 6
    for (int n = 0; n < count; ++n) store(sums + i * sums_stride + n * W, total[i][n]);
}

template <int blocks>
inline void gather_blocks(int steps, const float* vectors, int64_t vector_stride, const float* numbers,
                          int64_t number_stride, int64_t count, float* sums) {
  constexpr int kTogether = 6;
  int64_t n = 0;
  for (; n + kTogether <= count; n += kTogether)
    gather_some<blocks, kTogether>(steps, vectors, vector_stride, numbers + n, number_stride, sums + n * W,
                                   count * W);
  for (; n < count; ++n)
    gather_some<blocks, 1>(steps, vectors, vector_stride, numbers + n, number_stride, sums + n * W,
                           count * W);
}

// The gradient of a weight that takes `count` numbers a step from or to all channels: sums (blocks, count, W)
// gain those of the steps' vectors (T, D in rows) times their numbers (T, columns).
inline void gather(const Mixer& m, int steps, const float* vectors, const float* numbers, int64_t count,
                   float* sums) {
  const int64_t row_floats = MixerScratch::row_floats(m), columns = mixer_columns(m);
  const int64_t blocks = blocks_of(m.dim, 1, W);
  int64_t i = 0;
  for (; i + 2 <= blocks; i += 2)
    gather_blocks<2>(steps, vectors + i * W, row_floats, numbers, columns, count, sums + i * count * W);
  for (; i < blocks; ++i)
    gather_blocks<1>(steps, vectors + i * W, row_floats, numbers, columns, count, sums + i * count * W);
}

}  // namespace
