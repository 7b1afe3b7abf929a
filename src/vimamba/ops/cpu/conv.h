// Depthwise causal convolution with SiLU: y_t = silu(bias + sum_j weight[W-1-j] x_{t-j}), or x_{t+j} when
// reversed; zeros outside.
//
// Layout: x, y (B, D, L) of any strides, taken through tiles as in scan.h; parallel axis: batch x time (the
// caller's). Bytes: x read and y written once (the width - 1 neighbours of a tile's edge twice: the loop runs
// over kConvTile positions of one block of channels). Operations for each element: width multiply-adds and
// one SiLU of about 20. Backward recomputes the forward's sum where it needs SiLU's slope.
#pragma once

#include "scan.h"

namespace {

constexpr int kConvTile = 32;

// Weights and bias of one block of channels: (width, W), tap 0 multiplies the token itself.
struct Taps {
  const float* weight;
  vf bias;
  int width;
};

// The same of a width of four, to stay in registers.
struct FourTaps {
  vf bias, taps[4];
};

inline FourTaps four_of(const Taps& taps) {
  const float* weight = taps.weight;
  return {taps.bias, {load(weight), load(weight + W), load(weight + 2 * W), load(weight + 3 * W)}};
}

inline void pack_taps(const float* weight_DW, int64_t width, int lanes, float* packed) {
  pack_rows(weight_DW, width, lanes, 1, packed);
  for (int64_t j = 0; 2 * j < width - 1; ++j) {
    const vf tap = load(packed + j * W);
    store(packed + j * W, load(packed + (width - 1 - j) * W));
    store(packed + (width - 1 - j) * W, tap);
  }
}

// The sum of four taps that all lie inside.
template <class T, class Lanes>
inline vf convolve(const FourTaps& four, const T* at, int64_t stride, Lanes lanes) {
  vf y = four.bias;
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) y += four.taps[j] * load(at + j * stride, lanes);
  return y;
}

// The sum at `position`; `at` points to the block's channels there, `stride` leads one tap away, `reach` taps
// are inside.
template <class T>
inline vf convolve(const Taps& taps, const T* at, int64_t stride, int64_t reach, int lanes) {
  if (__builtin_expect(taps.width == 4 && reach >= 3, 1)) return convolve(four_of(taps), at, stride, lanes);
  vf y = taps.bias;
  for (int64_t j = 0; j < taps.width && j <= reach; ++j)
    y += load(taps.weight + j * W) * load(at + j * stride, lanes);
  return y;
}

// Taps that lie inside the sequence, seen from `position`, beside the token itself.
inline int64_t reach_at(int64_t position, int64_t length, bool reverse) {
  return reverse ? length - 1 - position : position;
}

// The positions [begin, end) and those of the width - 1 tokens in front of them, or behind them.
inline Stretch with_neighbours(const Conv& conv, int64_t begin, int64_t end, bool behind) {
  const int64_t reach = conv.width - 1;
  if (behind)
    end = end + reach < conv.length ? end + reach : conv.length;
  else
    begin = begin > reach ? begin - reach : 0;
  return {begin, (int)(end - begin), 1};
}

inline Taps taps_of(const Conv& conv, const Block& block, float* packed) {
  pack_taps(conv.weight + block.channel * conv.width, conv.width, block.lanes, packed);
  return {packed, conv.bias ? load(conv.bias + block.channel, block.lanes) : vf{}, (int)conv.width};
}

void conv_forward(const Conv& conv, int64_t b, int64_t begin, int64_t end) {
  alignas(64) float packed[kMaxWidth * W], x[(kConvTile + kMaxWidth - 1) * W], y[kConvTile * W];
  const int64_t stride = conv.reverse ? W : -W;
  for (int64_t tile = begin; tile < end; tile += kConvTile) {
    const int64_t tile_end = tile + kConvTile < end ? tile + kConvTile : end;
    const Stretch seen = with_neighbours(conv, tile, tile_end, conv.reverse);
    for (int64_t i = 0; i < blocks_of(conv.dim, 1, W); ++i) {
      const Block block = block_at(i, conv.dim, 1);
      const Taps taps = taps_of(conv, block, packed);
      load_rows(conv.x, conv.bf16, b, seen, block, x);
      for (int64_t t = tile; t < tile_end; ++t) {
        const int64_t reach = reach_at(t, conv.length, conv.reverse);
        const vf sum = convolve(taps, x + (t - seen.position) * W, stride, reach, W);
        store(y + (t - tile) * W, conv.silu ? silu(sum) : sum);
      }
      store_rows(conv.y, conv.bf16, b, {tile, (int)(tile_end - tile), 1}, block, y);
    }
  }
}

