// One call of a run of blocks: from tensors to plain pointers.
#pragma once

#include <cstdint>
#include <vector>

#include "block_run.h"
#include "mixer_call.h"
#include "tensors.h"

namespace vimamba {

// As _block_tensors of __init__.py has them: norm, in_proj, its bias, out_proj, its bias, and the scales of
// both where the weights are 8-bit integers, in front of a block's directions. What there is not is an empty
// tensor.
constexpr int64_t kBlockWeights = 7;

// The weights of one block of a list, float32 and contiguous but for 8-bit integers.
struct BlockWeights {
  std::vector<Tensor> all;

  BlockWeights(const std::vector<Tensor>& weights, int64_t index, int64_t directions) {
    const int64_t count = kBlockWeights + kWeights * directions;
    for (int64_t i = index * count; i < (index + 1) * count; ++i) {
      const Tensor weight = as_contiguous(weights[i]);
      const bool as_is =
          weight.scalar_type() == ScalarType::Float || weight.scalar_type() == ScalarType::Char;
      all.push_back(as_is ? weight : torch::stable::to(weight, ScalarType::Float));
    }
  }
  const Tensor& operator[](int64_t i) const { return all[i]; }
};

int64_t blocks_of(const std::vector<Tensor>& weights, int64_t directions) {
  const int64_t each = kBlockWeights + kWeights * directions;
  STD_TORCH_CHECK(directions > 0 && !weights.empty() && weights.size() % each == 0,
                  "vimamba_cpu: a block needs ", kBlockWeights, " weights and ", kWeights,
                  " for each direction");
  return weights.size() / each;
}

// From the weights of the first of a run's blocks.
BlockSizes block_sizes(const std::vector<Tensor>& w, int64_t directions, bool bf16) {
  STD_TORCH_CHECK(static_cast<int64_t>(w.size()) >= kBlockWeights + kWeights * directions && directions > 0,
                  "vimamba_cpu: a block lacks weights");
  const Tensor &in_proj = w[1], &dt_proj = w[kBlockWeights + 3], &A_log = w[kBlockWeights + 5];
  STD_TORCH_CHECK(in_proj.dim() == 2 && in_proj.size(0) > 1 && dt_proj.dim() == 2 && A_log.dim() == 2,
                  "vimamba_cpu: in_proj is not (2 D, E), dt_proj not (D, R) or A_log not (D, N)");
  const int64_t dim = in_proj.size(1), inner = in_proj.size(0) / 2;
  // 8-bit integers where the weights are; bfloat16 where this machine has instructions for it.
  const bool pairs = bf16 && kernels().has_bf16 && dim % 2 == 0 && inner % 2 == 0;
  const Element element = in_proj.scalar_type() == ScalarType::Char ? Element::int8
                          : pairs                                   ? Element::bfloat16
                                                                    : Element::float32;
  return {dim,        inner,   A_log.size(1), dt_proj.size(1), w[kBlockWeights].numel() / inner,
          directions, element, bf16};
}

// Packs one linear layer where PackedLinear's parts point to; a bias that there is not is zero.
void pack_linear(const Kernels& k, Element element, const PackedLinear& to, const Tensor& weight,
                 const Tensor& bias, const Tensor& scales) {
  const int64_t N = to.N, K = to.K, panels = k.linear_panels(N);
  const bool integers = element == Element::int8;
  STD_TORCH_CHECK(has_sizes(weight, {N, K}) && (bias.numel() == 0 || has_sizes(bias, {N})) &&
                      weight.scalar_type() == (integers ? ScalarType::Char : ScalarType::Float) &&
                      (!integers || has_sizes(scales, {N})),
                  "vimamba_cpu: a projection's weight is not of the expected shape and type");
  if (integers) {
    k.linear_pack_int8(data<int8_t>(weight), N, K, 0, panels, to.panels);
    std::memcpy(to.scales, data(scales), N * sizeof(float));
  } else {
    (element == Element::bfloat16 ? k.linear_pack_bfloat16 : k.linear_pack)(data(weight), N, K, 0, panels,
                                                                            to.panels);
  }
  for (int64_t n = 0; n < N; ++n) to.bias[n] = bias.numel() ? data(bias)[n] : 0.0f;
}

// Numbers that tell the weights of each block, and what they would be packed for: (blocks, kFingerprint).
Tensor block_fingerprints(std::vector<Tensor> weights, int64_t directions, bool bf16) {
  const Kernels& k = kernels();
  const int64_t count = blocks_of(weights, directions), each = weights.size() / count;
  const Tensor numbers = torch::stable::new_zeros(weights[0], Sizes{count, kFingerprint}, ScalarType::Long);
  for (Tensor& weight : weights) weight = as_contiguous(weight);
  for_each_task(count, [&](int64_t block) {
    uint64_t* sums = data<uint64_t>(numbers) + block * kFingerprint;
    sums[0] = active_set(), sums[1] = bf16;
    for (int64_t i = block * each; i < (block + 1) * each; ++i) {
      const Tensor& weight = weights[i];
      const int64_t bytes = weight.numel() * weight.element_size();
      sums[2] += static_cast<int64_t>(weight.scalar_type()), sums[3] += bytes;
      k.fingerprint(weight.data_ptr(), bytes, sums);
    }
  });
  return numbers;
}

// Packs one block of a list into `to`, of block_floats.
PackedBlock pack_block(const Kernels& k, const BlockSizes& sizes, const std::vector<Tensor>& weights,
                       int64_t block, float* to) {
  const BlockWeights w(weights, block, sizes.directions);
  BlockMemory memory = {k, sizes};
  const PackedBlock parts = memory.take_block(to);
  pack_linear(k, sizes.element, parts.in_proj, w[1], w[2], w[5]);
  pack_linear(k, sizes.element, parts.out_proj, w[3], w[4], w[6]);
  check_floats("norm", w[0], {sizes.dim});
  std::memcpy(parts.norm, data(w[0]), sizes.dim * sizeof(float));
  const Mixer m = sizes.mixer();
  for (int64_t d = 0; d < sizes.directions; ++d) {
    const Tensor* of = &w[kBlockWeights + kWeights * d];
    check_direction(of, m);
    const Direction direction = {d,           data(of[0]), data(of[1]), data(of[2]), data(of[3]), data(of[4]),
                                 data(of[5]), data(of[6]), false,       false,       nullptr};
    k.mixer_pack(m, direction, parts.directions + d * k.mixer_packed(m));
  }
  return parts;
}

// The weights of each block as block_forward takes them.
std::vector<Tensor> block_pack(std::vector<Tensor> weights, int64_t directions, bool bf16) {
  const Kernels& k = kernels();
  const BlockSizes sizes = block_sizes(weights, directions, bf16);
  std::vector<Tensor> packed;
  for (int64_t block = 0; block < blocks_of(weights, directions); ++block) {
    packed.push_back(new_floats(weights[0], {block_floats(k, sizes)}));
    pack_block(k, sizes, weights, block, data(packed.back()));
  }
  return packed;
}

// The stream (B, L, E), float32, after blocks of equal sizes: those of all `weights`; or, if they are given
// packed, those, and the weights of the first say their sizes.
Tensor block_forward(const Tensor given_stream, std::vector<Tensor> weights, std::vector<Tensor> packed,
                     std::vector<int64_t> reverse, int64_t directions, double scale, double eps, bool bf16) {
  const Kernels& k = kernels();
  const BlockSizes sizes = block_sizes(weights, directions, bf16);
  const int64_t blocks = packed.empty() ? blocks_of(weights, directions) : packed.size();
  STD_TORCH_CHECK(blocks * directions == static_cast<int64_t>(reverse.size()) && given_stream.dim() == 3,
                  "vimamba_cpu: blocks have unequal directions, or the stream is not (B, L, E)");
  const Tensor stream = as_contiguous(given_stream);
  const int64_t batch = stream.size(0), length = stream.size(1), floats = block_floats(k, sizes);
  check_floats("stream", stream, {batch, length, sizes.dim});
  for (const Tensor& block : packed) check_floats("packed", block, {floats});
  const ScalarType type = bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  const Tensor total = torch::stable::empty_like(stream);
  const Tensor xz = torch::stable::new_empty(stream, Sizes{batch, length, 2 * sizes.inner}, type);
  const Tensor y = torch::stable::new_empty(stream, Sizes{batch, length, sizes.inner}, type);
  if (total.numel() == 0) return total;
  const Tensor two = new_floats(stream, {packed.empty() ? 2 : 0, floats});
  BlockRun run = {.k = k,
                  .sizes = sizes,
                  .batch = batch,
                  .length = length,
                  .scale = static_cast<float>(scale),
                  .eps = static_cast<float>(eps),
                  .stream = data(stream),
                  .total = data(total),
                  .xz = xz.data_ptr(),
                  .y = y.data_ptr(),
                  .blocks = static_cast<size_t>(blocks)};
  run.block = [&](size_t i) {
    if (packed.empty()) return pack_block(k, sizes, weights, i, data(two) + i % 2 * floats);
    BlockMemory memory = {k, sizes};
    return memory.take_block(data(packed[i]));
  };
  for (size_t i = 0; i < reverse.size(); ++i) {
    Direction direction = {};
    direction.index = i % directions;
    direction.conv_reverse = reverse[i] & kConvReverse, direction.scan_reverse = reverse[i] & kScanReverse;
    run.directions.push_back(direction);
  }
  run_blocks(run);
  return total;
}

}  // namespace vimamba
