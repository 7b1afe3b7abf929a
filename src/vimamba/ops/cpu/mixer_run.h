// How one call of the fused mixer divides over threads: by batch elements, by opposite halves of the
// sequence, or by stretches of time and then blocks of channels.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "instruction_set.h"
#include "parallel.h"

namespace vimamba {

// As in vimamba/ops/direction.py: tensors a direction, and the bits of which way round it runs.
constexpr int64_t kWeights = 7;
constexpr int64_t kConvReverse = 1, kScanReverse = 2;

// One call of the fused mixer: the directions, their packed weights, and their states between phases.
struct MixerCall {
  const Kernels& k;
  Mixer mixer;
  std::vector<Direction> directions;
  int64_t blocks = 0, packed_floats = 0, state_floats = 0;
  float *packed = nullptr, *state = nullptr;  // packed: given, or packed by mix()

  float* packed_of(int64_t direction) const { return packed + direction * packed_floats; }
  float* state_of(int64_t b, int64_t direction) const {
    return state + (b * static_cast<int64_t>(directions.size()) + direction) * state_floats;
  }
  bool skips(int64_t b, int64_t d) const {
    return mixer.gates && mixer.gate_time_stride == 0 && mixer.gates[b * mixer.gate_batch_stride + d] == 0;
  }
  // Whether there are directions [begin, end) and an image skips all of them.
  bool skips_all(int64_t b, int64_t begin, int64_t end) const {
    for (int64_t d = begin; d < end; ++d)
      if (!skips(b, d)) return false;
    return begin < end;
  }
  bool skips_any() const {
    for (int64_t b = 0; b < mixer.batch; ++b)
      for (size_t d = 0; d < directions.size(); ++d)
        if (skips(b, d)) return true;
    return false;
  }
  // `first` and `last` say how the directions follow each other if none is skipped.
  void scan(int64_t b, int64_t d, int64_t step_begin, int64_t step_end, int64_t begin, int64_t end,
            const float* projected, bool first, bool last) const {
    if (skips(b, d)) return;
    first = first || skips_all(b, 0, d);
    last = last || skips_all(b, d + 1, directions.size());
    k.mixer_scan(mixer, directions[d], packed_of(d), b, step_begin, step_end, begin, end, projected,
                 state_of(b, d), first, last, scratch<0>(k.mixer_scratch(mixer)));
  }
};

// Whether every thread has images of its own, and all about as many.
bool by_images(int64_t batch) { return batch % threads() == 0 || batch >= 4 * threads(); }

// A batch element a task, its directions one after the other.
void mix_by_batch(const MixerCall& call) {
  const int64_t count = call.directions.size();
  for_each_task(call.mixer.batch, [&](int64_t b) {
    for (int64_t d = 0; d < count; ++d)
      call.scan(b, d, 0, call.mixer.length, 0, call.blocks, nullptr, d == 0, d + 1 == count);
  });
}

// Two opposite directions at once, each over its own first half of the sequence; then each over the half the
// other has been through.
void mix_by_halves(const MixerCall& call) {
  const int64_t length = call.mixer.length, forward = length / 2;
  for (const bool second : {false, true})
    for_each_task(call.mixer.batch * 2, [&](int64_t task) {
      const int64_t d = task % 2;
      const int64_t meet = call.directions[d].scan_reverse ? length - forward : forward;
      call.scan(task / 2, d, second ? meet : 0, second ? length : meet, 0, call.blocks, nullptr, !second,
                second);
    });
}

// More threads than that: project all steps in parallel over time, then scan in parallel over channel blocks.
void mix_by_channels(const MixerCall& call, float* projected) {
  const int64_t count = call.directions.size(), batch = call.mixer.batch, length = call.mixer.length;
  const int64_t columns = call.k.mixer_columns(call.mixer), parts = threads();
  for_each_task(parts, [&](int64_t part) {
    float* memory = scratch<0>(call.k.mixer_scratch(call.mixer));
    for_each_stretch(batch * count, length, part, parts, [&](int64_t at, int64_t begin, int64_t end) {
      const int64_t d = at % count;
      if (call.skips(at / count, d)) return;
      call.k.mixer_project(call.mixer, call.directions[d], call.packed_of(d), at / count, begin, end,
                           projected + at * length * columns, memory);
    });
  });
  const int64_t pieces = parts_of_each(batch, call.blocks);
  for_each_task(batch * pieces, [&](int64_t task) {
    const int64_t b = task / pieces, piece = task % pieces;
    for (int64_t d = 0; d < count; ++d)
      call.scan(b, d, 0, length, piece * call.blocks / pieces, (piece + 1) * call.blocks / pieces,
                projected + (b * count + d) * length * columns, d == 0, d + 1 == count);
  });
}

void clear_images_without_a_direction(const MixerCall& call) {
  const Mixer& m = call.mixer;
  const int64_t image = m.out.batch_stride * (m.bf16 ? 2 : 4);  // bytes; out is contiguous
  for (int64_t b = 0; b < m.batch; ++b)
    if (call.skips_all(b, 0, call.directions.size()))
      std::memset(static_cast<char*>(m.out.data) + b * image, 0, image);
}

// Packs the weights, unless they are given packed, and runs all directions, divided in the way that keeps
// every thread at work.
void mix(MixerCall& call) {
  const Mixer& m = call.mixer;
  const int64_t count = call.directions.size();
  call.blocks = blocks_of(m.dim, 1, call.k.lanes);
  call.packed_floats = call.k.mixer_packed(m), call.state_floats = call.blocks * m.state * call.k.lanes;
  const bool opposite = count == 2 && call.directions[0].scan_reverse != call.directions[1].scan_reverse;
  const bool by_batch = by_images(m.batch);
  const bool even = 2 * m.batch % threads() == 0 && !call.skips_any();
  const bool by_halves = !by_batch && opposite && even && m.length > 1;
  const int64_t projected = by_batch || by_halves ? 0 : m.batch * count * m.length * call.k.mixer_columns(m);
  const int64_t packed = call.packed ? 0 : count * call.packed_floats,
                state = m.batch * count * call.state_floats;
  float* memory = scratch<1>(packed + state + projected);
  call.state = memory + packed;
  std::memset(call.state, 0, state * sizeof(float));
  clear_images_without_a_direction(call);
  if (packed) {
    call.packed = memory;
    for_each_task(count, [&](int64_t d) { call.k.mixer_pack(m, call.directions[d], call.packed_of(d)); });
  }
  if (by_batch)
    mix_by_batch(call);
  else if (by_halves)
    mix_by_halves(call);
  else
    mix_by_channels(call, call.state + state);
}

}  // namespace vimamba
