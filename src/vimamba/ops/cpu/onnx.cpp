// The mixer as an operator of ONNX Runtime:
// session_options.register_custom_ops_library(vimamba.onnx_library()).
//
// vimamba::Mixer(xz (B, L, 2 D), gates (B, L or 1, directions) or none, 7 weights a direction as
// vimamba::mixer takes them) -> (B, L, D), float32, with the attributes `reverse` (a number a direction:
// kConvReverse + kScanReverse) and `scale`. It needs ONNX Runtime alone, whose threads do the work.
#include <array>
#include <climits>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "mixer_run.h"
#include "onnx_api.h"

namespace vimamba {

namespace {

// The call that this thread is in.
struct Running {
  const ort::Api* api;
  const ort::KernelContext* context;
};
thread_local Running running;

}  // namespace

// The runtime does not tell how many threads it has: by default as many as there are cores.
int64_t threads() {
  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  return cores;
}

void for_each_task(int64_t tasks, const std::function<void(int64_t)>& run) {
  struct Work {
    const std::function<void(int64_t)>& run;
    std::mutex mutex;
    std::string error;  // its text: GCC 11's exception_ptr asks for a younger libstdc++ than manylinux has
  } work{run, {}, {}};
  const auto one = [](void* what, size_t task) {  // nothing may be thrown through the runtime
    Work& work = *static_cast<Work*>(what);
    try {
      work.run(static_cast<int64_t>(task));
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> lock(work.mutex);
      work.error = error.what();
    }
  };
  running.api->parallel_for(running.context, one, static_cast<size_t>(tasks), &work);
  if (!work.error.empty()) throw std::runtime_error(work.error);
}

namespace {

using Sizes = std::vector<int64_t>;

void require(bool holds, const char* text) {
  if (!holds) throw std::invalid_argument(text);
}

int64_t count(const Sizes& sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) product *= size;
  return product;
}

class MixerOp {
 public:
  const ort::Api api;

  MixerOp(const ort::Api& api, const ort::KernelInfo* info)
      : api(api), reverse_(api.numbers(info, "reverse")), scale_(api.number(info, "scale")) {}

  void compute(ort::KernelContext* context) const {
    const size_t directions = reverse_.size();
    require(api.input_count(context) == 2 + kWeights * directions,
            "vimamba::Mixer: takes xz, gates or none, and 7 weights for each of `reverse`");
    const ort::Value* xz = api.input(context, 0);
    const Sizes xz_sizes = api.sizes(xz), dt_sizes = sizes_of_weight(context, 3),
                A_sizes = sizes_of_weight(context, 5);
    require(xz_sizes.size() == 3 && xz_sizes[2] % 2 == 0 && dt_sizes.size() == 2 && A_sizes.size() == 2,
            "vimamba::Mixer: xz is not (B, L, 2 D), dt_proj not (D, R) or A_log not (D, N)");
    const int64_t batch = xz_sizes[0], length = xz_sizes[1], dim = xz_sizes[2] / 2;
    const ort::Value* out = api.output(context, 0, {batch, length, dim});
    if (batch * length * dim == 0) return;
    MixerCall call = {.k = kernels(),
                      .mixer = {.batch = batch,
                                .dim = dim,
                                .length = length,
                                .state = A_sizes[1],
                                .dt_rank = dt_sizes[1],
                                .width = count(sizes_of_weight(context, 0)) / dim,
                                .bf16 = false,
                                .scale = scale_,
                                .x = {api.data(xz), 2 * length * dim, 2 * dim},
                                .z = {api.data(xz) + dim, 2 * length * dim, 2 * dim},
                                .out = {api.data(out), length * dim, dim},
                                .gates = nullptr,
                                .gate_batch_stride = 0,
                                .gate_time_stride = 0}};
    set_gates(context, call.mixer);
    for (size_t d = 0; d < directions; ++d) call.directions.push_back(direction(context, d, call.mixer));
    running = {&api, context};
    mix(call);
  }

 private:
  Sizes sizes_of_weight(const ort::KernelContext* context, size_t index) const {
    return api.sizes(api.input(context, 2 + index));
  }

