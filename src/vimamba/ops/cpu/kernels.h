// What the calls (*_call.h, which know tensors and threads) ask of the kernels (which know neither): plain
// structures and a table of functions, one table an instruction set. Every function works on the part of the
// task it is given, on the calling thread.
//
// Letters: B batch, D channels, L time, N state, G groups, R dt_rank, K chunks. Strides are in elements.
// "Step" counts in the order of the recurrence, "position" along the sequence.
#pragma once

#include <stdint.h>

namespace vimamba {

constexpr int64_t kChunk = 64;    // steps between two saved states; CHUNK in vimamba/ops/sizes.py
constexpr int kFingerprint = 32;  // numbers of a fingerprint
static inline int64_t chunks_of(int64_t length) { return (length + kChunk - 1) / kChunk; }

constexpr int kMaxWidth = 16;  // of a convolution

struct Rows {  // a (B, L, D) activation; the mixer and the norm take contiguous channels only
  void* data;
  int64_t batch_stride, time_stride, channel_stride = 1;
};

struct Projection {  // B or C: (B, groups of its own, N, L) with any strides, or constant: (D, N) float32
  const void* data;
  int64_t batch_stride, group_stride, state_stride, time_stride;
  bool constant;
  int64_t share = 1;  // how many of the scan's groups read one group of it
};

struct Scan {
  int64_t batch, dim, length, state, groups;  // groups: as many as serve both B and C
  bool bf16, softplus, reverse;
  Rows u, delta, z;  // z.data may be null
  Projection B, C;
  const float *A, *D, *bias;  // (D, N), (D,) or null, (D,) or null
  Rows out;
  float *last, *states;  // (B, D, N); (B, K, D, N), written forward (or null), read backward
};

struct ScanGradients {
  Rows dout, du, ddelta, dz;
  const float* dlast;      // (B, D, N) or null
  float *dA, *dD, *dbias;  // (B, D, N), (B, D), (B, D): one for each batch element; dD and dbias may be null
  float *dB, *dC;  // (S, B, own groups, L, N) for split s of the channels, or (B, D, N) where constant
};

struct Conv {
  int64_t batch, dim, length, width;
  bool bf16, silu, reverse;
  Rows x, y;                   // backward: y is dy
  const float *weight, *bias;  // (D, W), (D,) or null
};

struct ConvGradients {
  Rows dx;
  float *dweight, *dbias;  // (S, D, W), (S, D) for split s of batch x time; dbias may be null
};

struct Norm {
  int64_t rows, dim;
  bool x_bf16, residual_bf16, normed_bf16;
  const void *x, *residual;  // residual may be null
  const float* weight;
  float eps;
  void* normed;
  float *sum, *rstd;
};

struct NormGradients {
  int64_t rows, dim;
  bool dnormed_bf16;
  const void* dnormed;
  const float *dresidual, *sum, *weight, *rstd;  // dresidual may be null
  float* dsum;
};

enum class Element : int64_t { float32, bfloat16, int8 };  // what a product multiplies; see linear.h

// Elements in a word of 32 bits, and words in a row of K elements.
static inline int64_t per_word(Element e) {
  return e == Element::float32 ? 1 : e == Element::bfloat16 ? 2 : 4;
}
static inline int64_t words_of(Element e, int64_t K) { return (K + per_word(e) - 1) / per_word(e); }

struct Product {  // of rows x (M, K) with a packed weight (N, K)
  Element element;
  bool out_bf16;
  const void* x;
  const float *packed, *bias;  // bias may be null
  void* out;
  int64_t x_stride, out_stride, N, K;  // x_stride in words
  // Of 8-bit integers: what each row of x and of the weight is to be multiplied by, and the rows' sums.
  const float *x_scales = nullptr, *scales = nullptr;
  const int32_t* x_sums = nullptr;
};

struct Direction {
  int64_t index;
  const float *conv_weight, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A_log, *D;
  bool conv_reverse, scan_reverse;
  float* states;  // (B, K, D, N) or null
};

struct Mixer {
  int64_t batch, dim, length, state, dt_rank, width;
  bool bf16;
  float scale;
  Rows x, z, out;
  const float* gates;                           // (B, L or 1, directions), or null
  int64_t gate_batch_stride, gate_time_stride;  // the latter 0 for one gate an image
};

struct MixerGradients {
  Rows dout, dx, dz;
};

struct DirectionGradients {  // of the weights of a Direction
  float *conv_weight, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A_log, *D;
};

// A block is one vector of channels that share a group; a group's last block may be short.
static inline int64_t blocks_of(int64_t dim, int64_t groups, int lanes) {
  return groups * ((dim / groups + lanes - 1) / lanes);
}

// Scratch sizes are in floats.
struct Kernels {
  const char* name;
  int lanes;
  bool has_bf16;  // instructions for products of bfloat16, and of 8-bit integers

