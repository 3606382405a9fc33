// Prefill shared out among threads: who works on what, and when.
//
// A stream is one KV head of one run of new tokens. It goes from update point to update point: the
// queries of a piece are answered and the update behind it is decided, which only read the page and
// so can happen at once; then the update is committed, the page changes, and the next piece begins.
// As many streams are open as there are threads, each in a lane with memory of its own. A thread
// stays with its lane, whose page and features are in its cache, and helps another one where it
// finds nothing to do, so no number of heads leaves threads idle.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu/call.h"

namespace lola {

// What a stream consists of; `lane` is its memory.
struct StreamKernels {
  void (*open)(const LolaArgs&, char* lane);
  void (*attend)(const LolaArgs&, const AttendItem&, char* scratch);
  void (*decide)(const LolaArgs&, const Sequence& piece, int64_t set, char* lane);
  void (*commit)(const LolaArgs&, const Sequence& piece, int64_t kv, char* lane);
};

class Streams {
 public:
  // `memory` holds a lane of `lane_bytes` for each of lanes(runs, ...).
  Streams(const LolaArgs& a, const std::vector<Sequence>& runs, const StreamKernels& run,
          int64_t threads, char* memory, int64_t lane_bytes);

  // Of `threads`, as many as can ever have something to do at once.
  static int64_t useful_threads(const LolaArgs& a, const std::vector<Sequence>& runs,
                                int64_t threads);

  static int64_t lanes(const LolaArgs& a, const std::vector<Sequence>& runs, int64_t threads);

  // Returns when all streams have ended. Any number of threads may call this at once, or one after
  // the other: the first one alone finishes everything if it has to.
  void work(int64_t thread, char* scratch);

 private:
  struct Lane {
    Sequence run, piece;
    int64_t kv = 0, done = 0;
    int64_t block = 0, blocks = 0;  // queries per block, blocks per sparse set
    int64_t tasks = 0, next = 0;    // of the piece: all, and the first that nobody has taken
    int64_t unfinished = 0;
    char* memory = nullptr;
  };

  bool take_stream(Lane& lane);
  void begin_piece(Lane& lane);
  void publish(Lane& lane);
  void run_task(const Lane& lane, int64_t task, char* scratch) const;
  void finish_piece(Lane& lane, std::unique_lock<std::mutex>& lock);
  int64_t find_task(int64_t first) const;
  void wait(std::unique_lock<std::mutex>& lock);

  const LolaArgs& a_;
  const std::vector<Sequence>& runs_;
  const StreamKernels& run_;
  const int64_t threads_, sets_;
  std::vector<Lane> lanes_;
  int64_t next_stream_ = 0, open_ = 0, sleeping_ = 0;
  std::atomic<int64_t> published_{0};  // grows whenever there may be something new to do
  std::mutex mutex_;
  std::condition_variable news_;
};

}  // namespace lola
