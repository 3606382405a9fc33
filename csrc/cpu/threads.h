// Torch's threads, each with a workspace.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "cpu/thread_memory.h"

namespace lola {

// Runs `body(begin, end, workspace)` over `items`, each thread with a workspace of its own.
template <typename Body>
void parallel(int64_t items, int64_t workspace_bytes, const Body& body) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    body(begin, end, ThreadMemory::own(workspace_bytes));
  });
}

}  // namespace lola
