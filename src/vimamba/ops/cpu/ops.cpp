// The operators vimamba_cpu.*: from tensors to kernels.h, and how the work divides over PyTorch's threads. On
// the libtorch stable ABI: one binary serves every Python and every PyTorch from 2.11. Python allocates all
// outputs; vimamba/ops/cpu/__init__.py is the only caller and has checked shapes, types and strides.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace {

using namespace vimamba;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

enum InstructionSet : int64_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

bool runs_here(int64_t set) {
  if (set == kPortable) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (set == kAvx2) return avx2;
  if (set == kAvx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return false;
}

const Kernels* table(int64_t set) {
#if defined(__x86_64__)
  if (set == kAvx512) return &kernels_avx512();
  if (set == kAvx2) return &kernels_avx2();
#endif
  return &kernels_portable();
}

int64_t best_set() { return runs_here(kAvx512) ? kAvx512 : runs_here(kAvx2) ? kAvx2 : kPortable; }

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

template <class T = float>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

float* data(const Maybe& tensor) { return tensor ? data(*tensor) : nullptr; }

bool is_bf16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

// (B, D, L), channels contiguous.
Rows rows(const Maybe& tensor_BDL) {
  if (!tensor_BDL) return {nullptr, 0, 0};
  return {tensor_BDL->data_ptr(), tensor_BDL->stride(0), tensor_BDL->stride(2)};
}

Projection projection(const Tensor& tensor) {
  if (tensor.dim() == 2) return {tensor.data_ptr(), 0, 0, 0, 0, true};
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3), false};
}

int64_t groups(const Tensor& B, const Tensor& C) {
  return B.dim() == 4 ? B.size(1) : C.dim() == 4 ? C.size(1) : 1;
}

Scan scan_of(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
             const Maybe& D, const Maybe& z, const Maybe& bias, bool softplus, bool reverse) {
  Scan scan = {};
  scan.batch = u.size(0), scan.dim = u.size(1), scan.length = u.size(2), scan.state = A.size(1);
  scan.groups = groups(B, C);
  scan.bf16 = is_bf16(u), scan.softplus = softplus, scan.reverse = reverse;
  scan.u = rows(u), scan.delta = rows(delta), scan.z = rows(z);
  scan.B = projection(B), scan.C = projection(C);
  scan.A = data(A), scan.D = data(D), scan.bias = data(bias);
  return scan;
}

void scan_forward(const Tensor u, const Tensor delta, const Tensor A, const Tensor B, const Tensor C,
                  const Maybe D, const Maybe z, const Maybe bias, bool softplus, bool reverse, Tensor out,
                  Tensor last, Maybe states) {
  const Kernels& k = kernels();
  Scan scan = scan_of(u, delta, A, B, C, D, z, bias, softplus, reverse);
  scan.out = rows(out), scan.last = data(last), scan.states = data(states);
  const int64_t blocks = blocks_of(scan.dim, scan.groups, k.lanes);
  const int64_t parts = parts_of_each(scan.batch, blocks);
  for_each_task(scan.batch * parts, [&](int64_t task) {
    const int64_t part = task % parts, begin = part * blocks / parts, end = (part + 1) * blocks / parts;
    k.scan_forward(scan, task / parts, begin, end, scratch<0>(k.scan_scratch(scan, end - begin)));
  });
}

// For benchmarks/: every thread runs the innermost loop `tiles` times; returns the state updates done by all.
int64_t inner_loop(int64_t tiles) {
  const int64_t parts = threads();
  int64_t updates = 0;
  for_each_task(parts, [&](int64_t part) {
    const int64_t done = kernels().inner_loop(tiles);
    if (part == 0) updates = parts * done;
  });
  return updates;
}

// How many parts of dB and dC scan_backward fills.
int64_t scan_backward_parts(int64_t batch, int64_t dim, int64_t groups) {
  return parts_of_each(batch, blocks_of(dim, groups, kernels().lanes));
}

