#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/ops_cpu.h"
#include "cpu/threads.h"
#include "cpu/work_queue.h"

namespace lola {
namespace {

// State bytes below which a further thread costs more to wake than it saves.
constexpr int64_t kThreadBytes = 1024 * 1024;

// How long a thread with nothing left to do stays awake for the others.
constexpr std::chrono::microseconds kPatience{50};

// Tells the processor that this is a waiting loop.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Waits for the tasks that others have begun, without falling asleep for what takes a few
// microseconds: where idle threads sleep (OMP_WAIT_POLICY=PASSIVE) waking this one would take
// longer than that. Gives up soon, in case the others do not run; the barrier that follows waits.
void await(const WorkQueue& queue) {
  const auto begin = std::chrono::steady_clock::now();
  while (!queue.finished()) {
    for (int i = 0; i < 16; ++i) relax();
    if (std::chrono::steady_clock::now() - begin > kPatience) return;
  }
  // And until they are at the barrier, so that this thread passes it.
  for (int i = 0; i < 16; ++i) relax();
}

// Bytes of a page that an item reads, a row and a sparse set, about.
int64_t item_bytes(const PageLayout& layout) {
  const int64_t exact = (layout.window_size + layout.sink_size) * layout.pair_bytes();
  const int64_t sparse = layout.sparse_cache_size * layout.sparse_bytes();
  const int64_t state = 2 * layout.feature_dim * size_of(layout.state_dtype);
  return 2 * (exact + sparse) + state * layout.states_per_set() * layout.head_dim;
}

}  // namespace

void decode_cpu(const std::vector<Call>& calls, int64_t rows, const Indices& seq_lens) {
  const Kernels& kernel = kernels(calls[0].layout.kv_dtype);
  int64_t items = 0, read = 0, bytes = 0;
  for (const Call& call : calls) {
    items += rows * call.layout.num_sparse_heads;
    read += rows * call.layout.num_sparse_heads * item_bytes(call.layout);
    bytes = std::max(bytes, kernel.decode_bytes(call));
  }
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), 1 + read / kThreadBytes);
  // Several tasks for each thread, of the sets of a row or more: these lie side by side in its
  // page.
  const int64_t task = std::clamp<int64_t>(items / (4 * threads), 1, kMaxTaskSize);
  std::vector<WorkQueue> queues;
  for (const Call& call : calls) queues.push_back({rows * call.layout.num_sparse_heads, task});
  const auto work = [&](char* workspace) {
    for (std::size_t i = 0; i < calls.size(); ++i) {
      kernel.decode(calls[i], seq_lens, queues[i], workspace);
    }
  };
  if (threads == 1) return work(ThreadMemory::own(bytes));
  parallel(threads, bytes, [&](int64_t begin, int64_t, char* workspace) {
    work(workspace);
    if (begin == 0) {
      for (const WorkQueue& queue : queues) await(queue);
    }
  });
}

}  // namespace lola
