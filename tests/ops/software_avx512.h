// The instructions of AVX-512 that the kernels name, lane by lane in plain C++, for processors that have
// none: with -DVIMAMBA_AVX512 (and -DVIMAMBA_AVX512_BF16) -mavx2 -mfma -include of this file the compiler
// makes two vectors of each one.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// The processor's own are declared first, then their names are taken.
#undef _mm512_max_ps
#define _mm512_max_ps software_max
#undef _mm512_min_ps
#define _mm512_min_ps software_min
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps software_roundscale
#undef _mm512_scalef_ps
#define _mm512_scalef_ps software_scalef
#undef _mm512_rcp14_ps
#define _mm512_rcp14_ps software_rcp14
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 software_madd
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 software_set1
#undef _mm512_permutex2var_epi32
#define _mm512_permutex2var_epi32 software_permutex2var
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps software_maskz_loadu
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps software_mask_storeu
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 software_maskz_loadu_half
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 software_mask_storeu_half
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh software_cvtneps
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps software_dpbf16
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 software_dpbusd

typedef float SoftwareFloats __attribute__((vector_size(64), may_alias));
typedef int32_t SoftwareInts __attribute__((vector_size(64), may_alias));

template <class To, class From>
inline To software_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class F>
inline __m512 software_floats(const F& lane) {
  SoftwareFloats out = {};
  for (int i = 0; i < 16; ++i) out[i] = lane(i);
  return (__m512)out;
}

template <class F>
inline __m512i software_ints(const F& lane) {
  SoftwareInts out = {};
  for (int i = 0; i < 16; ++i) out[i] = lane(i);
  return (__m512i)out;
}

// The second operand where the two do not compare.
inline __m512 software_max(__m512 a, __m512 b) {
  return software_floats([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}

inline __m512 software_min(__m512 a, __m512 b) {
  return software_floats([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}

inline __m512 software_roundscale(__m512 a, int) {
  return software_floats([&](int i) { return std::nearbyint(a[i]); });
}

// a 2^floor(b).
inline __m512 software_scalef(__m512 a, __m512 b) {
  return software_floats([&](int i) {
    if (std::isnan(a[i]) || std::isnan(b[i])) return std::numeric_limits<float>::quiet_NaN();
    return std::ldexp(a[i], b[i] > 1000 ? 1000 : b[i] < -1000 ? -1000 : (int)std::floor(b[i]));
  });
}

// To fourteen bits, as the processor may; 0 for infinity.
inline __m512 software_rcp14(__m512 a) {
  return software_floats(
      [&](int i) { return software_bits<float>(software_bits<uint32_t>(1 / a[i]) & 0xfffffe00u); });
}

inline __m512i software_madd(__m512i a, __m512i b) {
  const auto x = (SoftwareInts)a, y = (SoftwareInts)b;
  return software_ints([&](int i) {
    const auto low = [](int32_t both) { return (int32_t)(int16_t)both; };
    return low(x[i]) * low(y[i]) + (x[i] >> 16) * (y[i] >> 16);
  });
}

inline __m512i software_set1(int value) {
  return software_ints([&](int) { return value; });
}

inline __m512i software_permutex2var(__m512i a, __m512i index, __m512i b) {
  const auto x = (SoftwareInts)a, at = (SoftwareInts)index, y = (SoftwareInts)b;
  return software_ints([&](int i) { return at[i] & 16 ? y[at[i] & 15] : x[at[i] & 15]; });
}

inline __m512 software_maskz_loadu(__mmask16 mask, const void* from) {
  return software_floats([&](int i) { return mask >> i & 1 ? static_cast<const float*>(from)[i] : 0.0f; });
}

inline void software_mask_storeu(void* to, __mmask16 mask, __m512 value) {
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) static_cast<float*>(to)[i] = value[i];
}

inline __m256i software_maskz_loadu_half(__mmask16 mask, const void* from) {
  uint16_t lanes[16] = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(lanes + i, static_cast<const char*>(from) + 2 * i, 2);
  return software_bits<__m256i>(lanes);
}

inline void software_mask_storeu_half(void* to, __mmask16 mask, __m256i value) {
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1)
      std::memcpy(static_cast<char*>(to) + 2 * i, reinterpret_cast<char*>(&value) + 2 * i, 2);
}

// To the nearest bfloat16, ties to even; denormals are zero.
inline __m256i software_cvtneps(__m512 value) {
  uint16_t lanes[16];
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = software_bits<uint32_t>(float(value[i])), rest = bits & 0x7fffffff;
    const bool tiny = rest < 0x00800000, not_a_number = rest > 0x7f800000;
    lanes[i] = tiny           ? bits >> 16 & 0x8000
               : not_a_number ? bits >> 16 | 0x40
                              : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  return software_bits<__m256i>(lanes);
}

// The words of two bfloat16.
template <class Words>
inline __m512 software_dpbf16(__m512 sums, Words a, Words b) {
  const auto x = software_bits<SoftwareInts>(a), y = software_bits<SoftwareInts>(b);
  const auto upper = [](int32_t bits) { return software_bits<float>(bits & (int32_t)0xffff0000); };
  return software_floats([&](int i) {
    const float odd = std::fma(upper(x[i]), upper(y[i]), float(sums[i]));
    return std::fma(upper(x[i] << 16), upper(y[i] << 16), odd);
  });
}

// Unsigned bytes of `a` times signed ones of `b`, four by four.
inline __m512i software_dpbusd(__m512i sums, __m512i a, __m512i b) {
  const auto total = (SoftwareInts)sums, x = (SoftwareInts)a, y = (SoftwareInts)b;
  return software_ints([&](int i) {
    int32_t sum = total[i];
    for (int byte = 0; byte < 4; ++byte) sum += (uint8_t)(x[i] >> 8 * byte) * (int8_t)(y[i] >> 8 * byte);
    return sum;
  });
}
