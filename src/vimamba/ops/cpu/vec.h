// One vector of channels, for every instruction set, by the compiler's vector extension (GCC and Clang, any
// CPU).
//
// This file is included by kernels.cpp only, which the build compiles once an instruction set; W, the number
// of float32 lanes, and the few primitives that the extension cannot express are all that differs. Everything
// lives in an anonymous namespace and uses nothing of the standard library, so that the linker can never hand
// AVX-512 code to the AVX2 copy.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// A call of exp in an innermost loop would leave it no registers, so the compiler has no say.
#define VIMAMBA_INLINE [[gnu::always_inline]] inline

namespace {

#if defined(VIMAMBA_AVX512) || defined(VIMAMBA_AMX)  // a row of a tile is 16 words
constexpr int W = 16;
#elif defined(VIMAMBA_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4), may_alias));
typedef uint32_t vu __attribute__((vector_size(W * 4), may_alias));
typedef uint16_t vh __attribute__((vector_size(W * 2), may_alias));
typedef int8_t vb __attribute__((vector_size(W), may_alias));

// bfloat16 as it lies in memory: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

VIMAMBA_INLINE vf splat(float value) { return value - vf{}; }

VIMAMBA_INLINE vf as_float(vi bits) { return (vf)bits; }

VIMAMBA_INLINE vi as_int(vf value) { return (vi)value; }

// NaN in `value` passes through both, as in torch.clamp (x86's instructions return their second operand
// then).
#if defined(VIMAMBA_AVX512)
VIMAMBA_INLINE vf at_least(vf value, vf low) { return (vf)_mm512_max_ps((__m512)low, (__m512)value); }
VIMAMBA_INLINE vf at_most(vf value, float high) {
  return (vf)_mm512_min_ps((__m512)splat(high), (__m512)value);
}
#elif defined(VIMAMBA_AVX2)
VIMAMBA_INLINE vf at_least(vf value, vf low) { return (vf)_mm256_max_ps((__m256)low, (__m256)value); }
VIMAMBA_INLINE vf at_most(vf value, float high) {
  return (vf)_mm256_min_ps((__m256)splat(high), (__m256)value);
}
#else
VIMAMBA_INLINE vf at_least(vf value, vf low) { return value < low ? low : value; }
VIMAMBA_INLINE vf at_most(vf value, float high) { return value > high ? splat(high) : value; }
#endif

VIMAMBA_INLINE vf at_least(vf value, float low) { return at_least(value, splat(low)); }

VIMAMBA_INLINE vf absolute(vf value) { return as_float(as_int(value) & 0x7fffffff); }

VIMAMBA_INLINE float sum(vf value) {
  float lanes[W];
  memcpy(lanes, &value, sizeof lanes);
  for (int width = W / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

VIMAMBA_INLINE vf widen(vh half) { return as_float((vi)(__builtin_convertvector(half, vu) << 16)); }

// Round to nearest, ties to even; NaN stays NaN (quieted), as torch does it. (AVX512_BF16 takes denormals for
// zero.)
VIMAMBA_INLINE vh narrow(vf value) {
#if defined(VIMAMBA_AVX512_BF16)
  return (vh)_mm512_cvtneps_pbh((__m512)value);
#else
  const vu bits = (vu)value;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vi not_a_number = value != value;
  return __builtin_convertvector(not_a_number ? vu{} + 0x7fc0u : rounded, vh);
#endif
}

// sum + a0 b0 + a1 b1 for the two 16-bit integers of each lane. In the order of the calls: the compiler would
// reorder sums of integers, for which there are not enough registers.
VIMAMBA_INLINE vi add_pairs(vi sum, vi a, vi b) {
#if defined(VIMAMBA_AVX512)
  sum += (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#if defined(__AVX512F__)  // else it is the tests' software
  asm("" : "+v"(sum));
#endif
#elif defined(VIMAMBA_AVX2)
  sum += (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
  asm("" : "+v"(sum));
#elif defined(__SSE2__) && !defined(VIMAMBA_AMX)
  sum += (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
  asm("" : "+v"(sum));
#elif defined(__aarch64__) && !defined(VIMAMBA_AMX)
  const int16x8_t pairs = (int16x8_t)a, others = (int16x8_t)b;
  sum += (vi)vpaddq_s32(vmull_s16(vget_low_s16(pairs), vget_low_s16(others)), vmull_high_s16(pairs, others));
  asm("" : "+w"(sum));
#else  // also AMX's tiles in plain C++, which the tests have
  sum += (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
  return sum;
}

// Of numbers from -128 to 127.
VIMAMBA_INLINE vb to_bytes(vi value) {
#if defined(VIMAMBA_AVX2)
  const __m256i whole = (__m256i)value;
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(halves, halves));
  return (vb)bytes;
#else
  return __builtin_convertvector(value, vb);
#endif
}

VIMAMBA_INLINE vf load(const float* from) {
  vf value;
  memcpy(&value, from, sizeof value);
  return value;
}

VIMAMBA_INLINE vf load(const bf16* from) {
  vh half;
  memcpy(&half, from, sizeof half);
  return widen(half);
}

VIMAMBA_INLINE void store(float* to, vf value) { memcpy(to, &value, sizeof value); }

VIMAMBA_INLINE void store(bf16* to, vf value) {
  const vh half = narrow(value);
  memcpy(to, &half, sizeof half);
}

// The last channels of a row: `lanes` of them, the other lanes zero. Reads and writes nothing beyond them.
template <class T>
VIMAMBA_INLINE vf load(const T* from, int lanes) {
  if (__builtin_expect(lanes == W, 1)) return load(from);
#if defined(VIMAMBA_AVX512)
  const __mmask16 some = (__mmask16)((1u << lanes) - 1);
  if constexpr (sizeof(T) == 4)
    return (vf)_mm512_maskz_loadu_ps(some, from);
  else
    return widen((vh)_mm256_maskz_loadu_epi16(some, from));
#else
  T padded[W] = {};
  memcpy(padded, from, lanes * sizeof(T));
  return load(padded);
#endif
}

template <class T>
VIMAMBA_INLINE void store(T* to, vf value, int lanes) {
  if (__builtin_expect(lanes == W, 1)) return store(to, value);
#if defined(VIMAMBA_AVX512)
  const __mmask16 some = (__mmask16)((1u << lanes) - 1);
  if constexpr (sizeof(T) == 4)
    return _mm512_mask_storeu_ps(to, some, (__m512)value);
  else
    return _mm256_mask_storeu_epi16(to, some, (__m256i)narrow(value));
#else
  T padded[W];
  store(padded, value);
  memcpy(to, padded, lanes * sizeof(T));
#endif
}

// Rows and columns of a W x W square change places: swaps of halves, quarters, ..., single lanes.
template <int... lane>
struct Lanes {};

template <int count, int... lane>
struct FirstLanes : FirstLanes<count - 1, count - 1, lane...> {};
template <int... lane>
struct FirstLanes<0, lane...> {
  typedef Lanes<lane...> type;
};

template <int half, int... lane>
VIMAMBA_INLINE void swap_lanes(vf& a, vf& b, Lanes<lane...>) {
#if defined(__clang__)
  const vf low = __builtin_shufflevector(a, b, (lane & half ? W + lane - half : lane)...);
  const vf high = __builtin_shufflevector(a, b, (lane & half ? W + lane : lane + half)...);
#else
  const vf low = __builtin_shuffle(a, b, vi{(lane & half ? W + lane - half : lane)...});
  const vf high = __builtin_shuffle(a, b, vi{(lane & half ? W + lane : lane + half)...});
#endif
  a = low, b = high;
}

template <int half = W / 2>
VIMAMBA_INLINE void transpose(vf (&square)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & half)) swap_lanes<half>(square[i], square[i + half], FirstLanes<W>::type());
  if constexpr (half > 1) transpose<half / 2>(square);
}

VIMAMBA_INLINE float scalar(const float* from) { return *from; }

VIMAMBA_INLINE float scalar(const bf16* from) {
  const uint32_t bits = (uint32_t)from->bits << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// The functions below to float32's accuracy, or to a relative error of 1e-4, which is for what bfloat16
// keeps.
enum class Accuracy { full, coarse };

template <class T>
constexpr Accuracy accuracy_of = sizeof(T) == sizeof(bf16) ? Accuracy::coarse : Accuracy::full;

// 2^x for finite x or NaN: x = k + r with |r| <= 1/2, a polynomial for 2^r whose constant term is exactly 1,
// so that decays close to 1 keep their relative accuracy (|error| <= 4.4e-7 |2^r - 1|, coarse 5e-4), and an
// exact scaling by 2^k. Under- and overflow to 0 and infinity.
template <Accuracy accuracy>
VIMAMBA_INLINE vf exp2_polynomial(vf r) {
  if constexpr (accuracy == Accuracy::coarse) {
    const vf p = r * 5.500893174e-02f + 2.422109620e-01f;
    return (p * r + 6.932829274e-01f) * r + 1.0f;
  }
  vf p = r * 1.333353808e-03f + 9.666245431e-03f;
  p = p * r + 5.550500378e-02f;
  p = p * r + 2.402235121e-01f;
  p = p * r + 6.931471229e-01f;
  return p * r + 1.0f;
}

template <Accuracy accuracy = Accuracy::full>
VIMAMBA_INLINE vf exp2(vf x) {
#if defined(VIMAMBA_AVX512)
  const __m512 k = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_polynomial<accuracy>(x - (vf)k), k);
#else
  // Adding 1.5 * 2^23 + 127 leaves k + 127, the biased exponent, in the low bits; at -127 and 128 it encodes
  // 0 and infinity.
  constexpr float kShift = 12582912.0f + 127.0f;
  x = at_most(at_least(x, -127.0f), 128.0f);
  const vf shifted = x + kShift;
  const vf r = x - (shifted - kShift);
  return exp2_polynomial<accuracy>(r) * as_float(as_int(shifted) << 23);
#endif
}

// 2^(a b) for any a b.
template <Accuracy accuracy>
struct AnyExp2 {
  VIMAMBA_INLINE vf operator()(vf a, vf b) const { return exp2<accuracy>(a * b); }
};

// The same where that is a normal number, |a b| <= 126.
template <Accuracy accuracy>
struct NearExp2;

#if defined(VIMAMBA_AVX512)
template <Accuracy accuracy>
constexpr bool kHasNearExp2 = accuracy == Accuracy::coarse;  // else the other is as fast

// x * 32 = k + r with |r| <= 1/2, the 32 powers 2^(i/32) in two registers, an exact scaling in the exponent's
// bits, and 1 + r ln2 / 32 for the rest: a relative error of 6e-5.
template <>
struct NearExp2<Accuracy::coarse> {
  vi low, high;  // the powers' bits, less those that adding k << 18 will add for i

  NearExp2() {
    vi i;
    for (int lane = 0; lane < W; ++lane) i[lane] = lane;
    low = as_int(exp2(__builtin_convertvector(i, vf) / 32.0f)) - (i << 18);
    i += W;
    high = as_int(exp2(__builtin_convertvector(i, vf) / 32.0f)) - (i << 18);
  }
  VIMAMBA_INLINE vf operator()(vf a, vf b) const {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23 leaves k in the low bits
    const vf a32 = a * 32.0f, shifted = a32 * b + kShift;
    const vf r = a32 * b - (shifted - kShift);
    const vi k = as_int(shifted);
    const vi power = (vi)_mm512_permutex2var_epi32((__m512i)low, (__m512i)k, (__m512i)high);
    return as_float(power + (k << 18)) * (r * (kLn2 / 32) + 1.0f);
  }
};
#else
template <Accuracy accuracy>
constexpr bool kHasNearExp2 = true;

// Without bounds, and with the exponent added to that of 2^r.
template <Accuracy accuracy>
struct NearExp2 {
  VIMAMBA_INLINE vf operator()(vf a, vf b) const {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23 leaves k in the low bits
    const vf shifted = a * b + kShift;
    const vf r = a * b - (shifted - kShift);
    return as_float(as_int(exp2_polynomial<accuracy>(r)) + (as_int(shifted) << 23));
  }
};
#endif

// exp for any x: infinities are pulled in to where the result is already 0 or infinity.
template <Accuracy accuracy = Accuracy::full>
VIMAMBA_INLINE vf exp(vf x) {
#if defined(VIMAMBA_AVX512)
  return exp2<accuracy>(at_most(at_least(x * kLog2e, -1e4f), 1e4f));
#else
  return exp2<accuracy>(x * kLog2e);  // which has bounds
#endif
}

// x / y for a normal or infinite y.
template <Accuracy accuracy>
VIMAMBA_INLINE vf divide(vf x, vf y) {
#if defined(VIMAMBA_AVX512)
  if constexpr (accuracy == Accuracy::coarse) return x * (vf)_mm512_rcp14_ps((__m512)y);
#endif
  return x / y;
}

template <Accuracy accuracy>
VIMAMBA_INLINE vf sigmoid(vf x) {
  return divide<accuracy>(splat(1.0f), 1.0f + exp<accuracy>(-x));
}

template <Accuracy accuracy = Accuracy::full>
VIMAMBA_INLINE vf silu(vf x) {
  return divide<accuracy>(x, 1.0f + exp<accuracy>(-x));
}

// d silu(x) / dx
VIMAMBA_INLINE vf silu_slope(vf x) {
  const vf s = sigmoid<Accuracy::full>(x);
  return s + x * s * (1.0f - s);
}

// log(1 + w) for 0 <= w <= 1, relative error 3e-8, coarse 6e-5.
template <Accuracy accuracy>
VIMAMBA_INLINE vf log1p_unit(vf w) {
  if constexpr (accuracy == Accuracy::coarse) {
    vf p = w * 4.134845954e-02f - 1.574303420e-01f;
    p = p * w + 3.063034871e-01f;
    p = p * w - 4.969784170e-01f;
    p = p * w + 9.999432965e-01f;
    return p * w;
  }
  vf p = w * 5.232687917e-03f - 2.950521334e-02f;
  p = p * w + 7.822591046e-02f;
  p = p * w - 1.366324228e-01f;
  p = p * w + 1.910600511e-01f;
  p = p * w - 2.484298179e-01f;
  p = p * w + 3.331909675e-01f;
  p = p * w - 4.999949314e-01f;
  p = p * w + 9.999999699e-01f;
  return p * w;
}

// max(x, 0) + log(1 + exp(-|x|)): the same as torch's softplus with its threshold of 20, to the last bit of
// float32.
template <Accuracy accuracy = Accuracy::full>
VIMAMBA_INLINE vf softplus(vf x) {
  return at_least(x, 0.0f) + log1p_unit<accuracy>(exp<accuracy>(-absolute(x)));
}

// The same with d softplus(x) / dx, the sigmoid, from the same exponential.
template <Accuracy accuracy = Accuracy::full>
VIMAMBA_INLINE vf softplus(vf x, vf& slope) {
  const vf w = exp<accuracy>(-absolute(x));
  slope = divide<accuracy>(x < 0.0f ? w : splat(1.0f), 1.0f + w);
  return at_least(x, 0.0f) + log1p_unit<accuracy>(w);
}

}  // namespace
