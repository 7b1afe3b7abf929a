// Runs of blocks of exported programs, which have nobody to keep their packed weights: they are kept here.
//
// Of the last runs that were computed, with a fingerprint of all of their bytes that every call compares:
// however the weights are written, what runs is what they are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <mutex>
#include <vector>

#include "block_call.h"

namespace vimamba {

constexpr size_t kRemembered = 8;    // runs, of the size of their weights each
constexpr int64_t kManyRows = 4096;  // as _MANY_ROWS of __init__.py: packing takes no time beside their products

struct RememberedRun {
  std::vector<uint64_t> fingerprint;
  std::vector<Tensor> packed;
};

// The stream (B, L, E), float32, after blocks of equal sizes; weights as of block_forward.
Tensor remembered_blocks(const Tensor stream, std::vector<Tensor> weights, std::vector<int64_t> reverse,
                         int64_t directions, double scale, double eps) {
  static std::mutex lock;
  static std::list<RememberedRun>* const runs = new std::list<RememberedRun>;  // outlives what ends the process
  STD_TORCH_CHECK(stream.dim() == 3, "vimamba_cpu: the stream is not (B, L, E)");
  if (stream.size(0) * stream.size(1) >= kManyRows)
    return block_forward(stream, weights, {}, reverse, directions, scale, eps, false);
  const int64_t each = weights.size() / blocks_of(weights, directions);
  const Tensor numbers = block_fingerprints(weights, directions, false);
  std::vector<uint64_t> fingerprint(data<uint64_t>(numbers), data<uint64_t>(numbers) + numbers.numel());
  std::vector<Tensor> packed;
  {
    const std::lock_guard<std::mutex> held(lock);
    const auto known = std::find_if(runs->begin(), runs->end(),
                                    [&](const RememberedRun& run) { return run.fingerprint == fingerprint; });
    if (known != runs->end()) {
      runs->splice(runs->begin(), *runs, known);
      packed = known->packed;
    }
  }
  if (packed.empty()) {
    packed = block_pack(weights, directions, false);
    const std::lock_guard<std::mutex> held(lock);
    runs->push_front({std::move(fingerprint), packed});
    if (runs->size() > kRemembered) runs->pop_back();
  }
  weights.resize(each);
  return block_forward(stream, weights, packed, reverse, directions, scale, eps, false);
}

}  // namespace vimamba