struct ConvScratch {
  float *x, *dsum, *dx;  // (T, W) with two stretches of neighbours, with one, alone

  static int64_t floats(const Conv& conv) { return 3 * (kConvTile + conv.width - 1) * W; }
  ConvScratch(const Conv& conv, float* at) {
    const int64_t reach = conv.width - 1;
    x = at, dsum = x + (kConvTile + 2 * reach) * W, dx = dsum + (kConvTile + reach) * W;
  }
};

int64_t conv_backward_scratch(const Conv& conv) { return ConvScratch::floats(conv); }

// dx at positions [begin, end): the gradients of the sums there and width - 1 positions beyond, against the
// taps. The weights' and the bias' gradients take each position of [begin, end) once and are added to what
// `split` holds.
void conv_backward(const Conv& conv, const ConvGradients& grad, int64_t b, int64_t begin, int64_t end,
                   int64_t split, float* memory) {
  alignas(64) float packed[kMaxWidth * W];
  const ConvScratch s(conv, memory);
  const int64_t sign = conv.reverse ? 1 : -1, stride = sign * W, width = conv.width;
  for (int64_t tile = begin; tile < end; tile += kConvTile) {
    const int64_t tile_end = tile + kConvTile < end ? tile + kConvTile : end;
    // Tokens whose sums the tile's tokens entered, and the tokens that entered those.
    const Stretch sums = with_neighbours(conv, tile, tile_end, !conv.reverse);
    const int64_t first = sums.position, beyond = first + sums.steps;
    const Stretch seen = with_neighbours(conv, first, beyond, conv.reverse);
    for (int64_t i = 0; i < blocks_of(conv.dim, 1, W); ++i) {
      const Block block = block_at(i, conv.dim, 1);
      const Taps taps = taps_of(conv, block, packed);
      load_rows(conv.x, conv.bf16, b, seen, block, s.x);
      load_rows(conv.y, conv.bf16, b, sums, block, s.dsum);
      vf dweight[kMaxWidth] = {}, dbias = {};
      for (int64_t t = first; t < beyond; ++t) {
        vf dsum = load(s.dsum + (t - first) * W);
        const float* x = s.x + (t - seen.position) * W;
        const int64_t reach = reach_at(t, conv.length, conv.reverse);
        if (conv.silu) {
          dsum *= silu_slope(convolve(taps, x, stride, reach, W));
          store(s.dsum + (t - first) * W, dsum);
        }
        if (t < tile || t >= tile_end) continue;
        dbias += dsum;
        for (int64_t j = 0; j < width && j <= reach; ++j) dweight[j] += dsum * load(x + j * stride);
      }
      for (int64_t t = tile; t < tile_end; ++t) {
        vf dx = {};
        for (int64_t j = 0; j < width; ++j) {
          const int64_t from = t - sign * j;
          if (from >= first && from < beyond) dx += load(packed + j * W) * load(s.dsum + (from - first) * W);
        }
        store(s.dx + (t - tile) * W, dx);
      }
      store_rows(grad.dx, conv.bf16, b, {tile, (int)(tile_end - tile), 1}, block, s.dx);
      for (int lane = 0; lane < block.lanes; ++lane) {
        const int64_t channel = split * conv.dim + block.channel + lane;
        for (int64_t j = 0; j < width; ++j) grad.dweight[channel * width + width - 1 - j] += dweight[j][lane];
        if (grad.dbias) grad.dbias[channel] += dbias[lane];
      }
    }
  }
}

}  // namespace
