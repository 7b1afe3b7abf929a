// Depthwise causal convolution with SiLU: y_t = silu(bias + sum_j weight[W-1-j] x_{t-j}), or x_{t+j} when
// reversed; zeros outside.
//
// Layout: x, y (B, L, D), channels contiguous; parallel axis: batch x time (the caller's). Bytes: x read and
// y written once (the W - 1 neighbours come from the first-level cache: the loop runs over kConvTile
// positions of one block of channels). Operations for each element: W multiply-adds and one SiLU of about 20.
// Backward recomputes the forward's sum where it needs SiLU's slope.
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

inline void pack_taps(const float* weight_DW, int64_t width, int lanes, float* packed) {
  pack_rows(weight_DW, width, lanes, 1, packed);
  for (int64_t j = 0; 2 * j < width - 1; ++j) {
    const vf tap = load(packed + j * W);
    store(packed + j * W, load(packed + (width - 1 - j) * W));
    store(packed + (width - 1 - j) * W, tap);
  }
}

// The sum at `position`; `at` points to the block's channels there, `stride` leads one tap away, `reach` taps
// are inside.
template <class T>
inline vf convolve(const Taps& taps, const T* at, int64_t stride, int64_t reach, int lanes) {
  vf y = taps.bias;
  if (__builtin_expect(taps.width == 4 && reach >= 3, 1)) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) y += load(taps.weight + j * W) * load(at + j * stride, lanes);
    return y;
  }
  for (int64_t j = 0; j < taps.width && j <= reach; ++j)
    y += load(taps.weight + j * W) * load(at + j * stride, lanes);
  return y;
}

// Taps that lie inside the sequence, seen from `position`, beside the token itself.
inline int64_t reach_at(int64_t position, int64_t length, bool reverse) {
  return reverse ? length - 1 - position : position;
}

template <class T>
void conv_forward_task(const Conv& conv, int64_t b, int64_t begin, int64_t end) {
  alignas(64) float weight[kMaxWidth * W];
  const int64_t stride = conv.reverse ? conv.x.time_stride : -conv.x.time_stride;
  for (int64_t tile = begin; tile < end; tile += kConvTile) {
    const int64_t tile_end = tile + kConvTile < end ? tile + kConvTile : end;
    for (int64_t i = 0; i < blocks_of(conv.dim, 1, W); ++i) {
      const Block block = block_at(i, conv.dim, 1);
      pack_taps(conv.weight + block.channel * conv.width, conv.width, block.lanes, weight);
      const Taps taps{weight, conv.bias ? load(conv.bias + block.channel, block.lanes) : vf{},
                      (int)conv.width};
      for (int64_t t = tile; t < tile_end; ++t) {
        const int64_t reach = reach_at(t, conv.length, conv.reverse);
        const vf y = convolve(taps, row<const T>(conv.x, b, t) + block.channel, stride, reach, block.lanes);
        store(row<T>(conv.y, b, t) + block.channel, conv.silu ? silu(y) : y, block.lanes);
      }
    }
  }
}

void conv_forward(const Conv& conv, int64_t b, int64_t begin, int64_t end) {
  if (conv.bf16)
    conv_forward_task<bf16>(conv, b, begin, end);
  else
    conv_forward_task<float>(conv, b, begin, end);
}

int64_t conv_backward_scratch(const Conv& conv) { return (kConvTile + conv.width - 1) * W; }

// dx at positions [begin, end): the gradients of the sums there and width - 1 positions beyond, against the
// taps. The weights' and the bias' gradients take each position of [begin, end) once and are added to what
// `split` holds.
template <class T>
void conv_backward_task(const Conv& conv, const ConvGradients& grad, int64_t b, int64_t begin, int64_t end,
                        int64_t split, float* dsum) {
  alignas(64) float weight[kMaxWidth * W];
  const int64_t direction = conv.reverse ? 1 : -1, stride = direction * conv.x.time_stride;
  const int64_t width = conv.width;
  for (int64_t tile = begin; tile < end; tile += kConvTile) {
    const int64_t tile_end = tile + kConvTile < end ? tile + kConvTile : end;
    // Tokens whose sums the tile's tokens entered.
    const int64_t first = conv.reverse ? (tile - width + 1 > 0 ? tile - width + 1 : 0) : tile;
    const int64_t beyond =
        conv.reverse ? tile_end : (tile_end + width - 1 < conv.length ? tile_end + width - 1 : conv.length);
    for (int64_t i = 0; i < blocks_of(conv.dim, 1, W); ++i) {
      const Block block = block_at(i, conv.dim, 1);
      pack_taps(conv.weight + block.channel * width, width, block.lanes, weight);
      const Taps taps{weight, conv.bias ? load(conv.bias + block.channel, block.lanes) : vf{}, (int)width};
      vf dweight[kMaxWidth] = {}, dbias = {};
      for (int64_t t = first; t < beyond; ++t) {
        vf dy = load(row<const T>(conv.y, b, t) + block.channel, block.lanes);
        const T* x = row<const T>(conv.x, b, t) + block.channel;
        const int64_t reach = reach_at(t, conv.length, conv.reverse);
        if (conv.silu) dy *= silu_slope(convolve(taps, x, stride, reach, block.lanes));
        store(dsum + (t - first) * W, dy);
        if (t < tile || t >= tile_end) continue;
        dbias += dy;
        for (int64_t j = 0; j < width && j <= reach; ++j)
          dweight[j] += dy * load(x + j * stride, block.lanes);
      }
      for (int64_t t = tile; t < tile_end; ++t) {
        vf dx = {};
        for (int64_t j = 0; j < width; ++j) {
          const int64_t from = t - direction * j;
          if (from >= first && from < beyond) dx += load(weight + j * W) * load(dsum + (from - first) * W);
        }
        store(row<T>(grad.dx, b, t) + block.channel, dx, block.lanes);
      }
      for (int lane = 0; lane < block.lanes; ++lane) {
        const int64_t channel = split * conv.dim + block.channel + lane;
        for (int64_t j = 0; j < width; ++j) grad.dweight[channel * width + width - 1 - j] += dweight[j][lane];
        if (grad.dbias) grad.dbias[channel] += dbias[lane];
      }
    }
  }
}

void conv_backward(const Conv& conv, const ConvGradients& grad, int64_t b, int64_t begin, int64_t end,
                   int64_t split, float* scratch) {
  if (conv.bf16)
    conv_backward_task<bf16>(conv, grad, b, begin, end, split, scratch);
  else
    conv_backward_task<float>(conv, grad, b, begin, end, split, scratch);
}

}  // namespace