void scan_backward(const Tensor dout, const Maybe dlast, const Tensor u, const Tensor delta, const Tensor A,
                   const Tensor B, const Tensor C, const Maybe D, const Maybe z, const Maybe bias,
                   const Tensor states, bool softplus, bool reverse, int64_t parts, Tensor du, Tensor ddelta,
                   Tensor dA, Tensor dB, Tensor dC, Maybe dD, Maybe dz, Maybe dbias) {
  const Kernels& k = kernels();
  Scan scan = scan_of(u, delta, A, B, C, D, z, bias, softplus, reverse);
  scan.states = data(states);
  const ScanGradients grad = {rows(dout), rows(du), rows(ddelta), rows(dz), data(dlast),
                              data(dA),   data(dD), data(dbias),  data(dB), data(dC)};
  const int64_t blocks = blocks_of(scan.dim, scan.groups, k.lanes);
  for_each_task(scan.batch * parts, [&](int64_t task) {
    const int64_t part = task % parts, begin = part * blocks / parts, end = (part + 1) * blocks / parts;
    k.scan_backward(scan, grad, task / parts, part, begin, end,
                    scratch<0>(k.scan_backward_scratch(scan, end - begin)));
  });
}

Conv conv_of(const Tensor& x, const Tensor& y, const Tensor& weight, const Maybe& bias, bool silu,
             bool reverse) {
  STD_TORCH_CHECK(weight.size(1) <= kMaxWidth, "the CPU kernels take convolutions of width 1 to ", kMaxWidth,
                  ", got ", weight.size(1));
  return {x.size(0), x.size(1), x.size(2), weight.size(1), is_bf16(x), silu,
          reverse,   rows(x),   rows(y),   data(weight),   data(bias)};
}

void conv_forward(const Tensor x, const Tensor weight, const Maybe bias, bool silu, bool reverse, Tensor y) {
  const Kernels& k = kernels();
  const Conv conv = conv_of(x, y, weight, bias, silu, reverse);
  const int64_t parts = threads();
  for_each_task(parts, [&](int64_t part) {
    for_each_stretch(conv.batch, conv.length, part, parts,
                     [&](int64_t b, int64_t begin, int64_t end) { k.conv_forward(conv, b, begin, end); });
  });
}

// dweight is (S, D, W) and dbias (S, D), zero, for S parts of the work.
void conv_backward(const Tensor dy, const Tensor x, const Tensor weight, const Maybe bias, bool silu,
                   bool reverse, Tensor dx, Tensor dweight, Maybe dbias) {
  const Kernels& k = kernels();
  const Conv conv = conv_of(x, dy, weight, bias, silu, reverse);
  const ConvGradients grad = {rows(dx), data(dweight), data(dbias)};
  const int64_t parts = dweight.size(0);
  for_each_task(parts, [&](int64_t part) {
    float* memory = scratch<0>(k.conv_backward_scratch(conv));
    for_each_stretch(conv.batch, conv.length, part, parts, [&](int64_t b, int64_t begin, int64_t end) {
      k.conv_backward(conv, grad, b, begin, end, part, memory);
    });
  });
}

// All activations (..., E) contiguous.
void norm_forward(const Tensor x, const Maybe residual, const Tensor weight, double eps, Tensor normed,
                  Tensor sum, Tensor rstd) {
  const Kernels& k = kernels();
  const int64_t dim = weight.size(0);
  const Norm norm = {x.numel() / dim,
                     dim,
                     is_bf16(x),
                     residual && is_bf16(*residual),
                     is_bf16(normed),
                     x.data_ptr(),
                     residual ? residual->data_ptr() : nullptr,
                     data(weight),
                     static_cast<float>(eps),
                     normed.data_ptr(),
                     data(sum),
                     data(rstd)};
  const int64_t parts = threads();
  for_each_task(parts, [&](int64_t part) {
    for_each_stretch(1, norm.rows, part, parts,
                     [&](int64_t, int64_t begin, int64_t end) { k.norm_forward(norm, begin, end); });
  });
}

