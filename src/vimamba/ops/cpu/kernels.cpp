// Compiled once for each instruction set, with VIMAMBA_AVX512 (and VIMAMBA_AVX512_BF16, and to that
// VIMAMBA_AMX), VIMAMBA_AVX2 or none of them defined; see vec.h.
#include "kernels.h"

#include "conv.h"
#include "fingerprint.h"
#include "linear.h"
#include "mixer.h"
#include "mixer_backward.h"
#include "mixer_frozen_backward.h"
#include "norm.h"
#include "scan.h"
#include "scan_backward.h"

#if defined(VIMAMBA_AMX)
#define VIMAMBA_TABLE kernels_amx
#define VIMAMBA_NAME "amx"
#elif defined(VIMAMBA_AVX512_BF16)
#define VIMAMBA_TABLE kernels_avx512_bf16
#define VIMAMBA_NAME "avx512_bf16"
#elif defined(VIMAMBA_AVX512)
#define VIMAMBA_TABLE kernels_avx512
#define VIMAMBA_NAME "avx512"
#elif defined(VIMAMBA_AVX2)
#define VIMAMBA_TABLE kernels_avx2
#define VIMAMBA_NAME "avx2"
#else
#define VIMAMBA_TABLE kernels_portable
#define VIMAMBA_NAME "portable"
#endif

namespace vimamba {

const Kernels& VIMAMBA_TABLE() {
  static const Kernels table = {
      .name = VIMAMBA_NAME,
      .lanes = W,
      .has_bf16 = kHasBf16,
      .scan_scratch = scan_scratch,
      .scan_forward = scan_forward,
      .scan_backward_scratch = scan_backward_scratch,
      .scan_backward = scan_backward,
      .conv_forward = conv_forward,
      .conv_backward_scratch = conv_backward_scratch,
      .conv_backward = conv_backward,
      .norm_forward = norm_forward,
      .norm_backward = norm_backward,
      .linear_panels = linear_panels,
      .linear_packed = linear_packed,
      .linear_pack = linear_pack,
      .linear_pack_bfloat16 = linear_pack_bfloat16,
      .linear_pack_int8 = linear_pack_int8,
      .linear_pack_transposed = linear_pack_transposed,
      .linear_multiply = linear_multiply,
      .linear_quantize = linear_quantize,
      .fingerprint = fingerprint,
      .mixer_packed = mixer_packed,
      .mixer_pack = mixer_pack,
      .mixer_scratch = mixer_scratch,
      .mixer_columns = mixer_columns,
      .mixer_project = mixer_project,
      .mixer_scan = mixer_scan,
      .mixer_backward_packed = mixer_backward_packed,
      .mixer_backward_pack = mixer_backward_pack,
      .mixer_backward_sums = mixer_backward_sums,
      .mixer_backward_scratch = mixer_backward_scratch,
      .mixer_backward = mixer_backward,
      .mixer_backward_unpack = mixer_backward_unpack,
      .mixer_frozen_backward = mixer_frozen_backward,
  };
  return table;
}

}  // namespace vimamba
