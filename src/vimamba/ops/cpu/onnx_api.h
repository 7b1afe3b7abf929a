// The part of ONNX Runtime's C API that an operator needs, so that none of its headers has to be there when
// this is built. A function is known by its place in the runtime's table, which only ever grows at its end;
// places and layouts are those of onnxruntime_c_api.h, API version 17 (ONNX Runtime 1.17), the first with
// parallel loops.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace ort {

constexpr uint32_t kVersion = 17;
constexpr int kFail = 1;   // OrtErrorCode
constexpr int kFloat = 1;  // ONNXTensorElementDataType

// Known by pointers alone.
struct Status;
struct SessionOptions;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct Shape;

struct ApiBase {
  const void* (*get_api)(uint32_t version);  // null if the runtime is older
  const char* (*version)();
};

struct CustomOp {
  enum Presence { kRequired, kOptional, kVariadic };

  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void* api, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);  // null is the CPU's
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy_kernel)(void* kernel);
  Presence (*input_presence)(const CustomOp*, size_t);
  Presence (*output_presence)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_inputs_least)(const CustomOp*);
  int (*variadic_inputs_alike)(const CustomOp*);
  int (*variadic_outputs_least)(const CustomOp*);
  int (*variadic_outputs_alike)(const CustomOp*);
  Status* (*create_kernel_or_fail)(const CustomOp*, const void* api, const KernelInfo*, void** kernel);
  Status* (*compute_or_fail)(void* kernel, KernelContext*);
  Status* (*infer_shapes)(const CustomOp*, void*);
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
};

// What the runtime said when a function failed; it takes the status back.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Api {
 public:
  explicit Api(const void* table) : table_(static_cast<void* const*>(table)) {}

  Status* failure(const char* text) const { return call<Status*>(0, kFail, text); }

  Domain* domain(const char* name) const { return get<Domain*>(26, name); }
  void add(Domain* domain, const CustomOp* op) const { check(call<Status*>(27, domain, op)); }
  void add(SessionOptions* options, Domain* domain) const { check(call<Status*>(28, options, domain)); }

  float number(const KernelInfo* info, const char* name) const { return get<float>(85, info, name); }
  std::vector<int64_t> numbers(const KernelInfo* info, const char* name) const {
    size_t count = 0;
    check(call<Status*>(163, info, name, static_cast<int64_t*>(nullptr), &count));
    std::vector<int64_t> found(count);
    check(call<Status*>(163, info, name, found.data(), &count));
    return found;
  }

  size_t input_count(const KernelContext* context) const { return get<size_t>(88, context); }
  // Null for an optional input that was not given.
  const Value* input(const KernelContext* context, size_t index) const {
    return get<const Value*>(90, context, index);
  }
  Value* output(KernelContext* context, size_t index, const std::vector<int64_t>& sizes) const {
    return get<Value*>(91, context, index, sizes.data(), sizes.size());
  }
  float* data(const Value* value) const { return static_cast<float*>(get<void*>(51, value)); }
  std::vector<int64_t> sizes(const Value* value) const {
    Shape* shape = get<Shape*>(65, value);
    std::vector<int64_t> found(get<size_t>(61, shape));
    check(call<Status*>(62, shape, found.data(), found.size()));
    call<void>(99, shape);
    return found;
  }

  void parallel_for(const KernelContext* context, void (*run)(void*, size_t), size_t tasks,
                    void* what) const {
    check(call<Status*>(274, context, run, tasks, size_t{0}, what));
  }

 private:
  template <class Result, class... Arguments>
  Result call(int place, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(table_[place])(arguments...);
  }
  // What a function puts where its last argument points.
  template <class Result, class... Arguments>
  Result get(int place, Arguments... arguments) const {
    Result result{};
    check(call<Status*>(place, arguments..., &result));
    return result;
  }
  void check(Status* status) const {
    if (!status) return;
    const Error error(call<const char*>(2, status));
    call<void>(93, status);
    throw error;
  }

  void* const* table_;
};

}  // namespace ort
