// The operators of this library, on the libtorch stable ABI: one binary serves every Python and every PyTorch
// from 2.11.
//
// vimamba_cpu.* are what vimamba/ops/cpu/__init__.py calls. vimamba.* are the operators that programs are
// exported with: their schemas, and what they do where no Python of ours runs. With `import vimamba` the
// Python of ours chooses the backend instead (its registration goes before a CompositeExplicitAutograd one).
#include <torch/csrc/stable/library.h>

#include <string>

#include "block_call.h"
#include "block_memory.h"
#include "conv_call.h"
#include "linear_call.h"
#include "mixer_backward_call.h"
#include "mixer_call.h"
#include "norm_call.h"
#include "scan_call.h"
#include "torch_threads.h"

namespace {

using namespace vimamba;

// What Python must know of kernels.h.
int64_t chunk() { return kChunk; }
int64_t max_width() { return kMaxWidth; }

// Whether these kernels are what an operator of an exported program wants.
void check_without_python(const Tensor& x, const std::string& backend) {
  STD_TORCH_CHECK(x.is_cpu() && (backend.empty() || backend == "cpu"),
                  "vimamba: without `import vimamba` its operators have CPU kernels only: move the program to the "
                  "CPU and export it without a backend, or import vimamba");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "vimamba: without `import vimamba` its operators take float32 and bfloat16: export the program "
                  "in one of them, or import vimamba");
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor u, const Tensor delta, const Tensor A,
                                                  const Tensor B, const Tensor C, const Maybe D,
                                                  const Maybe z, const Maybe delta_bias, bool delta_softplus,
                                                  bool reverse, bool save_states, const std::string backend) {
  check_without_python(u, backend);
  return scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states);
}

Tensor causal_conv1d(const Tensor x, const Tensor weight, const Maybe bias, bool silu, bool reverse,
                     const std::string backend) {
  check_without_python(x, backend);
  return conv_forward(x, weight, bias, silu, reverse);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor x, const Tensor weight, const Maybe residual,
                                            double eps, ScalarType out_dtype, const std::string backend) {
  check_without_python(x, backend);
  return norm_forward(x, residual, weight, eps, out_dtype);
}

std::tuple<Tensor, Tensor> mixer(const Tensor xz, std::vector<Tensor> weights, std::vector<int64_t> reverse,
                                 double scale, const Maybe gates, bool save_states,
                                 const std::string backend) {
  check_without_python(xz, backend);
  return mixer_forward(xz, weights, reverse, scale, gates, save_states);
}

Tensor blocks(const Tensor stream, std::vector<Tensor> weights, std::vector<int64_t> reverse,
              int64_t directions, double scale, double eps) {
  check_without_python(stream, "");
  return remembered_blocks(stream, weights, reverse, directions, scale, eps);
}

Tensor exported_linear(const Tensor x, const Tensor weight, const Maybe bias) {
  check_without_python(x, "");
  return linear(x, weight, bias);
}

}  // namespace

// clang-format off
STABLE_TORCH_LIBRARY(vimamba_cpu, m) {
  m.def("instruction_set(int wanted) -> int");
  m.def("chunk() -> int");
  m.def("max_width() -> int");
  m.def("scan_backward_parts(Tensor u, Tensor B, Tensor C) -> int");
  m.def("scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
        " bool delta_softplus, bool reverse, bool save_states) -> (Tensor, Tensor, Tensor)");
  m.def("scan_backward(Tensor dout, Tensor? dlast, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D,"
        " Tensor? z, Tensor? delta_bias, Tensor states, bool delta_softplus, bool reverse, int parts, Tensor(a!) du,"
        " Tensor(b!) ddelta, Tensor(c!) dA, Tensor(d!) dB, Tensor(e!) dC, Tensor(f!)? dD, Tensor(g!)? dz,"
        " Tensor(h!)? dbias) -> ()");
  m.def("conv_forward(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) -> Tensor");
  m.def("conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, Tensor(a!) dx,"
        " Tensor(b!) dweight, Tensor(c!)? dbias) -> ()");
  m.def("norm_forward(Tensor x, Tensor? residual, Tensor weight, float eps, ScalarType out_dtype)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("norm_backward(Tensor dnormed, Tensor? dresidual, Tensor sum, Tensor weight, Tensor rstd, Tensor(a!) dsum,"
        " Tensor(b!) dweight) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("quantized_linear(Tensor x, Tensor weight, Tensor scales, Tensor? bias) -> Tensor");
  m.def("mixer_forward(Tensor xz, Tensor[] weights, int[] reverse, float scale, Tensor? gates, bool save_states)"
        " -> (Tensor, Tensor)");
  m.def("mixer_backward(Tensor dout, Tensor xz, Tensor[] weights, int[] reverse, Tensor states, float scale)"
        " -> (Tensor, Tensor[])");
  m.def("mixer_frozen_backward(Tensor dout, Tensor xz, Tensor[] weights, int[] reverse, float scale, Tensor? gates)"
        " -> Tensor");
  m.def("block_fingerprints(Tensor[] weights, int directions, bool bf16) -> Tensor");
  m.def("block_pack(Tensor[] weights, int directions, bool bf16) -> Tensor[]");
  m.def("block_forward(Tensor stream, Tensor[] weights, Tensor[] packed, int[] reverse, int directions, float scale,"
        " float eps, bool bf16) -> Tensor");
  m.def("remembered_blocks(Tensor stream, Tensor[] weights, int[] reverse, int directions, float scale, float eps)"
        " -> Tensor");
}

STABLE_TORCH_LIBRARY_FRAGMENT(vimamba, m) {
  m.def("selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
        " bool delta_softplus, bool reverse, bool save_states, str backend) -> (Tensor, Tensor, Tensor)");
  m.def("causal_conv1d(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, str backend) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps, ScalarType out_dtype, str backend)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("mixer(Tensor xz, Tensor[] weights, int[] reverse, float scale, Tensor? gates, bool save_states, str backend)"
        " -> (Tensor, Tensor)");
  m.def("blocks(Tensor stream, Tensor[] weights, int[] reverse, int directions, float scale, float eps) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(vimamba_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("chunk", TORCH_BOX(&chunk));
  m.impl("max_width", TORCH_BOX(&max_width));
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
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("mixer_forward", TORCH_BOX(&mixer_forward));
  m.impl("mixer_backward", TORCH_BOX(&mixer_backward));
  m.impl("mixer_frozen_backward", TORCH_BOX(&mixer_frozen_backward));
  m.impl("block_fingerprints", TORCH_BOX(&block_fingerprints));
  m.impl("block_pack", TORCH_BOX(&block_pack));
  m.impl("block_forward", TORCH_BOX(&block_forward));
  m.impl("remembered_blocks", TORCH_BOX(&remembered_blocks));
}

STABLE_TORCH_LIBRARY_IMPL(vimamba, CompositeExplicitAutograd, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("mixer", TORCH_BOX(&mixer));
  m.impl("blocks", TORCH_BOX(&blocks));
  m.impl("linear", TORCH_BOX(&exported_linear));
}
