// Prefill divided among threads: who works on what, and when.
//
// A job is one KV head of the new tokens of one row. It goes from update point to update point: the
// queries of a chunk are answered and the update behind it is decided, which only read the page and
// so can happen at once; then the update is carried out, the page changes, and the next chunk
// begins. As many jobs are open as there are threads, each with a workspace of its own. A thread
// stays with its job, whose page and features are in its cache, and helps another one where it
// finds nothing to do, so no number of heads leaves threads idle.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu/call.h"
#include "cpu/kernels.h"

namespace lola {

class PrefillScheduler {
 public:
  // For up to `max_threads`. Takes the workspaces of the jobs from the memory of this thread.
  PrefillScheduler(const std::vector<Call>& calls, const Kernels& kernels,
                   const std::vector<NewTokens>& rows, int64_t max_threads);

  // As many as can ever have something to do at once.
  int64_t threads() const { return threads_; }

  // Returns when all jobs are done. Any number of threads may call this at once, or one after the
  // other: the first one alone finishes everything if it has to. `workspace` is for attend().
  void work(int64_t thread, char* workspace);

 private:
  struct Job {
    const Call* call = nullptr;
    NewTokens row{}, chunk{};
    int64_t kv_head = 0, done = 0;  // of the call's; tokens done
    int64_t block = 0, blocks = 0;  // queries per block, blocks per sparse set
    int64_t tasks = 0, next = 0;    // of the chunk: all, and the first that nobody has taken
    int64_t unfinished = 0;
    char* workspace = nullptr;
  };

  bool update_due(const Job& job) const;
  bool open_next(Job& job);
  void begin_chunk(Job& job);
  void publish(Job& job);
  void run_task(const Job& job, int64_t task, char* workspace) const;
  void finish_chunk(Job& job, std::unique_lock<std::mutex>& lock);
  int64_t find_task(int64_t first) const;
  void wait(std::unique_lock<std::mutex>& lock);

  const std::vector<Call>& calls_;
  const Kernels& kernels_;
  const std::vector<NewTokens>& rows_;
  const int64_t kv_heads_, num_jobs_, sets_, threads_;  // KV heads of a call, sets of each
  std::vector<Job> jobs_;                               // the open ones
  int64_t next_job_ = 0, open_ = 0, sleeping_ = 0;
  std::atomic<int64_t> published_{0};  // grows whenever there may be something new to do
  std::mutex mutex_;
  std::condition_variable news_;
};

}  // namespace lola