// dweight is (S, E), zero, for S parts of the rows.
void norm_backward(const Tensor dnormed, const Maybe dresidual, const Tensor sum, const Tensor weight,
                   const Tensor rstd, Tensor dsum, Tensor dweight) {
  const Kernels& k = kernels();
  const int64_t dim = weight.size(0);
  const NormGradients grad = {sum.numel() / dim, dim,       is_bf16(dnormed), dnormed.data_ptr(),
                              data(dresidual),   data(sum), data(weight),     data(rstd),
                              data(dsum)};
  const int64_t parts = dweight.size(0);
  for_each_task(parts, [&](int64_t part) {
    for_each_stretch(1, grad.rows, part, parts, [&](int64_t, int64_t begin, int64_t end) {
      k.norm_backward(grad, begin, end, data(dweight) + part * grad.dim);
    });
  });
}

constexpr int64_t kCachedFloats = 1 << 17;  // half a megabyte of a core's second-level cache

// x (..., K), weight (N, K), bias (N,) and out (..., N), all contiguous.
void linear(const Tensor x, const Tensor weight, const Maybe bias, Tensor out) {
  const Kernels& k = kernels();
  const int64_t N = weight.size(0), K = weight.size(1);
  const int64_t rows = x.numel() / K, panels = k.linear_panels(N);
  const int64_t across = std::gcd(panels, threads()), along = threads() / across;
  for_each_task(across * along, [&](int64_t task) {
    const int64_t first = task % across * panels / across, last = (task % across + 1) * panels / across;
    const int64_t part = task / across, begin = part * rows / along, end = (part + 1) * rows / along;
    // Few rows stay in cache while one panel after the other is packed; many pass all panels, packed before.
    const int64_t group = (end - begin) * K <= kCachedFloats ? 1 : last - first;
    float* packed = scratch<0>(k.linear_packed(group, K));
    const Product product = {data(x), packed, data(bias), data(out), K, N, N, K};
    for (int64_t panel = first; panel < last; panel += group) {
      k.linear_pack(data(weight), N, K, panel, panel + group, packed);
      k.linear_multiply(product, begin, end, panel, panel + group);
    }
  });
}

// One call of the fused mixer: the directions, their packed weights, and their states between phases.
struct MixerCall {
  const Kernels& k;
  Mixer mixer;
  std::vector<Direction> directions;
  int64_t blocks, packed_floats, state_floats;
  float *packed, *state;

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

// weights: seven tensors a direction, in the order of vimamba.ops.mixer.Direction; flags: 1 for conv_reverse
// plus 2 for scan_reverse; gates: (B, L or 1, directions) or none, the last axis contiguous; states:
// (directions, B, K, D, N) or none.
void mixer_forward(const Tensor xz, std::vector<Tensor> weights, std::vector<int64_t> flags, double scale,
                   Maybe gates, Tensor out, Maybe states) {
  const int64_t count = flags.size(), dim = out.size(2);
  MixerCall call = {.k = kernels()};
  const int64_t element = is_bf16(xz) ? 2 : 4;
  const Rows x = {xz.data_ptr(), xz.stride(0), xz.stride(1)};
  const Rows z = {static_cast<char*>(xz.data_ptr()) + dim * element, xz.stride(0), xz.stride(1)};
  call.mixer = {.batch = out.size(0),
                .dim = dim,
                .length = out.size(1),
                .state = weights[5].size(1),
                .dt_rank = weights[3].size(1),
                .width = weights[0].numel() / dim,
                .bf16 = is_bf16(xz),
                .scale = static_cast<float>(scale),
                .x = x,
                .z = z,
                .out = {out.data_ptr(), out.stride(0), out.stride(1)},
                .gates = data(gates),
                .gate_batch_stride = gates ? gates->stride(0) : 0,
                .gate_time_stride = gates && gates->size(1) > 1 ? gates->stride(1) : 0};
  for (int64_t d = 0; d < count; ++d) {
    const Tensor* w = &weights[7 * d];
    call.directions.push_back({d, data(w[0]), data(w[1]), data(w[2]), data(w[3]), data(w[4]), data(w[5]),
                               data(w[6]), (flags[d] & 1) != 0, (flags[d] & 2) != 0,
                               states ? data(*states) + d * states->stride(0) : nullptr});
  }
  const Mixer& m = call.mixer;
  call.blocks = blocks_of(dim, 1, call.k.lanes);
  call.packed_floats = call.k.mixer_packed(m), call.state_floats = call.blocks * m.state * call.k.lanes;
  const bool opposite = count == 2 && call.directions[0].scan_reverse != call.directions[1].scan_reverse;
  const bool by_batch = m.batch % threads() == 0 || m.batch >= 4 * threads();
  const bool even = 2 * m.batch % threads() == 0 && !call.skips_any();
  const bool by_halves = !by_batch && opposite && even && m.length > 1;
  const int64_t projected = by_batch || by_halves ? 0 : m.batch * count * m.length * call.k.mixer_columns(m);
  call.packed = scratch<1>(count * call.packed_floats + m.batch * count * call.state_floats + projected);
  call.state = call.packed + count * call.packed_floats;
  std::memset(call.state, 0, m.batch * count * call.state_floats * sizeof(float));
  for (int64_t b = 0; b < m.batch; ++b)
    if (call.skips_all(b, 0, count))
      std::memset(static_cast<char*>(out.data_ptr()) + b * out.stride(0) * element, 0,
                  m.length * dim * element);
  for (int64_t d = 0; d < count; ++d) call.k.mixer_pack(m, call.directions[d], call.packed_of(d));
  if (by_batch)
    mix_by_batch(call);
  else if (by_halves)
    mix_by_halves(call);
  else
    mix_by_channels(call, call.state + m.batch * count * call.state_floats);
}

}  // namespace

