// A fingerprint of weights, so that what was packed from them is known to be theirs however they were
// written.
//
// Layout: 256 bytes of the data at a time, each 8 bytes to a number of its own. A number turns and gains what
// is read: a step that is one-to-one in either, so that no single change is lost. Reads memory at its full
// speed.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

void fingerprint(const void* data, int64_t bytes, uint64_t* numbers) {
  typedef uint64_t vl __attribute__((vector_size(W * 4), may_alias));
  constexpr int64_t kStep = vimamba::kFingerprint * 8;
  constexpr int kVectors = kStep / sizeof(vl);
  vl sums[kVectors];
  memcpy(sums, numbers, kStep);
  const auto add = [&](const char* from) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      vl value;
      memcpy(&value, from + i * sizeof value, sizeof value);
      sums[i] = ((sums[i] << 7) | (sums[i] >> 57)) + value;
    }
  };
  const char* at = (const char*)data;
  for (; bytes >= kStep; bytes -= kStep, at += kStep) add(at);
  if (bytes) {
    char rest[kStep] = {};
    memcpy(rest, at, bytes);
    add(rest);
  }
  memcpy(numbers, sums, kStep);
}

}  // namespace