  void set_gates(const ort::KernelContext* context, Mixer& m) const {
    const ort::Value* gates = api.input(context, 1);
    if (!gates) return;
    const Sizes sizes = api.sizes(gates);
    const int64_t directions = reverse_.size();
    require(sizes.size() == 3 && sizes[0] == m.batch && (sizes[1] == 1 || sizes[1] == m.length) &&
                sizes[2] == directions,
            "vimamba::Mixer: the gates are not (B, L or 1, directions)");
    m.gates = api.data(gates);
    m.gate_batch_stride = sizes[1] * directions;
    m.gate_time_stride = sizes[1] > 1 ? directions : 0;
  }

  Direction direction(const ort::KernelContext* context, size_t d, const Mixer& m) const {
    // conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D
    const std::array<int64_t, kWeights> floats = {
        m.dim * m.width, m.dim, (m.dt_rank + 2 * m.state) * m.dim, m.dim * m.dt_rank, m.dim,
        m.dim * m.state, m.dim};
    std::array<const float*, kWeights> w;
    for (size_t i = 0; i < w.size(); ++i) {
      const ort::Value* weight = api.input(context, 2 + d * kWeights + i);
      require(count(api.sizes(weight)) == floats[i], "vimamba::Mixer: a weight has not the expected size");
      w[i] = api.data(weight);
    }
    return {static_cast<int64_t>(d), w[0], w[1], w[2], w[3], w[4], w[5], w[6],
            (reverse_[d] & kConvReverse) != 0, (reverse_[d] & kScanReverse) != 0, nullptr};
  }

  const Sizes reverse_;
  const float scale_;
};

// What `run` throws, as the runtime wants it.
template <class F>
ort::Status* guarded(const ort::Api& api, const F& run) {
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    return api.failure(error.what());
  }
}

using ort::CustomOp;

constexpr CustomOp kMixer = {
    .version = ort::kVersion,
    .create_kernel = nullptr,
    .name = [](const CustomOp*) { return "Mixer"; },
    .provider = [](const CustomOp*) -> const char* { return nullptr; },
    .input_type = [](const CustomOp*, size_t) { return ort::kFloat; },
    .input_count = [](const CustomOp*) -> size_t { return 3; },
    .output_type = [](const CustomOp*, size_t) { return ort::kFloat; },
    .output_count = [](const CustomOp*) -> size_t { return 1; },
    .compute = nullptr,
    .destroy_kernel = [](void* kernel) { delete static_cast<MixerOp*>(kernel); },
    .input_presence =
        [](const CustomOp*, size_t i) {
          return std::array{CustomOp::kRequired, CustomOp::kOptional, CustomOp::kVariadic}[i];
        },
    .output_presence = [](const CustomOp*, size_t) { return CustomOp::kRequired; },
    .input_memory = [](const CustomOp*, size_t) { return 0; },  // OrtMemTypeDefault
    .variadic_inputs_least = [](const CustomOp*) { return static_cast<int>(kWeights); },
    .variadic_inputs_alike = [](const CustomOp*) { return 1; },
    .variadic_outputs_least = [](const CustomOp*) { return 0; },
    .variadic_outputs_alike = [](const CustomOp*) { return 0; },
    .create_kernel_or_fail =
        [](const CustomOp*, const void* table, const ort::KernelInfo* info, void** kernel) {
          const ort::Api api(table);
          return guarded(api, [&] { *kernel = new MixerOp(api, info); });
        },
    .compute_or_fail =
        [](void* kernel, ort::KernelContext* context) {
          const MixerOp& op = *static_cast<MixerOp*>(kernel);
          return guarded(op.api, [&] { op.compute(context); });
        },
    .infer_shapes = nullptr,
    .first_version = [](const CustomOp*) { return 1; },
    .last_version = [](const CustomOp*) { return INT_MAX; },
};

}  // namespace

}  // namespace vimamba

// What the runtime calls in a library of operators.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::ApiBase* base) {
  const void* table = base->get_api(ort::kVersion);
  if (!table)
    return ort::Api(base->get_api(1)).failure("vimamba's operators need ONNX Runtime 1.17 or later");
  const ort::Api api(table);
  return vimamba::guarded(api, [&] {
    static ort::Domain* const domain = [&] {  // it has to outlive every session
      ort::Domain* made = api.domain("vimamba");
      api.add(made, &vimamba::kMixer);
      return made;
    }();
    api.add(options, domain);
  });
}
