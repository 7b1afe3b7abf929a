// How work divides over threads, and the memory that each of them works in. Whose threads they are is the
// library's: torch_threads.h, onnx.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <new>
#include <numeric>

namespace vimamba {

// Memory that grows and stays with its thread: pages once touched are not faulted in again at every call.
// Slot 0 belongs to the task a thread works on, slot 1 to the caller, who may work on a task meanwhile.
template <int slot>
float* scratch(int64_t floats) {
  struct Memory {
    float* data = nullptr;
    int64_t floats = 0;
    ~Memory() { ::operator delete(data, std::align_val_t(64)); }
  };
  static thread_local Memory memory;
  if (memory.floats < floats) {
    ::operator delete(memory.data, std::align_val_t(64));
    memory.data = nullptr, memory.floats = 0;  // as it stays if the allocation throws
    memory.data = static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)));
    memory.floats = floats;
  }
  return memory.data;
}

int64_t threads();

void for_each_task(int64_t tasks, const std::function<void(int64_t)>& run);

// Into how many parts to cut each of `count` equal pieces of work so that the threads finish together; at
// most `most`.
int64_t parts_of_each(int64_t count, int64_t most) {
  const int64_t wanted = threads() / std::gcd(count, threads());
  return count >= 8 * threads() ? 1 : std::max<int64_t>(1, std::min(wanted, most));
}

// Cuts batch x length into `parts` even stretches and calls run(b, begin, end) for those of `part`.
template <class F>
void for_each_stretch(int64_t batch, int64_t length, int64_t part, int64_t parts, const F& run) {
  const int64_t total = batch * length;
  const int64_t begin = total / parts * part + std::min(part, total % parts);
  const int64_t end = begin + total / parts + (part < total % parts ? 1 : 0);
  for (int64_t at = begin; at < end;) {
    const int64_t b = at / length, stop = std::min(end, (b + 1) * length);
    run(b, at - b * length, stop - b * length);
    at = stop;
  }
}

}  // namespace vimamba
