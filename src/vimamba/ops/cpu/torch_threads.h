// Work on PyTorch's threads: torch.set_num_threads holds.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "parallel.h"

namespace vimamba {

int64_t threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

void for_each_task(int64_t tasks, const std::function<void(int64_t)>& run) {
  torch::stable::parallel_for(0, tasks, 1, [&run](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) run(task);
  });
}

}  // namespace vimamba
