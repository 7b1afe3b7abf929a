// One call of the selective scan: channels of one batch element a task.
#pragma once

#include <cstdint>
#include <numeric>
#include <tuple>

#include "instruction_set.h"
#include "parallel.h"
#include "tensors.h"

namespace vimamba {

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

// What is read channel by channel is small, and made contiguous; the activations come as they are.
struct ScanWeights {
  const Tensor A, B, C;
  const Maybe D, delta_bias;
  ScanWeights(const Tensor& A, const Tensor& B, const Tensor& C, const Maybe& D, const Maybe& delta_bias)
      : A(as_contiguous(A)),
        B(B.dim() == 2 ? as_contiguous(B) : B),
        C(C.dim() == 2 ? as_contiguous(C) : C),
        D(as_contiguous(D)),
        delta_bias(as_contiguous(delta_bias)) {}
};

Scan scan_of(const Tensor& u, const Tensor& delta, const ScanWeights& weights, const Maybe& z, bool softplus,
             bool reverse) {
  const Tensor &A = weights.A, &B = weights.B, &C = weights.C;
  STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2 && A.size(1) > 0,
                  "vimamba_cpu: u is not (B, D, L) or A not (D, N)");
  const int64_t batch = u.size(0), dim = u.size(1), length = u.size(2), state = A.size(1);
  check_rows("u", u, {batch, dim, length}, u);
  check_rows("delta", delta, {batch, dim, length}, u);
  check_rows("z", z, {batch, dim, length}, u);
  check_floats("A", A, {dim, state});
  check_floats("D", weights.D, {dim});
  check_floats("delta_bias", weights.delta_bias, {dim});
  Scan scan = {};
  scan.batch = batch, scan.dim = dim, scan.length = length, scan.state = state;
  scan.groups = groups_of(B, C, dim);
  scan.bf16 = is_bf16(u), scan.softplus = softplus, scan.reverse = reverse;
  scan.u = rows(u), scan.delta = rows(delta), scan.z = rows(z);
  scan.B = projection("B", B, u, state, scan.groups), scan.C = projection("C", C, u, state, scan.groups);
  scan.A = data(A), scan.D = data(weights.D), scan.bias = data(weights.delta_bias);
  return scan;
}

// The output, the last state (B, D, N), and the states before each chunk (B, K, D, N), or (0,).
std::tuple<Tensor, Tensor, Tensor> scan_forward(const Tensor u, const Tensor delta, const Tensor A,
                                                const Tensor B, const Tensor C, const Maybe D, const Maybe z,
                                                const Maybe delta_bias, bool delta_softplus, bool reverse,
                                                bool save_states) {
  const Kernels& k = kernels();
  const ScanWeights weights(A, B, C, D, delta_bias);
  Scan scan = scan_of(u, delta, weights, z, delta_softplus, reverse);
  const Tensor out = torch::stable::empty_like(u), last = new_floats(u, {scan.batch, scan.dim, scan.state});
  const Tensor states =
      save_states ? new_floats(u, {scan.batch, chunks_of(scan.length), scan.dim, scan.state})
                  : new_floats(u, {0});
  scan.out = rows(out), scan.last = data(last), scan.states = save_states ? data(states) : nullptr;
  const int64_t blocks = blocks_of(scan.dim, scan.groups, k.lanes);
  const int64_t parts = parts_of_each(scan.batch, blocks);
  for_each_task(scan.batch * parts, [&](int64_t task) {
    const int64_t part = task % parts, begin = part * blocks / parts, end = (part + 1) * blocks / parts;
    k.scan_forward(scan, task / parts, begin, end, scratch<0>(k.scan_scratch(scan, end - begin)));
  });
  return {out, last, states};
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
                   const Tensor B, const Tensor C, const Maybe D, const Maybe z, const Maybe delta_bias,
                   const Tensor states, bool delta_softplus, bool reverse, int64_t parts, Tensor du,
                   Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Maybe dD, Maybe dz, Maybe dbias) {
  const Kernels& k = kernels();
  const ScanWeights weights(A, B, C, D, delta_bias);
  Scan scan = scan_of(u, delta, weights, z, delta_softplus, reverse);
  check_floats("states", states, {scan.batch, chunks_of(scan.length), scan.dim, scan.state});
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

}  // namespace vimamba
