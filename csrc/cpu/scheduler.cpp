#include "cpu/scheduler.h"

#include <algorithm>
#include <thread>

namespace lola {
namespace {

// Times that a thread looks again before it sleeps: a piece takes less time than waking up does.
constexpr int kLooks = 200;

// Query columns below which a block is not divided any more.
constexpr int64_t kLeastColumns = 32;

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace

int64_t Streams::useful_threads(const LolaArgs& a, const std::vector<Sequence>& runs,
                                int64_t threads) {
  int64_t tasks = 0;
  for (const Sequence& run : runs) {
    const int64_t columns = std::min(run.count, a.interval) * (a.Hq / a.Hg);
    tasks += a.Hg * (divide_up(columns, kLeastColumns) + 1);  // blocks of a piece, and its update
  }
  return std::min(threads, tasks);
}

int64_t Streams::lanes(const LolaArgs& a, const std::vector<Sequence>& runs, int64_t threads) {
  return std::min(threads, static_cast<int64_t>(runs.size()) * a.Hkv);
}

Streams::Streams(const LolaArgs& a, const std::vector<Sequence>& runs, const StreamKernels& run,
                 int64_t threads, char* memory, int64_t lane_bytes)
    : a_(a),
      runs_(runs),
      run_(run),
      threads_(threads),
      sets_(a.Hg / a.Hkv),
      lanes_(static_cast<std::size_t>(lanes(a, runs, threads))) {
  open_ = static_cast<int64_t>(lanes_.size());
  for (Lane& lane : lanes_) {
    lane.memory = memory;
    memory += lane_bytes;
    take_stream(lane);
    begin_piece(lane);
    publish(lane);
  }
}

bool Streams::take_stream(Lane& lane) {
  if (next_stream_ == static_cast<int64_t>(runs_.size()) * a_.Hkv) return false;
  lane.run = runs_[static_cast<std::size_t>(next_stream_ / a_.Hkv)];
  lane.kv = next_stream_++ % a_.Hkv;
  lane.done = 0;
  return true;
}

void Streams::begin_piece(Lane& lane) {
  if (lane.done == 0) run_.open(a_, lane.memory);
  lane.piece = next_piece(a_, lane.run, lane.done);
  write_pairs(a_, lane.piece, lane.kv);
}

// How a piece is divided changes who computes what, and no result.
void Streams::publish(Lane& lane) {
  const int64_t heads = a_.Hq / a_.Hg, parts = divide_up(threads_, open_);
  const int64_t fair = divide_up(lane.piece.count, parts), least = divide_up(kLeastColumns, heads);
  lane.block = std::min(query_block(a_), std::max(fair, least));
  lane.blocks = divide_up(lane.piece.count, lane.block);
  const bool due = a_.update_due(lane.piece.position + lane.piece.count);
  lane.tasks = sets_ * (lane.blocks + (due ? 1 : 0));
  lane.unfinished = lane.tasks;
  lane.next = 0;
}

void Streams::run_task(const Lane& lane, int64_t task, char* scratch) const {
  const int64_t set = lane.kv * sets_ + task % sets_, block = task / sets_;
  if (block < lane.blocks) {
    run_.attend(a_, attend_item(lane.piece, set, block * lane.block, lane.block), scratch);
  } else {
    run_.decide(a_, lane.piece, set, lane.memory);
  }
}

void Streams::finish_piece(Lane& lane, std::unique_lock<std::mutex>& lock) {
  lock.unlock();
  if (a_.update_due(lane.piece.position + lane.piece.count)) {
    run_.commit(a_, lane.piece, lane.kv, lane.memory);
  }
  lock.lock();
  lane.done += lane.piece.count;
  if (lane.done < lane.run.count || take_stream(lane)) {
    lock.unlock();
    begin_piece(lane);
    lock.lock();
    publish(lane);
  } else {
    --open_;
  }
  ++published_;
  if (sleeping_ > 0) news_.notify_all();
}

int64_t Streams::find_task(int64_t first) const {
  const int64_t count = static_cast<int64_t>(lanes_.size());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (first + i) % count;
    const Lane& lane = lanes_[static_cast<std::size_t>(at)];
    if (lane.next < lane.tasks) return at;
  }
  return -1;
}

void Streams::wait(std::unique_lock<std::mutex>& lock) {
  const int64_t seen = published_;
  lock.unlock();
  for (int i = 0; i < kLooks && published_ == seen; ++i) std::this_thread::yield();
  lock.lock();
  ++sleeping_;
  news_.wait(lock, [&] { return published_ != seen; });
  --sleeping_;
}

void Streams::work(int64_t thread, char* scratch) {
  std::unique_lock<std::mutex> lock(mutex_);
  int64_t mine = thread;
  while (open_ > 0) {
    const int64_t found = find_task(mine);
    if (found < 0) {
      wait(lock);
      continue;
    }
    mine = found;
    Lane& lane = lanes_[static_cast<std::size_t>(found)];
    const int64_t task = lane.next++;
    lock.unlock();
    run_task(lane, task, scratch);
    lock.lock();
    if (--lane.unfinished == 0) finish_piece(lane, lock);
  }
}

}  // namespace lola
