// Products with the weight of a linear layer: out = x weight^T + bias.
//
// Everything goes by words of 32 bits along the K features of the input: a float32, two bfloat16, or four
// 8-bit integers (x signed, the weight plus 128). Layout: x (M, words) and out (M, N) with features
// contiguous; the weight (N, K) is packed into panels of kWide vectors of output features, each (words,
// vectors x W), so that the innermost loop reads it in order. A block of kRows x kWide sums stays in
// registers: for each word, kWide loads of weights and kRows broadcasts of x feed kRows x kWide
// multiply-adds of 1, 2 or 4 features. Where the processor has tiles (AMX), sixteen rows by sixteen words by
// a panel are one step. Parallel axes: panels, which need no other's packing, then rows (the caller's).
#pragma once

#include "linear_pack.h"

namespace {

#if defined(VIMAMBA_AVX512_BF16)
constexpr bool kHasBf16 = true;  // instructions for products of bfloat16, and of 8-bit integers
#else
constexpr bool kHasBf16 = false;
#endif

constexpr int64_t kLinearTile = 4 * kRows;  // rows that pass all panels together

// Sums over words: a vector of output features, and how one word of x and of the weights adds to it.
template <Element>
struct Sum;

template <>
struct Sum<Element::float32> {
  vf value = {};
  void add(vf w, const float* x) { value += w * *x; }
};

// Two bfloat16 that lie side by side, and four 8-bit integers.
struct Word {
  int32_t bits;
};

template <>
struct Sum<Element::bfloat16> {
  vf value = {};
#if defined(VIMAMBA_AVX512_BF16)
  void add(vf w, const Word* x) {
    value = (vf)_mm512_dpbf16_ps((__m512)value, (__m512bh)(__m512)w, (__m512bh)_mm512_set1_epi32(x->bits));
  }
#else
  void add(vf w, const Word* x) {
    const vi both = as_int(w);
    value += as_float(both << 16) * as_float(vi{} + (x->bits << 16));
    value += as_float(both & (int32_t)0xffff0000) * as_float(vi{} + (x->bits & (int32_t)0xffff0000));
  }
#endif
};

template <>
struct Sum<Element::int8> {
  vi value = {};
#if defined(VIMAMBA_AVX512_BF16)
  void add(vf w, const Word* x) {
    value = (vi)_mm512_dpbusd_epi32((__m512i)value, (__m512i)w, _mm512_set1_epi32(x->bits));
  }
#else
  void add(vi pairs, int32_t x) { value = add_pairs(value, pairs, vi{} + x); }
#endif
};

// A vector of row m's sums is written from feature `at` on: scaled where they are integers, and with the bias
// where they did not start from it.
template <Element element, class T, class V>
inline void put(const Product& p, int64_t m, int64_t at, V sums) {
  const int64_t left = p.N - at;
  const int lanes = left < W ? (int)left : W;
  vf out;
  if constexpr (element == Element::int8)
    out = __builtin_convertvector(sums - 128 * p.x_sums[m], vf) * p.x_scales[m] * load(p.scales + at, lanes);
  else
    out = sums;
  if constexpr (element != Element::float32)
    if (p.bias) out += load(p.bias + at, lanes);
  store((T*)p.out + m * p.out_stride + at, out, lanes);
}

template <Element element>
struct PointerTo {
  typedef const Word* type;
};
template <>
struct PointerTo<Element::float32> {
  typedef const float* type;
};

#if !defined(VIMAMBA_AVX512_BF16)
// 8-bit integers without an instruction for four of them: the even ones of each word, then the odd ones, as
// pairs of 16 bits. Those of x are widened once for all vectors, a stretch of words at a time.
template <int rows, int vectors>
inline void multiply_pairs(const Word* x, int64_t x_stride, const float* weight, int64_t words,
                           Sum<Element::int8> (&sums)[rows][vectors]) {
  typedef int16_t vs __attribute__((vector_size(W * 4), may_alias));
  constexpr int kStretch = 64;
  int32_t pairs[2][rows][kStretch];
  Sum<Element::int8> gathered[rows][vectors];
  for (int64_t begin = 0; begin < words; begin += kStretch) {
    const int count = words - begin < kStretch ? (int)(words - begin) : kStretch;
    for (int r = 0; r < rows; ++r)
      for (int g = 0; g < count; g += W) {
        const float* from = (const float*)(x + r * x_stride + begin + g);
        const vs bytes = (vs)load(from, count - g < W ? count - g : W);
        store((float*)(pairs[0][r] + g), (vf)(bytes << 8 >> 8));
        store((float*)(pairs[1][r] + g), (vf)(bytes >> 8));
      }
    for (int g = 0; g < count; ++g)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        vi w[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const vu bytes = (vu)load(weight + ((begin + g) * vectors + v) * W);
          w[v] = (vi)(bytes >> (8 * half) & 0x00ff00ffu);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) gathered[r][v].add(w[v], pairs[half][r][g]);
      }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[r][v] = gathered[r][v];
}
#endif

template <Element element, class T, int rows, int vectors>
inline void multiply_block(const Product& p, int64_t m, int64_t n, const float* weight) {
  typedef typename PointerTo<element>::type X;
  const X x = (X)p.x + m * p.x_stride;
  Sum<element> sums[rows][vectors];
  if constexpr (element == Element::float32) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int64_t left = p.N - (n + v * W);
      const vf bias = p.bias ? load(p.bias + n + v * W, left < W ? (int)left : W) : vf{};
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) sums[r][v].value = bias;
    }
  }
  const int64_t words = words_of(element, p.K);
  if constexpr (element == Element::int8 && !kHasBf16) {
    multiply_pairs<rows, vectors>(x, p.x_stride, weight, words, sums);
  } else {
    for (int64_t g = 0; g < words; ++g) {
      vf w[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) w[v] = load(weight + (g * vectors + v) * W);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v].add(w[v], x + r * p.x_stride + g);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) put<element, T>(p, m + r, n + v * W, sums[r][v].value);
}