STABLE_TORCH_LIBRARY(vimamba_cpu, m) {
  m.def("instruction_set(int wanted) -> int");
  m.def("inner_loop(int tiles) -> int");
  m.def("scan_backward_parts(int batch, int dim, int groups) -> int");
  m.def(
      "scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? "
      "bias, bool softplus, "
      "bool reverse, Tensor(a!) out, Tensor(b!) last, Tensor(c!)? states) -> ()");
  m.def(
      "scan_backward(Tensor dout, Tensor? dlast, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, "
      "Tensor? bias, Tensor states, bool softplus, bool reverse, int parts, Tensor(a!) du, Tensor(b!) "
      "ddelta, Tensor(c!) dA, "
      "Tensor(d!) dB, Tensor(e!) dC, Tensor(f!)? dD, Tensor(g!)? dz, Tensor(h!)? dbias) -> ()");
  m.def("conv_forward(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, Tensor(a!) y) -> ()");
  m.def(
      "conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, Tensor(a!) "
      "dx, "
      "Tensor(b!) dweight, Tensor(c!)? dbias) -> ()");
  m.def(
      "norm_forward(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor(a!) normed, Tensor(b!) sum, "
      "Tensor(c!) rstd) "
      "-> ()");
  m.def(
      "norm_backward(Tensor dnormed, Tensor? dresidual, Tensor sum, Tensor weight, Tensor rstd, Tensor(a!) "
      "dsum, "
      "Tensor(b!) dweight) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def(
      "mixer_forward(Tensor xz, Tensor[] weights, int[] flags, float scale, Tensor? gates, Tensor(a!) out, "
      "Tensor(b!)? states) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vimamba_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("inner_loop", TORCH_BOX(&inner_loop));
  m.impl("scan_backward_parts", TORCH_BOX(&scan_backward_parts));
}

STABLE_TORCH_LIBRARY_IMPL(vimamba_cpu, CPU, m) {
  m.impl("scan_forward", TORCH_BOX(&scan_forward));
  m.impl("scan_backward", TORCH_BOX(&scan_backward));
  m.impl("conv_forward", TORCH_BOX(&conv_forward));
  m.impl("conv_backward", TORCH_BOX(&conv_backward));
  m.impl("norm_forward", TORCH_BOX(&norm_forward));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("mixer_forward", TORCH_BOX(&mixer_forward));
}
