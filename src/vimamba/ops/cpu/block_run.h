// How a run of blocks divides over threads: stretches of rows from one mixer to the next, and the mixers.
//
// Between two mixers a row meets no other: out_proj, the residual sum, the norm and in_proj go tile by tile
// through the cache, so that a block reads the mixed tokens and writes xz and the stream once. The weights
// come packed: before, for any number of calls, or a block's just before it runs.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "mixer_run.h"

namespace vimamba {

constexpr int64_t kRowsTogether = 64;  // rows that go from one mixer to the next together

struct PackedLinear {
  float *panels, *bias, *scales;  // scales of 8-bit integers
  int64_t N, K;
};

struct PackedBlock {
  PackedLinear in_proj, out_proj;
  float *norm, *directions;
};

// Sizes of every block of a run.
struct BlockSizes {
  int64_t dim, inner, state, dt_rank, width, directions;
  Element element;  // of the products
  bool bf16;        // of the activations
  Mixer mixer() const {
    Mixer m = {};
    m.dim = inner, m.state = state, m.dt_rank = dt_rank, m.width = width, m.bf16 = bf16;
    return m;
  }
};

// A block's weights in one stretch of memory, every part on a cache line.
struct BlockMemory {
  const Kernels& k;
  const BlockSizes& sizes;
  int64_t floats = 0;

  float* take(float* memory, int64_t count) {
    float* part = memory ? memory + floats : nullptr;
    floats += (count + 15) / 16 * 16;
    return part;
  }
  PackedLinear take_linear(float* memory, int64_t N, int64_t K) {
    float* panels = take(memory, k.linear_packed(k.linear_panels(N), words_of(sizes.element, K)));
    float* bias = take(memory, N);
    return {panels, bias, take(memory, sizes.element == Element::int8 ? N : 0), N, K};
  }
  PackedBlock take_block(float* memory) {
    const PackedLinear in_proj = take_linear(memory, 2 * sizes.inner, sizes.dim);
    const PackedLinear out_proj = take_linear(memory, sizes.dim, sizes.inner);
    float* norm = take(memory, sizes.dim);
    return {in_proj, out_proj, norm, take(memory, sizes.directions * k.mixer_packed(sizes.mixer()))};
  }
};

int64_t block_floats(const Kernels& k, const BlockSizes& sizes) {
  BlockMemory memory = {k, sizes};
  memory.take_block(nullptr);
  return memory.floats;
}

// One call: the stream, (B L, E) rows, and memory for what lies between.
struct BlockRun {
  const Kernels& k;
  const BlockSizes& sizes;
  int64_t batch, length;
  float scale, eps;
  const float* stream;  // that comes
  float* total;         // that goes: after each block in turn
  void *xz, *y;         // (B L, 2 D), (B L, D)
  size_t blocks;
  std::function<PackedBlock(size_t)> block;  // asked for in order; two that follow each other hold together
  std::vector<Direction> directions;  // of all blocks, one after the other; only which way round they run

  int64_t bytes() const { return sizes.bf16 ? 2 : 4; }
};

// A thread's memory for kRowsTogether rows.
struct RowsScratch {
  float *out, *normed, *rstd, *wide, *scales;
  int8_t* integers;
  int32_t* sums;

