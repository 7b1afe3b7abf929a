// Which copy of the kernels runs: the best that this machine can, or the one that was asked for.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "tiles.h"

namespace vimamba {

enum InstructionSet : int64_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

bool runs_here(int64_t set) {
  if (set == kPortable) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (set == kAvx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (set == kAvx512) return avx512;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (set == kAvx512Bf16) return bf16;
  if (set == kAmx)
    return bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("amx-int8") && may_use_tiles();
#endif
  return false;
}

const Kernels* table(int64_t set) {
#if defined(__x86_64__)
  if (set == kAmx) return &kernels_amx();
  if (set == kAvx512Bf16) return &kernels_avx512_bf16();
  if (set == kAvx512) return &kernels_avx512();
  if (set == kAvx2) return &kernels_avx2();
#endif
  return &kernels_portable();
}

int64_t best_set() {
  for (const int64_t set : {kAmx, kAvx512Bf16, kAvx512, kAvx2})
    if (runs_here(set)) return set;
  return kPortable;
}

int64_t& active_set() {
  static int64_t set = best_set();
  return set;
}

const Kernels& kernels() { return *table(active_set()); }

// Selects `wanted` if it runs on this machine (any negative number: keep), and returns the set in use.
int64_t instruction_set(int64_t wanted) {
  if (wanted >= 0 && runs_here(wanted)) active_set() = wanted;
  return active_set();
}

}  // namespace vimamba
