// The selective scan, forward: delta' = softplus(delta + bias), h = exp(delta' A) h + delta' B u, out = (C.h
// + D u) silu(z).
//
// Layout: u, delta, z, out (B, L, D) with channels contiguous, read and written once, 4 activations of 2 or 4
// bytes each; B and C any strides, read once a group. Parallel axis: batch x channel blocks (the caller's).
// Time is walked in tiles of kTile steps over all the task's channels, so that every cache line of a row is
// used while it is near, with the states parked between tiles.
#pragma once

#include "scan_block.h"

namespace {

inline int64_t chunks_of(int64_t length) { return (length + kChunk - 1) / kChunk; }

template <class T>
inline T* row(const Rows& rows, int64_t b, int64_t position) {
  return (T*)rows.data + b * rows.batch_stride + position * rows.time_stride;
}

// B or C of one group and of `steps` steps from `step` on, as float32 (T, N) in the order of the recurrence.
template <class T>
inline void pack_projection(const Projection& from, const Scan& scan, int64_t b, int64_t group, int64_t step,
                            int steps, float* tile) {
  const T* base = (const T*)from.data + b * from.batch_stride + group * from.group_stride;
  for (int t = 0; t < steps; ++t) {
    const int64_t position = scan.reverse ? scan.length - 1 - (step + t) : step + t;
    for (int64_t n = 0; n < scan.state; ++n)
      tile[t * scan.state + n] = scalar(base + n * from.state_stride + position * from.time_stride);
  }
}

struct ScanScratch {
  float *decay, *state, *constant_B, *constant_C;  // (blocks, N, W) each
  float *B, *C;                                    // (T, N)
  float *delta, *drive, *u, *y;                    // (T, W)

  static int64_t floats(const Scan& scan, int64_t blocks) {
    return 4 * blocks * scan.state * W + 4 * kTile * W + 2 * kTile * scan.state;
  }

  ScanScratch(const Scan& scan, int64_t blocks, float* at) {
    auto take = [&at](int64_t floats, auto&... each) { ((each = at, at += floats), ...); };
    take(blocks * scan.state * W, decay, state, constant_B, constant_C);
    take(kTile * W, delta, drive, u, y);
    take(kTile * scan.state, B, C);
  }
};

// One block's rows of the tile: delta', delta' u and u.
template <class T>
inline void load_tile(const Scan& scan, int64_t b, int64_t step, int steps, const Block& block,
                      const ScanScratch& tile) {
  const vf bias = scan.bias ? load(scan.bias + block.channel, block.lanes) : vf{};
  for (int t = 0; t < steps; ++t) {
    const int64_t position = scan.reverse ? scan.length - 1 - (step + t) : step + t;
    vf delta = load(row<const T>(scan.delta, b, position) + block.channel, block.lanes) + bias;
    if (scan.softplus) delta = softplus(delta);
    const vf u = load(row<const T>(scan.u, b, position) + block.channel, block.lanes);
    store(tile.u + t * W, u);
    store(tile.drive + t * W, delta * u);
    store(tile.delta + t * W, at_most(at_least(delta, -kFinite), kFinite));
  }
}

template <class T>
inline void store_tile(const Scan& scan, int64_t b, int64_t step, int steps, const Block& block,
                       const ScanScratch& tile) {
  const vf skip = scan.D ? load(scan.D + block.channel, block.lanes) : vf{};
  for (int t = 0; t < steps; ++t) {
    const int64_t position = scan.reverse ? scan.length - 1 - (step + t) : step + t;
    vf y = load(tile.y + t * W);
    if (scan.D) y += skip * load(tile.u + t * W);
    if (scan.z.data) y *= silu(load(row<const T>(scan.z, b, position) + block.channel, block.lanes));
    store(row<T>(scan.out, b, position) + block.channel, y, block.lanes);
  }
}

template <class T, bool constant_B, bool constant_C>
void scan_forward_task(const Scan& scan, int64_t b, int64_t begin, int64_t end, float* memory) {
  const int64_t N = scan.state, size = N * W;
  const ScanScratch tile(scan, end - begin, memory);
  for (int64_t i = 0; i < end - begin; ++i) {
    const Block block = block_at(begin + i, scan.dim, scan.groups);
    pack_decay(scan.A + block.channel * N, N, block.lanes, tile.decay + i * size);
    memset(tile.state + i * size, 0, size * sizeof(float));
    if (constant_B)
      pack_rows((const float*)scan.B.data + block.channel * N, N, block.lanes, 1, tile.constant_B + i * size);
    if (constant_C)
      pack_rows((const float*)scan.C.data + block.channel * N, N, block.lanes, 1, tile.constant_C + i * size);
  }
  for (int64_t step = 0; step < scan.length; step += kTile) {
    const int steps = (int)(scan.length - step < kTile ? scan.length - step : kTile);
    int64_t packed_group = -1;
    for (int64_t i = 0; i < end - begin; ++i) {
      const Block block = block_at(begin + i, scan.dim, scan.groups);
      if (block.group != packed_group) {
        if (!constant_B) pack_projection<T>(scan.B, scan, b, block.group, step, steps, tile.B);
        if (!constant_C) pack_projection<T>(scan.C, scan, b, block.group, step, steps, tile.C);
        packed_group = block.group;
      }
      float* state = tile.state + i * size;
      if (scan.states && step % kChunk == 0) {
        const int64_t chunk = b * chunks_of(scan.length) + step / kChunk;
        unpack_rows(state, N, block.lanes, scan.states + (chunk * scan.dim + block.channel) * N);
      }
      load_tile<T>(scan, b, step, steps, block, tile);
      advance_all<constant_B, constant_C>({steps, tile.delta, tile.drive}, N, tile.decay + i * size,
                                          {constant_B ? tile.constant_B + i * size : tile.B, N},
                                          {constant_C ? tile.constant_C + i * size : tile.C, N}, state,
                                          tile.y);
      store_tile<T>(scan, b, step, steps, block, tile);
    }
  }
  for (int64_t i = 0; i < end - begin; ++i) {
    const Block block = block_at(begin + i, scan.dim, scan.groups);
    unpack_rows(tile.state + i * size, N, block.lanes, scan.last + (b * scan.dim + block.channel) * N);
  }
}

template <class T>
void scan_forward_typed(const Scan& scan, int64_t b, int64_t begin, int64_t end, float* scratch) {
  const int kind = (scan.B.constant ? 1 : 0) + (scan.C.constant ? 2 : 0);
  if (kind == 0) return scan_forward_task<T, false, false>(scan, b, begin, end, scratch);
  if (kind == 1) return scan_forward_task<T, true, false>(scan, b, begin, end, scratch);
  if (kind == 2) return scan_forward_task<T, false, true>(scan, b, begin, end, scratch);
  return scan_forward_task<T, true, true>(scan, b, begin, end, scratch);
}

int64_t scan_scratch(const Scan& scan, int64_t blocks) { return ScanScratch::floats(scan, blocks); }

void scan_forward(const Scan& scan, int64_t b, int64_t begin, int64_t end, float* scratch) {
  if (scan.bf16)
    scan_forward_typed<bf16>(scan, b, begin, end, scratch);
  else
    scan_forward_typed<float>(scan, b, begin, end, scratch);
}

}  // namespace
