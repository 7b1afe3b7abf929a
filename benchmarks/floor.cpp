// How many state updates a second this machine can do at most: the arithmetic of the scan and nothing else.
//
// One update is h = exp2(delta * A) * h + drive * B; y += C * h: two multiplications, two multiply-adds and an exp2 of a
// rounding, a difference, a polynomial of degree 5 and a scaling, for one float32 lane. Everything is in registers: 16 states of one
// vector of channels, as many as the instruction set has lanes; no memory is read or written. Compiled by floor.py for
// the machine it runs on, run by one thread a core.
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
constexpr int kStates = 16;

static inline Vector exp2(Vector x) {
#if defined(__AVX512F__)
  const Vector whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vector shifted = x + 12583039.0f;  // 1.5 * 2^23 + 127: the exponent of 2^whole is in the low bits
  const Vector whole = shifted - 12583039.0f;
#endif
  const Vector r = x - whole;
  Vector p = r * 1.3333e-3f + 9.6662e-3f;
  p = p * r + 5.5505e-2f;
  p = p * r + 2.40223e-1f;
  p = p * r + 6.93147e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, whole);
#else
  Integers bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  Vector scale;
  memcpy(&scale, &bits, sizeof scale);
  return p * scale;
#endif
}

// Does steps * kStates * kLanes updates and returns that number.
extern "C" int64_t vimamba_floor_updates(int64_t steps, float seed) {
  Vector h[kStates] = {}, y = {}, delta = seed - Vector{};
  for (int64_t t = 0; t < steps; ++t) {
    const Vector drive = delta * 0.5f;
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) {
      const float A = -1.4427f * (n + 1);
      h[n] = exp2(delta * A) * h[n] + drive * (0.3f + n);
      y += h[n] * (0.7f - n);
    }
    delta += 1e-7f;
  }
  float lanes[kLanes];
  memcpy(lanes, &y, sizeof lanes);
  volatile float kept = lanes[0];
  (void)kept;
  return steps * kStates * kLanes;
}