  static int64_t widest(const BlockSizes& s) { return (s.dim > s.inner ? s.dim : s.inner) + 16; }
  static int64_t floats(const BlockSizes& s) {
    return kRowsTogether * (2 * s.dim + 3 + widest(s) + widest(s) / 4 + 1);
  }
  RowsScratch(const BlockSizes& s, float* at) {
    out = at, normed = out + kRowsTogether * s.dim, rstd = normed + kRowsTogether * s.dim,
    scales = rstd + kRowsTogether, sums = reinterpret_cast<int32_t*>(scales + kRowsTogether),
    wide = scales + 2 * kRowsTogether, integers = reinterpret_cast<int8_t*>(wide + kRowsTogether * widest(s));
  }
};

void widen(const void* bfloat16, int64_t count, float* to) {
  const uint16_t* from = static_cast<const uint16_t*>(bfloat16);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}

// `count` contiguous rows of x through a linear layer, to contiguous rows.
void multiply(const BlockRun& run, const PackedLinear& linear, const void* x, bool x_bf16, int64_t count,
              void* out, bool out_bf16, const RowsScratch& s) {
  const Element element = run.sizes.element;
  Product product = {element, out_bf16, x, linear.panels, linear.bias, out, 0, linear.N, linear.N, linear.K};
  product.x_stride = words_of(element, linear.K);
  if (x_bf16 && element != Element::bfloat16) {
    widen(x, count * linear.K, s.wide);
    product.x = s.wide;
  }
  if (element == Element::int8) {
    run.k.linear_quantize(static_cast<const float*>(product.x), count, linear.K, s.integers, s.scales,
                          s.sums);
    product.x = s.integers, product.x_scales = s.scales, product.x_sums = s.sums,
    product.scales = linear.scales;
  }
  run.k.linear_multiply(product, 0, count, 0, run.k.linear_panels(linear.N));
}

// Rows [begin, begin + count) from the mixer of `before` (or the run's input) to that of `after` (or its
// output).
void pass_rows(const BlockRun& run, const PackedBlock* before, const PackedBlock* after, int64_t begin,
               int64_t count, const RowsScratch& s) {
  const int64_t dim = run.sizes.dim, inner = run.sizes.inner, bytes = run.bytes();
  const auto at = [bytes](const void* rows, int64_t elements) {
    return static_cast<char*>(const_cast<void*>(rows)) + elements * bytes;
  };
  float* total = run.total + begin * dim;
  if (before)
    multiply(run, before->out_proj, at(run.y, begin * inner), run.sizes.bf16, count, s.out, false, s);
  if (!after) {
    for (int64_t i = 0; i < count * dim; ++i) total[i] += s.out[i];
    return;
  }
  Norm norm = {};
  norm.rows = count, norm.dim = dim, norm.weight = after->norm, norm.eps = run.eps;
  norm.x = before ? s.out : run.stream + begin * dim;
  norm.residual = before ? total : nullptr;
  norm.normed_bf16 = run.sizes.element == Element::bfloat16;
  norm.normed = s.normed, norm.sum = total, norm.rstd = s.rstd;
  run.k.norm_forward(norm, 0, count);
  multiply(run, after->in_proj, s.normed, norm.normed_bf16, count, at(run.xz, 2 * begin * inner),
           run.sizes.bf16, s);
}

void pass(const BlockRun& run, const PackedBlock* before, const PackedBlock* after) {
  const int64_t rows = run.batch * run.length, parts = std::min(threads(), (rows + 7) / 8);
  for_each_task(parts, [&](int64_t part) {
    const RowsScratch s(run.sizes, scratch<0>(RowsScratch::floats(run.sizes)));
    const int64_t first = part * rows / parts, count = (part + 1) * rows / parts - first;
    const int64_t tiles = (count + kRowsTogether - 1) / kRowsTogether;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = tile * count / tiles, end = (tile + 1) * count / tiles;
      pass_rows(run, before, after, first + begin, end - begin, s);
    }
  });
}

void mix(const BlockRun& run, size_t index, const PackedBlock& block) {
  const BlockSizes& sizes = run.sizes;
  const int64_t inner = sizes.inner, length = run.length;
  MixerCall call = {.k = run.k, .mixer = sizes.mixer()};
  Mixer& m = call.mixer;
  m.batch = run.batch, m.length = length, m.scale = run.scale;
  m.x = {run.xz, length * 2 * inner, 2 * inner};
  m.z = {static_cast<char*>(run.xz) + inner * run.bytes(), length * 2 * inner, 2 * inner};
  m.out = {run.y, length * inner, inner};
  const auto first = run.directions.begin() + index * sizes.directions;
  call.directions.assign(first, first + sizes.directions);
  call.packed = block.directions;
  mix(call);
}

void run_blocks(const BlockRun& run) {
  PackedBlock before = {};
  for (size_t i = 0; i < run.blocks; ++i) {
    const PackedBlock block = run.block(i);
    pass(run, i ? &before : nullptr, &block);
    mix(run, i, block);
    before = block;
  }
  pass(run, &before, nullptr);
}

}  // namespace vimamba
