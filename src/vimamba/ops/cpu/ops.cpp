// The operators vimamba_cpu.*: from tensors to kernels.h, and how the work divides over PyTorch's threads. On
// the libtorch stable ABI: one binary serves every Python and every PyTorch from 2.11. Python allocates all
// outputs; vimamba/ops/cpu/__init__.py is the only caller and has checked shapes, types and strides.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "mixer_call.h"
#include "parallel.h"

namespace {

using namespace vimamba;

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

// What Python must know of kernels.h.
int64_t chunk() { return kChunk; }
int64_t max_width() { return kMaxWidth; }

template <class T = float>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

float* data(const Maybe& tensor) { return tensor ? data(*tensor) : nullptr; }

bool is_bf16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

// (B, D, L).
Rows rows(const Maybe& tensor_BDL) {
  if (!tensor_BDL) return {nullptr, 0, 0};
  const int64_t channel_stride = tensor_BDL->size(1) == 1 ? 1 : tensor_BDL->stride(1);
  return {tensor_BDL->data_ptr(), tensor_BDL->stride(0), tensor_BDL->stride(2), channel_stride};
}

int64_t groups(const Tensor& matrix) { return matrix.dim() == 4 ? matrix.size(1) : 1; }

Projection projection(const char* name, const Tensor& matrix, const Tensor& u, int64_t state,
                      int64_t groups_of_scan) {
  if (matrix.dim() == 2) {
    check_floats(name, matrix, {u.size(1), state});
    return {matrix.data_ptr(), 0, 0, 0, 0, true};
  }
  check_rows(name, matrix, {u.size(0), groups(matrix), state, u.size(2)}, u);
  return {matrix.data_ptr(),
          matrix.stride(0),
          matrix.stride(1),
          matrix.stride(2),
          matrix.stride(3),
          false,
          groups_of_scan / groups(matrix)};
}

// How many groups serve both B and C.
int64_t groups_of(const Tensor& B, const Tensor& C, int64_t dim) {
  const bool some = groups(B) > 0 && groups(C) > 0;
  const int64_t both = some ? std::lcm(groups(B), groups(C)) : 1;
  STD_TORCH_CHECK(some && dim > 0 && dim % both == 0,
                  "vimamba_cpu: the groups of B and C do not divide the channels");
  return both;
}

Scan scan_of(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
             const Maybe& D, const Maybe& z, const Maybe& bias, bool softplus, bool reverse) {
  STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2 && A.size(1) > 0,
                  "vimamba_cpu: u is not (B, D, L) or A not (D, N)");
  const int64_t batch = u.size(0), dim = u.size(1), length = u.size(2), state = A.size(1);
  check_rows("u", u, {batch, dim, length}, u);
  check_rows("delta", delta, {batch, dim, length}, u);
  check_rows("z", z, {batch, dim, length}, u);
  check_floats("A", A, {dim, state});
  check_floats("D", D, {dim});
  check_floats("delta_bias", bias, {dim});
  Scan scan = {};
  scan.batch = batch, scan.dim = dim, scan.length = length, scan.state = state;
  scan.groups = groups_of(B, C, dim);
  scan.bf16 = is_bf16(u), scan.softplus = softplus, scan.reverse = reverse;
  scan.u = rows(u), scan.delta = rows(delta), scan.z = rows(z);
  scan.B = projection("B", B, u, state, scan.groups), scan.C = projection("C", C, u, state, scan.groups);
  scan.A = data(A), scan.D = data(D), scan.bias = data(bias);
  return scan;
}

void check_states(const Maybe& states, const Scan& scan) {
  check_floats("states", states, {scan.batch, (scan.length + kChunk - 1) / kChunk, scan.dim, scan.state});
}

