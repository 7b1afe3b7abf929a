// The selective scan, forward: delta' = softplus(delta + bias), h = exp(delta' A) h + delta' B u, out = (C.h
// + D u) silu(z).
//
// Layout: u, delta, z, out (B, D, L) of any strides, read and written once, 4 activations of 2 or 4 bytes
// each; vectors of contiguous channels are loaded as they are, contiguous steps are turned in registers, W x
// W at a time. B and C any strides, read once a group. Parallel axis: batch x channel blocks (the caller's).
// Time is walked in tiles of kTile steps over all the task's channels, so that every cache line of a row is
// used while it is near, with the states parked between tiles.
#pragma once

#include "scan_block.h"

namespace {

template <class T>
inline T* row(const Rows& rows, int64_t b, int64_t position) {
  return (T*)rows.data + b * rows.batch_stride + position * rows.time_stride;
}

inline int64_t position_of(int64_t step, int64_t length, bool reverse) {
  return reverse ? length - 1 - step : step;
}

// A stretch of the sequence: `steps` steps whose positions rise by `sign` (1, or -1 in reverse) from
// `position` on.
struct Stretch {
  int64_t position;
  int steps, sign;
  int64_t ahead = 0;  // from here to the stretch that is read next, in positions
  int64_t lowest() const { return sign > 0 ? position : position - steps + 1; }
};

inline Stretch stretch_of(const Scan& scan, int64_t step, int steps, bool next_is_before = false) {
  const int sign = scan.reverse ? -1 : 1;
  return {position_of(step, scan.length, scan.reverse), steps, sign,
          next_is_before ? -sign * kChunk : sign * steps};
}

// `lanes` neighbours, `lane_stride` apart, at every step of a stretch, into (T, `tile_stride`) float32,
// `width` of which are written. Vectors lie along the lanes or, turned in registers, along time; else it is
// element by element.
template <class T>
inline void load_tile(const T* from, int64_t lane_stride, int64_t time_stride, int lanes, const Stretch& at,
                      float* tile, int64_t tile_stride, int width) {
  if (lane_stride == 1) {
    for (int t = 0; t < at.steps; ++t)
      store(tile + t * tile_stride, load(from + (at.position + t * at.sign) * time_stride, lanes), width);
  } else if (time_stride == 1) {
    for (int t = 0; t < at.steps; t += W) {
      const int count = at.steps - t < W ? at.steps - t : W;
      const int64_t lowest = Stretch{at.position + t * at.sign, count, at.sign}.lowest();
      vf square[W];
      for (int i = 0; i < W; ++i) {
        square[i] = i < lanes ? load(from + i * lane_stride + lowest, count) : vf{};
        // The stretch after this one, which comes when all blocks have passed: too many streams for the
        // hardware.
        if (i < lanes) __builtin_prefetch(from + i * lane_stride + lowest + at.ahead, 0, 2);
      }
      transpose(square);
      for (int i = 0; i < count; ++i)
        store(tile + (t + (at.sign > 0 ? i : count - 1 - i)) * tile_stride, square[i], width);
    }
  } else {
    for (int t = 0; t < at.steps; ++t) {
      const T* here = from + (at.position + t * at.sign) * time_stride;
      for (int i = 0; i < width; ++i)
        tile[t * tile_stride + i] = i < lanes ? scalar(here + i * lane_stride) : 0.0f;
    }
  }
}

// The inverse for a block of channels: (T, W) to where it belongs.
template <class T>
inline void store_tile(T* to, int64_t lane_stride, int64_t time_stride, int lanes, const Stretch& at,
                       const float* tile) {
  if (lane_stride == 1) {
    for (int t = 0; t < at.steps; ++t)
      store(to + (at.position + t * at.sign) * time_stride, load(tile + t * W), lanes);
  } else if (time_stride == 1) {
    for (int t = 0; t < at.steps; t += W) {
      const int count = at.steps - t < W ? at.steps - t : W;
      const int64_t lowest = Stretch{at.position + t * at.sign, count, at.sign}.lowest();
      vf square[W];
      for (int i = 0; i < W; ++i)
        square[i] = i < count ? load(tile + (t + (at.sign > 0 ? i : count - 1 - i)) * W) : vf{};
      transpose(square);
      for (int i = 0; i < lanes; ++i) store(to + i * lane_stride + lowest, square[i], count);
    }
  } else {
    for (int t = 0; t < at.steps; ++t) {
      T lane[W];
      store(lane, load(tile + t * W));
      for (int i = 0; i < lanes; ++i)
        to[(at.position + t * at.sign) * time_stride + i * lane_stride] = lane[i];
    }
  }
}

// One block's channels at every step of a stretch, as (T, W) float32; lanes beyond the block are zero.
inline void load_rows(const Rows& from, bool is_bf16, int64_t b, const Stretch& at, const Block& block,
                      float* tile) {
  const int64_t offset = b * from.batch_stride + block.channel * from.channel_stride;
  if (is_bf16)
    load_tile((const bf16*)from.data + offset, from.channel_stride, from.time_stride, block.lanes, at, tile,
              W, W);
  else
    load_tile((const float*)from.data + offset, from.channel_stride, from.time_stride, block.lanes, at, tile,
              W, W);
}

inline void store_rows(const Rows& to, bool is_bf16, int64_t b, const Stretch& at, const Block& block,
                       const float* tile) {
  const int64_t offset = b * to.batch_stride + block.channel * to.channel_stride;
  if (is_bf16)
    store_tile((bf16*)to.data + offset, to.channel_stride, to.time_stride, block.lanes, at, tile);
  else
    store_tile((float*)to.data + offset, to.channel_stride, to.time_stride, block.lanes, at, tile);
}

// B or C for one of the scan's groups, (T, N) float32 in the order of the recurrence.
inline void pack_projection(const Projection& from, const Scan& scan, int64_t b, int64_t group,
                            const Stretch& at, float* tile) {
  const int64_t offset = b * from.batch_stride + group / from.share * from.group_stride;
  for (int64_t n = 0; n < scan.state; n += W) {
    const int lanes = scan.state - n < W ? (int)(scan.state - n) : W;
    const int64_t here = offset + n * from.state_stride;
    if (scan.bf16)
      load_tile((const bf16*)from.data + here, from.state_stride, from.time_stride, lanes, at, tile + n,
                scan.state, lanes);
    else
      load_tile((const float*)from.data + here, from.state_stride, from.time_stride, lanes, at, tile + n,
                scan.state, lanes);
  }
}

struct ScanScratch {
  float *decay, *state, *constant_B, *constant_C;  // (blocks, N, W) each
  float *B, *C;                                    // (T, N)
  float *delta, *delta_u, *u, *z, *y;              // (T, W)