#if defined(VIMAMBA_AMX)
constexpr int kTileRows = 16, kTileWords = 16;

// As LDTILECFG reads it: tiles 0 to 2 hold sums, 3 rows of x, 4 to 6 weights.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Whether the words of a product fill tiles.
inline bool fills_tiles(const Product& p) {
  return p.element != Element::float32 && words_of(p.element, p.K) % kTileWords == 0;
}

// The thread's tiles for one product of some rows, if it fills them.
struct Tiles {
  const bool used;

  Tiles(const Product& p, int64_t rows) : used(fills_tiles(p)) {
    if (!used) return;
    TileShapes shapes;
    for (int tile = 0; tile < 7; ++tile) {
      shapes.row_bytes[tile] = kTileWords * 4;
      shapes.rows[tile] = tile < 4 && rows < kTileRows ? rows : kTileRows;
    }
    _tile_loadconfig(&shapes);
  }
  ~Tiles() {
    if (used) _tile_release();
  }
};

template <Element element, class T, int vectors>
inline void multiply_tile(const Product& p, int64_t m, int rows, int64_t n, const float* weight) {
  constexpr int64_t kLine = vectors * W;  // words of the panel from one word of K to the next
  const Word* x = (const Word*)p.x + m * p.x_stride;
  const int64_t words = words_of(element, p.K);
  _tile_zero(0);
  if constexpr (vectors > 1) _tile_zero(1);
  if constexpr (vectors > 2) _tile_zero(2);
#define VIMAMBA_STEP(sums, weights, v)                           \
  if constexpr (vectors > v) {                                   \
    _tile_loadd(weights, weight + g * kLine + v * W, kLine * 4); \
    if constexpr (element == Element::int8)                      \
      _tile_dpbsud(sums, 3, weights);                            \
    else                                                         \
      _tile_dpbf16ps(sums, 3, weights);                          \
  }
  for (int64_t g = 0; g < words; g += kTileWords) {
    _tile_loadd(3, x + g, p.x_stride * 4);
    VIMAMBA_STEP(0, 4, 0)
    VIMAMBA_STEP(1, 5, 1)
    VIMAMBA_STEP(2, 6, 2)
  }
#undef VIMAMBA_STEP
  decltype(Sum<element>::value) sums[kTileRows][vectors];
  _tile_stored(0, sums[0], kLine * 4);
  if constexpr (vectors > 1) _tile_stored(1, &sums[0][1], kLine * 4);
  if constexpr (vectors > 2) _tile_stored(2, &sums[0][2], kLine * 4);
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) put<element, T>(p, m + r, n + v * W, sums[r][v]);
}
#endif

// Rows [begin, end) of one panel; a last block that is short reaches back over rows already done, to `first`.
template <Element element, class T, int vectors>
inline void multiply_panel(const Product& p, int64_t first, int64_t begin, int64_t end, int64_t n,
                           const float* weight) {
#if defined(VIMAMBA_AMX)
  if constexpr (element != Element::float32)
    if (fills_tiles(p)) {
      const int rows = end - first < kTileRows ? end - first : kTileRows;
      for (int64_t m = begin; m < end; m += kTileRows)
        multiply_tile<element, T, vectors>(p, m + rows <= end ? m : end - rows, rows, n, weight);
      return;
    }
#endif
  if (end - first < kRows) {
    for (int64_t m = begin; m < end; ++m) multiply_block<element, T, 1, vectors>(p, m, n, weight);
    return;
  }
  for (int64_t m = begin; m < end; m += kRows)
    multiply_block<element, T, kRows, vectors>(p, m + kRows <= end ? m : end - kRows, n, weight);
}

template <Element element, class T>
void multiply(const Product& p, int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end) {
  const int64_t panel_floats = kPanel * words_of(element, p.K);
#if defined(VIMAMBA_AMX)
  const Tiles tiles(p, end - begin);
#endif
  for (int64_t tile = begin; tile < end; tile += kLinearTile) {
    const int64_t tile_end = tile + kLinearTile < end ? tile + kLinearTile : end;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t n = panel * kPanel;
      const float* weight = p.packed + (panel - panel_begin) * panel_floats;
      const int vectors = vectors_of(panel, p.N);
      if (vectors == kWide)
        multiply_panel<element, T, kWide>(p, begin, tile, tile_end, n, weight);
      else if (vectors == 2)
        multiply_panel<element, T, 2>(p, begin, tile, tile_end, n, weight);
      else
        multiply_panel<element, T, 1>(p, begin, tile, tile_end, n, weight);
    }
  }
}

template <Element element>
void multiply_to(const Product& p, int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end) {
  if (p.out_bf16)
    multiply<element, bf16>(p, begin, end, panel_begin, panel_end);
  else
    multiply<element, float>(p, begin, end, panel_begin, panel_end);
}

// Rows [begin, end) times the panels [panel_begin, panel_end), which p.packed holds.
void linear_multiply(const Product& p, int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end) {
  if (p.element == Element::float32)
    multiply_to<Element::float32>(p, begin, end, panel_begin, panel_end);
  else if (p.element == Element::bfloat16)
    multiply_to<Element::bfloat16>(p, begin, end, panel_begin, panel_end);
  else
    multiply_to<Element::int8>(p, begin, end, panel_begin, panel_end);
}

}  // namespace
