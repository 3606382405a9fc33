// Work that threads take task by task, so that one which wakes late or is interrupted holds nobody
// up.
#pragma once

#include <cstdint>

namespace lola {

// `items` pieces of work in tasks of up to `task_size` neighbouring ones.
struct WorkQueue {
  int64_t items, task_size;
  int64_t tasks = (items + task_size - 1) / task_size;
  int64_t next = 0, done = 0;

  // The next task; none is left where that is `tasks` or more.
  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
  void finish() { __atomic_fetch_add(&done, 1, __ATOMIC_RELEASE); }
  bool finished() const { return __atomic_load_n(&done, __ATOMIC_ACQUIRE) >= tasks; }
};

// Items of the longest task of decode: the last one keeps the other threads waiting.
constexpr int64_t kMaxTaskSize = 6;

}  // namespace lola