  static int64_t floats(const Scan& scan, int64_t blocks) {
    return 4 * blocks * scan.state * W + 5 * kTile * W + 2 * kTile * scan.state;
  }

  ScanScratch(const Scan& scan, int64_t blocks, float* at) {
    auto take = [&at](int64_t floats, auto&... each) { ((each = at, at += floats), ...); };
    take(blocks * scan.state * W, decay, state, constant_B, constant_C);
    take(kTile * W, delta, delta_u, u, z, y);
    take(kTile * scan.state, B, C);
  }
};

// One block's rows of the tile: delta', delta' u, u and z.
inline void load_inputs(const Scan& scan, int64_t b, const Stretch& at, const Block& block,
                        const ScanScratch& tile) {
  load_rows(scan.u, scan.bf16, b, at, block, tile.u);
  load_rows(scan.delta, scan.bf16, b, at, block, tile.delta);
  if (scan.z.data) load_rows(scan.z, scan.bf16, b, at, block, tile.z);
  const vf bias = scan.bias ? load(scan.bias + block.channel, block.lanes) : vf{};
  for (int t = 0; t < at.steps; ++t) {
    vf delta = load(tile.delta + t * W) + bias;
    if (scan.softplus) delta = softplus(delta);
    store(tile.delta_u + t * W, delta * load(tile.u + t * W));
    store(tile.delta + t * W, at_most(at_least(delta, -kFinite), kFinite));
  }
}

inline void store_output(const Scan& scan, int64_t b, const Stretch& at, const Block& block,
                         const ScanScratch& tile) {
  const vf skip = scan.D ? load(scan.D + block.channel, block.lanes) : vf{};
  for (int t = 0; t < at.steps; ++t) {
    vf y = load(tile.y + t * W);
    if (scan.D) y += skip * load(tile.u + t * W);
    if (scan.z.data) y *= silu(load(tile.z + t * W));
    store(tile.y + t * W, y);
  }
  store_rows(scan.out, scan.bf16, b, at, block, tile.y);
}

template <bool constant_B, bool constant_C>
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
    const Stretch at = stretch_of(scan, step, steps);
    int64_t packed_group = -1;
    for (int64_t i = 0; i < end - begin; ++i) {
      const Block block = block_at(begin + i, scan.dim, scan.groups);
      if (block.group != packed_group) {
        if (!constant_B) pack_projection(scan.B, scan, b, block.group, at, tile.B);
        if (!constant_C) pack_projection(scan.C, scan, b, block.group, at, tile.C);
        packed_group = block.group;
      }
      float* state = tile.state + i * size;
      if (scan.states && step % kChunk == 0) {
        const int64_t chunk = b * chunks_of(scan.length) + step / kChunk;
        unpack_rows(state, N, block.lanes, scan.states + (chunk * scan.dim + block.channel) * N);
      }
      load_inputs(scan, b, at, block, tile);
      advance_all<Accuracy::full, constant_B, constant_C>(
          {steps, tile.delta, tile.delta_u}, N, tile.decay + i * size,
          {constant_B ? tile.constant_B + i * size : tile.B, N},
          {constant_C ? tile.constant_C + i * size : tile.C, N}, state, tile.y);
      store_output(scan, b, at, block, tile);
    }
  }
  for (int64_t i = 0; i < end - begin; ++i) {
    const Block block = block_at(begin + i, scan.dim, scan.groups);
    unpack_rows(tile.state + i * size, N, block.lanes, scan.last + (b * scan.dim + block.channel) * N);
  }
}

int64_t scan_scratch(const Scan& scan, int64_t blocks) { return ScanScratch::floats(scan, blocks); }

void scan_forward(const Scan& scan, int64_t b, int64_t begin, int64_t end, float* scratch) {
  if (scan.B.constant && scan.C.constant) return scan_forward_task<true, true>(scan, b, begin, end, scratch);
  if (scan.B.constant) return scan_forward_task<true, false>(scan, b, begin, end, scratch);
  if (scan.C.constant) return scan_forward_task<false, true>(scan, b, begin, end, scratch);
  scan_forward_task<false, false>(scan, b, begin, end, scratch);
}

}  // namespace