  // Channel blocks [begin, end) of one batch element over all time.
  int64_t (*scan_scratch)(const Scan&, int64_t blocks);
  void (*scan_forward)(const Scan&, int64_t b, int64_t begin, int64_t end, float* scratch);
  int64_t (*scan_backward_scratch)(const Scan&, int64_t blocks);
  void (*scan_backward)(const Scan&, const ScanGradients&, int64_t b, int64_t split, int64_t begin,
                        int64_t end, float* scratch);

  // Positions [begin, end) of one batch element, all channels.
  void (*conv_forward)(const Conv&, int64_t b, int64_t begin, int64_t end);
  int64_t (*conv_backward_scratch)(const Conv&);
  void (*conv_backward)(const Conv&, const ConvGradients&, int64_t b, int64_t begin, int64_t end,
                        int64_t split, float* scratch);

  // Rows [begin, end).
  void (*norm_forward)(const Norm&, int64_t begin, int64_t end);
  void (*norm_backward)(const NormGradients&, int64_t begin, int64_t end, float* dweight);

  // Panels of a weight (N, K), and rows [begin, end) of the product with some of them: see linear.h.
  int64_t (*linear_panels)(int64_t N);
  int64_t (*linear_packed)(int64_t panels, int64_t K);
  void (*linear_pack)(const float* weight, int64_t N, int64_t K, int64_t begin, int64_t end, float* packed);
  void (*linear_pack_bfloat16)(const float* weight, int64_t N, int64_t K, int64_t begin, int64_t end,
                               float* packed);
  void (*linear_pack_int8)(const int8_t* weight, int64_t N, int64_t K, int64_t begin, int64_t end,
                           float* packed);
  void (*linear_pack_transposed)(const float* weight, int64_t N, int64_t K, int64_t begin, int64_t end,
                                 float* packed);
  void (*linear_multiply)(const Product&, int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end);
  void (*linear_quantize)(const float* x, int64_t rows, int64_t K, int8_t* integers, float* scales,
                          int32_t* sums);

  // What of memory goes into 32 numbers: any change of it changes them, by chance but for 1 in 2^64.
  void (*fingerprint)(const void* data, int64_t bytes, uint64_t* numbers);

  // The fused mixer: see mixer.h.
  int64_t (*mixer_packed)(const Mixer&);
  void (*mixer_pack)(const Mixer&, const Direction&, float* packed);
  int64_t (*mixer_scratch)(const Mixer&);
  int64_t (*mixer_columns)(const Mixer&);
  void (*mixer_project)(const Mixer&, const Direction&, float* packed, int64_t b, int64_t step_begin,
                        int64_t step_end, float* projected, float* scratch);
  void (*mixer_scan)(const Mixer&, const Direction&, float* packed, int64_t b, int64_t step_begin,
                     int64_t step_end, int64_t begin, int64_t end, const float* projected, float* state,
                     bool first, bool last, float* scratch);

  // Its gradients: see mixer_backward.h.
  int64_t (*mixer_backward_packed)(const Mixer&);
  void (*mixer_backward_pack)(const Mixer&, const Direction&, float* packed);
  int64_t (*mixer_backward_sums)(const Mixer&);
  int64_t (*mixer_backward_scratch)(const Mixer&);
  void (*mixer_backward)(const Mixer&, const Direction&, const MixerGradients&, float* packed, int64_t b,
                         bool first, float* sums, float* scratch);
  void (*mixer_backward_unpack)(const Mixer&, float* packed, float* sums, const DirectionGradients&);

  // That of x alone, with what chooses held constant: see mixer_frozen_backward.h.
  void (*mixer_frozen_backward)(const Mixer&, const Direction&, const MixerGradients&, float* packed,
                                int64_t b, bool first, float* scratch);
};

const Kernels& kernels_portable();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_amx();
#endif

}  // namespace vimamba
