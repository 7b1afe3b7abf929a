// What a product takes (see linear.h): the weight in panels, and rows as 8-bit integers.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using namespace vimamba;

#if defined(VIMAMBA_AVX512) || defined(VIMAMBA_AMX)
constexpr int kRows = 8, kWide = 3;
#elif defined(VIMAMBA_AVX2)
constexpr int kRows = 6, kWide = 2;
#else
constexpr int kRows = 4, kWide = 2;
#endif
constexpr int64_t kPanel = kWide * W;  // output features of a panel

int64_t linear_panels(int64_t N) { return (N + kPanel - 1) / kPanel; }

int64_t linear_packed(int64_t panels, int64_t K) { return panels * kPanel * K; }

inline int vectors_of(int64_t panel, int64_t N) {
  const int64_t left = (N - panel * kPanel + W - 1) / W;
  return (int)(left < kWide ? left : kWide);
}

// One vector of words of a weight's row, from its feature k on, `words` of which exist; the rest is zero.
template <Element to, class T>
inline vf load_words(const T* row, int64_t k, int64_t K, int words) {
  if constexpr (to == Element::float32) {
    return load(row + k, words);
  } else if constexpr (to == Element::bfloat16) {
    bf16 pairs[2 * W] = {};
    for (int half = 0; half < 2; ++half) {
      const int64_t left = K - k - half * W;
      if (left > 0) store(pairs + half * W, load(row + k + half * W, left < W ? (int)left : W));
    }
    return load((const float*)pairs);
  } else {
    int8_t bytes[4 * W];
    memset(bytes, -128, sizeof bytes);  // 0 with 128 added
    memcpy(bytes, row + k, K - k < 4 * words ? K - k : 4 * words);
    return as_float(as_int(load((const float*)bytes)) ^ (int32_t)0x80808080);
  }
}

template <Element to, class T>
void pack_panels(const T* weight, int64_t N, int64_t K, int64_t begin, int64_t end, float* packed) {
  const int64_t words = words_of(to, K);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int vectors = vectors_of(panel, N);
    for (int v = 0; v < vectors; ++v) {
      const int64_t n = panel * kPanel + v * W;
      for (int64_t g = 0; g < words; g += W) {
        const int lanes = words - g < W ? (int)(words - g) : W;
        vf square[W];
        for (int i = 0; i < W; ++i)
          square[i] = n + i < N ? load_words<to>(weight + (n + i) * K, g * per_word(to), K, lanes) : vf{};
        transpose(square);
        for (int i = 0; i < lanes; ++i)
          store(packed + (panel - begin) * kPanel * words + ((g + i) * vectors + v) * W, square[i]);
      }
    }
  }
}

// Packs the panels [begin, end) of the weight, one after the other; output features beyond N are zero.
void linear_pack(const float* weight, int64_t N, int64_t K, int64_t begin, int64_t end, float* packed) {
  pack_panels<Element::float32>(weight, N, K, begin, end, packed);
}

void linear_pack_bfloat16(const float* weight, int64_t N, int64_t K, int64_t begin, int64_t end,
                          float* packed) {
  pack_panels<Element::bfloat16>(weight, N, K, begin, end, packed);
}

void linear_pack_int8(const int8_t* weight, int64_t N, int64_t K, int64_t begin, int64_t end, float* packed) {
  pack_panels<Element::int8>(weight, N, K, begin, end, packed);
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

// Rows of K numbers as 8-bit integers times a scale of their own, the largest 127; and their integers' sums.
void linear_quantize(const float* x, int64_t rows, int64_t K, int8_t* integers, float* scales,
                     int32_t* sums) {
  const int64_t stride = 4 * words_of(Element::int8, K);
  for (int64_t m = 0; m < rows; ++m) {
    const float* row = x + m * K;
    int8_t* to = integers + m * stride;
    vf largest = {};
    for (int64_t k = 0; k < K; k += W) {
      const vf value = absolute(load(row + k, K - k < W ? (int)(K - k) : W));
      largest = value > largest ? value : largest;
    }
    float most = 0;
    for (int i = 0; i < W; ++i) most = largest[i] > most ? largest[i] : most;
    const float scale = most > 0 ? most / 127 : 1;
    vi sum = {};
    // Adding 1.5 * 2^23 rounds to the nearest integer, which the low bits then hold.
    auto quantized = [&](vf value) {
      const vi integer = as_int(value * (1 / scale) + 12582912.0f) - 0x4b400000;
      sum += integer;
      return to_bytes(integer);
    };
    int64_t k = 0;
    for (; k + W <= K; k += W) {
      const vb bytes = quantized(load(row + k));
      memcpy(to + k, &bytes, W);
    }
    if (k < stride) {
      const vb bytes = quantized(load(row + k, (int)(K - k)));
      memcpy(to + k, &bytes, stride - k);
    }
    int32_t total = 0;
    for (int i = 0; i < W; ++i) total += sum[i];
    scales[m] = scale, sums[m] = total;
  }
}

}  // namespace
