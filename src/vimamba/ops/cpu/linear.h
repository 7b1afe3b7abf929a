// Products with the weight of a linear layer: out = x weight^T + bias.
//
// Layout: x (M, K) and out (M, N) with features contiguous; the weight (N, K) is packed into panels of kWide
// vectors of output features, each (K, vectors x W), so that the innermost loop reads it in order. A block of
// kRows x kWide sums stays in registers: for each k, kWide loads of weights and kRows broadcasts of x feed
// kRows x kWide multiply-adds. Parallel axes: panels, which need no other's packing, then rows (the
// caller's).
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using namespace vimamba;

#if defined(VIMAMBA_AVX512)
constexpr int kRows = 8, kWide = 3;
#elif defined(VIMAMBA_AVX2)
constexpr int kRows = 6, kWide = 2;
#else
constexpr int kRows = 4, kWide = 2;
#endif
constexpr int64_t kPanel = kWide * W;  // output features of a panel

constexpr int64_t kLinearTile = 4 * kRows;  // rows that pass all panels together

int64_t linear_panels(int64_t N) { return (N + kPanel - 1) / kPanel; }

int64_t linear_packed(int64_t panels, int64_t K) { return panels * kPanel * K; }

inline int vectors_of(int64_t panel, int64_t N) {
  const int64_t left = (N - panel * kPanel + W - 1) / W;
  return (int)(left < kWide ? left : kWide);
}

// Packs the panels [begin, end) of the weight, one after the other; output features beyond N are zero.
void linear_pack(const float* weight, int64_t N, int64_t K, int64_t begin, int64_t end, float* packed) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int vectors = vectors_of(panel, N);
    for (int v = 0; v < vectors; ++v) {
      const int64_t n = panel * kPanel + v * W;
      for (int64_t k = 0; k < K; k += W) {
        const int lanes = K - k < W ? (int)(K - k) : W;
        vf square[W];
        for (int i = 0; i < W; ++i) square[i] = n + i < N ? load(weight + (n + i) * K + k, lanes) : vf{};
        transpose(square);
        for (int i = 0; i < lanes; ++i)
          store(packed + (panel - begin) * kPanel * K + ((k + i) * vectors + v) * W, square[i]);
      }
    }
  }
}

// The same from the weight's transpose (K, N).
void linear_pack_transposed(const float* weight, int64_t N, int64_t K, int64_t begin, int64_t end,
                            float* packed) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int vectors = vectors_of(panel, N);
    for (int64_t k = 0; k < K; ++k)
      for (int v = 0; v < vectors; ++v) {
        const int64_t n = panel * kPanel + v * W, left = N - n;
        store(packed + (panel - begin) * kPanel * K + (k * vectors + v) * W,
              load(weight + k * N + n, left < W ? (int)left : W));
      }
  }
}

template <int rows, int vectors>
inline void multiply_block(const Product& p, int64_t m, int64_t n, const float* weight) {
  const float* x = p.x + m * p.x_stride;
  vf sums[rows][vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const int64_t left = p.N - (n + v * W);
    const vf bias = p.bias ? load(p.bias + n + v * W, left < W ? (int)left : W) : vf{};
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sums[r][v] = bias;
  }
  for (int64_t k = 0; k < p.K; ++k) {
    vf w[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) w[v] = load(weight + (k * vectors + v) * W);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] += w[v] * x[r * p.x_stride + k];
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int64_t left = p.N - (n + v * W);
      store(p.out + (m + r) * p.out_stride + n + v * W, sums[r][v], left < W ? (int)left : W);
    }
}

// Rows [begin, end) of one panel; a last block that is short reaches back over rows already done.
template <int vectors>
inline void multiply_panel(const Product& p, int64_t begin, int64_t end, int64_t n, const float* weight) {
  if (end - begin < kRows) {
    for (int64_t m = begin; m < end; ++m) multiply_block<1, vectors>(p, m, n, weight);
    return;
  }
  for (int64_t m = begin; m < end; m += kRows)
    multiply_block<kRows, vectors>(p, m + kRows <= end ? m : end - kRows, n, weight);
}

// Rows [begin, end) times the panels [panel_begin, panel_end), which p.packed holds.
void linear_multiply(const Product& p, int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end) {
  for (int64_t tile = begin; tile < end; tile += kLinearTile) {
    const int64_t tile_end = tile + kLinearTile < end ? tile + kLinearTile : end;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t n = panel * kPanel;
      const float* weight = p.packed + (panel - panel_begin) * kPanel * p.K;
      const int vectors = vectors_of(panel, p.N);
      if (vectors == kWide)
        multiply_panel<kWide>(p, tile, tile_end, n, weight);
      else if (vectors == 2)
        multiply_panel<2>(p, tile, tile_end, n, weight);
      else
        multiply_panel<1>(p, tile, tile_end, n, weight);
    }
  }
}

}  // namespace