void scan_forward(const Tensor u, const Tensor delta, const Tensor A, const Tensor B, const Tensor C,
                  const Maybe D, const Maybe z, const Maybe bias, bool softplus, bool reverse, Tensor out,
                  Tensor last, Maybe states) {
  const Kernels& k = kernels();
  Scan scan = scan_of(u, delta, A, B, C, D, z, bias, softplus, reverse);
  check_rows("out", out, {scan.batch, scan.dim, scan.length}, u);
  check_floats("last", last, {scan.batch, scan.dim, scan.state});
  check_states(states, scan);
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
int64_t scan_backward_parts(const Tensor u, const Tensor B, const Tensor C) {
  return parts_of_each(u.size(0), blocks_of(u.size(1), groups_of(B, C, u.size(1)), kernels().lanes));
}

void check_projection_gradient(const char* name, const Tensor& gradient, const Tensor& matrix,
                               const Scan& scan, int64_t parts) {
  if (matrix.dim() == 2)
    check_floats(name, gradient, {scan.batch, scan.dim, scan.state});
  else
    check_floats(name, gradient, {parts, scan.batch, groups(matrix), scan.length, scan.state});
}

void scan_backward(const Tensor dout, const Maybe dlast, const Tensor u, const Tensor delta, const Tensor A,
                   const Tensor B, const Tensor C, const Maybe D, const Maybe z, const Maybe bias,
                   const Tensor states, bool softplus, bool reverse, int64_t parts, Tensor du, Tensor ddelta,
                   Tensor dA, Tensor dB, Tensor dC, Maybe dD, Maybe dz, Maybe dbias) {
  const Kernels& k = kernels();
  Scan scan = scan_of(u, delta, A, B, C, D, z, bias, softplus, reverse);
  check_states(states, scan);
  check_rows("dout", dout, {scan.batch, scan.dim, scan.length}, u);
  check_rows("du", du, {scan.batch, scan.dim, scan.length}, u);
  check_rows("ddelta", ddelta, {scan.batch, scan.dim, scan.length}, u);
  check_rows("dz", dz, {scan.batch, scan.dim, scan.length}, u);
  check_floats("dlast", dlast, {scan.batch, scan.dim, scan.state});
  check_floats("dA", dA, {scan.batch, scan.dim, scan.state});
  check_projection_gradient("dB", dB, B, scan, parts);
  check_projection_gradient("dC", dC, C, scan, parts);
  check_floats("dD", dD, {scan.batch, scan.dim});
  check_floats("ddelta_bias", dbias, {scan.batch, scan.dim});
  STD_TORCH_CHECK(parts > 0 && z.has_value() == dz.has_value(), "vimamba_cpu: scan_backward lacks an output");
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
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && weight.size(1) >= 1 && weight.size(1) <= kMaxWidth,
                  "vimamba_cpu: a convolution takes x (B, D, L) and a width of 1 to ", kMaxWidth);
  check_rows("x", x, {x.size(0), x.size(1), x.size(2)}, x);
  check_rows("y", y, {x.size(0), x.size(1), x.size(2)}, x);
  check_floats("weight", weight, {x.size(1), weight.size(1)});
  check_floats("bias", bias, {x.size(1)});
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
  const int64_t parts = dweight.size(0);
  check_rows("dx", dx, {conv.batch, conv.dim, conv.length}, x);
  check_floats("dweight", dweight, {parts, conv.dim, conv.width});
  check_floats("dbias", dbias, {parts, conv.dim});
  const ConvGradients grad = {rows(dx), data(dweight), data(dbias)};
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
  const int64_t dim = weight.dim() == 1 ? weight.size(0) : 0, count = rows_of("x", x, dim);
  check_floats("weight", weight, {dim});
  check_same_rows("residual", residual, count, dim);
  check_same_rows("normed", normed, count, dim);
  check_count("sum", sum, count * dim);
  check_count("rstd", rstd, count);
  const Norm norm = {count,
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
  const int64_t dim = weight.dim() == 1 ? weight.size(0) : 0, count = rows_of("dnormed", dnormed, dim);
  const int64_t parts = dweight.size(0);
  check_floats("weight", weight, {dim});
  if (dresidual) check_count("dresidual", *dresidual, count * dim);
  check_count("sum", sum, count * dim);
  check_count("rstd", rstd, count);
  check_count("dsum", dsum, count * dim);
  check_floats("dweight", dweight, {parts, dim});
  const NormGradients grad = {count,     dim,          is_bf16(dnormed), dnormed.data_ptr(), data(dresidual),
                              data(sum), data(weight), data(rstd),       data(dsum)};
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
  STD_TORCH_CHECK(weight.dim() == 2, "vimamba_cpu: weight is not (N, K)");
  const int64_t N = weight.size(0), K = weight.size(1), rows = rows_of("x", x, K),
                panels = k.linear_panels(N);
  check_count("x", x, rows * K);
  check_floats("weight", weight, {N, K});
  check_floats("bias", bias, {N});
  check_count("out", out, rows * N);
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

constexpr int64_t kWeights = 7;  // tensors a direction, in the order of vimamba.ops.mixer.Direction

void check_direction(const Tensor* w, const Mixer& m) {
  const int64_t projected = m.dt_rank + 2 * m.state;
  STD_TORCH_CHECK(w[0].dim() > 1, "vimamba_cpu: conv_weight is not (D, width)");
  check_count("conv_weight", w[0], m.dim * m.width);
  check_floats("conv_bias", w[1], {m.dim});
  check_floats("x_proj_weight", w[2], {projected, m.dim});
  check_floats("dt_proj_weight", w[3], {m.dim, m.dt_rank});
  check_floats("dt_bias", w[4], {m.dim});
  check_floats("A_log", w[5], {m.dim, m.state});
  check_floats("D", w[6], {m.dim});
}

// weights: kWeights tensors for each of `reverse`: 1 for a reversed convolution plus 2 for a reversed scan;
// gates: (B, L or 1, directions) or none, the last axis contiguous; states: (directions, B, K, D, N) or none.
void mixer_forward(const Tensor xz, std::vector<Tensor> weights, std::vector<int64_t> reverse, double scale,
                   Maybe gates, Tensor out, Maybe states) {
  const int64_t count = reverse.size(), dim = out.dim() == 3 ? out.size(2) : 0;
  STD_TORCH_CHECK(count > 0 && dim > 0 && static_cast<int64_t>(weights.size()) == kWeights * count,
                  "vimamba_cpu: the mixer needs ", kWeights, " weights for each of one direction or more");
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(weights[3].dim() == 2 && weights[5].dim() == 2 && weights[5].size(1) > 0 &&
                      out.is_contiguous() && xz.dim() == 3 && xz.stride(2) == 1,
                  "vimamba_cpu: the mixer's weights or activations have not the expected layout");
  check_rows("xz", xz, {out.size(0), out.size(1), 2 * dim}, out);
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
  if (gates)
    check_floats("gates", gates, {call.mixer.batch, gates->size(1) > 1 ? call.mixer.length : 1, count});
  check_floats("states", states,
               {count, call.mixer.batch, (call.mixer.length + kChunk - 1) / kChunk, dim, call.mixer.state});
  for (int64_t d = 0; d < count; ++d) {
    const Tensor* w = &weights[kWeights * d];
    check_direction(w, call.mixer);
    call.directions.push_back({d, data(w[0]), data(w[1]), data(w[2]), data(w[3]), data(w[4]), data(w[5]),
                               data(w[6]), (reverse[d] & 1) != 0, (reverse[d] & 2) != 0,
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

// clang-format off
STABLE_TORCH_LIBRARY(vimamba_cpu, m) {
  m.def("instruction_set(int wanted) -> int");
  m.def("chunk() -> int");
  m.def("max_width() -> int");
  m.def("inner_loop(int tiles) -> int");
  m.def("scan_backward_parts(Tensor u, Tensor B, Tensor C) -> int");
  m.def("scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias,"
        " bool softplus, bool reverse, Tensor(a!) out, Tensor(b!) last, Tensor(c!)? states) -> ()");
  m.def("scan_backward(Tensor dout, Tensor? dlast, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D,"
        " Tensor? z, Tensor? bias, Tensor states, bool softplus, bool reverse, int parts, Tensor(a!) du,"
        " Tensor(b!) ddelta, Tensor(c!) dA, Tensor(d!) dB, Tensor(e!) dC, Tensor(f!)? dD, Tensor(g!)? dz,"
        " Tensor(h!)? dbias) -> ()");
  m.def("conv_forward(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, Tensor(a!) y) -> ()");
  m.def("conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, Tensor(a!) dx,"
        " Tensor(b!) dweight, Tensor(c!)? dbias) -> ()");
  m.def("norm_forward(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor(a!) normed, Tensor(b!) sum,"
        " Tensor(c!) rstd) -> ()");
  m.def("norm_backward(Tensor dnormed, Tensor? dresidual, Tensor sum, Tensor weight, Tensor rstd, Tensor(a!) dsum,"
        " Tensor(b!) dweight) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("mixer_forward(Tensor xz, Tensor[] weights, int[] reverse, float scale, Tensor? gates, Tensor(a!) out,"
        " Tensor(b!)? states) -> ()");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(vimamba_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("chunk", TORCH_BOX(&chunk));
  m.impl("max_width", TORCH_BOX(&max_width));
  m.impl("inner_loop", TORCH_BOX(&inner_loop));
}

STABLE_TORCH_LIBRARY_IMPL(vimamba_cpu, CPU, m) {
  m.impl("scan_backward_parts", TORCH_BOX(&scan_backward_parts));
  m.impl("scan_forward", TORCH_BOX(&scan_forward));
  m.impl("scan_backward", TORCH_BOX(&scan_backward));
  m.impl("conv_forward", TORCH_BOX(&conv_forward));
  m.impl("conv_backward", TORCH_BOX(&conv_backward));
  m.impl("norm_forward", TORCH_BOX(&norm_forward));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("mixer_forward", TORCH_BOX(&mixer_forward));
}
