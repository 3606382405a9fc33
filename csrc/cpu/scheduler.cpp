#include "cpu/scheduler.h"

#include <algorithm>
#include <thread>

#include "cpu/thread_memory.h"

namespace lola {
namespace {

// Times that a thread looks again before it sleeps: a chunk takes less time than waking up does.
constexpr int kLooks = 200;

// Query columns below which a block is not divided any more.
constexpr int64_t kLeastColumns = 32;

// Longest chunk: bounds the workspace where the interval is very long.
constexpr int64_t kLongestChunk = 256;

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

int64_t useful_threads(const std::vector<Call>& calls, const std::vector<NewTokens>& rows,
                       int64_t most) {
  const PageLayout& layout = calls[0].layout;
  const int64_t sets = layout.num_sparse_heads * static_cast<int64_t>(calls.size());
  int64_t tasks = 0;
  for (const NewTokens& row : rows) {
    const int64_t queries = std::min(row.count, layout.update_interval);
    const int64_t blocks = divide_up(queries * layout.heads_per_set(), kLeastColumns);
    tasks += sets * (blocks + 1);  // of a chunk, and its update
  }
  return std::min(most, tasks);
}

// The chunk that follows the first `done` tokens of a row: up to the next update point.
NewTokens next_chunk(const PageLayout& layout, const NewTokens& row, int64_t done) {
  const int64_t position = row.position + done, interval = layout.update_interval;
  const int64_t count = std::min({row.count - done, interval - position % interval, kLongestChunk});
  return {row.state_index, row.token + done, position, count};
}

// Puts a chunk's new pairs of one KV head in their rows of the exact store.
void write_pairs(const Call& call, const NewTokens& chunk, int64_t kv_head) {
  const Page page = call.page(chunk.state_index);
  const int64_t bytes = call.layout.pair_bytes();
  for (int64_t t = 0; t < chunk.count; ++t) {
    const int64_t row = call.layout.exact_row(chunk.position + t);
    std::copy_n(call.k.row(chunk.token + t, kv_head), bytes, page.exact_k(kv_head, row));
    std::copy_n(call.v.row(chunk.token + t, kv_head), bytes, page.exact_v(kv_head, row));
  }
}

}  // namespace

PrefillScheduler::PrefillScheduler(const std::vector<Call>& calls, const Kernels& kernels,
                                   const std::vector<NewTokens>& rows, int64_t max_threads)
    : calls_(calls),
      kernels_(kernels),
      rows_(rows),
      kv_heads_(calls[0].layout.num_kv_heads),
      num_jobs_(static_cast<int64_t>(rows.size() * calls.size()) * kv_heads_),
      sets_(calls[0].layout.sets_per_kv_head()),
      threads_(useful_threads(calls, rows, max_threads)),
      jobs_(static_cast<std::size_t>(std::min(threads_, num_jobs_))),
      open_(std::min(threads_, num_jobs_)) {
  int64_t bytes = 0;
  for (const Call& call : calls) bytes = std::max(bytes, kernels_.update_bytes(call));
  bytes = divide_up(bytes, 64) * 64;
  char* workspace = ThreadMemory::shared(open_ * bytes);
  for (Job& job : jobs_) {
    job.workspace = workspace;
    workspace += bytes;
    open_next(job);
    begin_chunk(job);
    publish(job);
  }
}

bool PrefillScheduler::update_due(const Job& job) const {
  return job.call->layout.update_due(job.chunk.position + job.chunk.count);
}

bool PrefillScheduler::open_next(Job& job) {
  if (next_job_ == num_jobs_) return false;
  const int64_t all = kv_heads_ * static_cast<int64_t>(calls_.size()), head = next_job_ % all;
  job.row = rows_[static_cast<std::size_t>(next_job_++ / all)];
  job.call = &calls_[static_cast<std::size_t>(head / kv_heads_)];
  job.kv_head = head % kv_heads_;
  job.done = 0;
  return true;
}

void PrefillScheduler::begin_chunk(Job& job) {
  if (job.done == 0) kernels_.open(*job.call, job.workspace);
  job.chunk = next_chunk(job.call->layout, job.row, job.done);
  write_pairs(*job.call, job.chunk, job.kv_head);
}

// How a chunk is divided changes who computes what, and no result.
void PrefillScheduler::publish(Job& job) {
  const int64_t parts = divide_up(threads_, open_), fair = divide_up(job.chunk.count, parts);
  const int64_t least = divide_up(kLeastColumns, job.call->layout.heads_per_set());
  job.block = std::min(kernels_.max_block(*job.call), std::max(fair, least));
  job.blocks = divide_up(job.chunk.count, job.block);
  job.tasks = sets_ * (job.blocks + (update_due(job) ? 1 : 0));
  job.unfinished = job.tasks;
  job.next = 0;
}

void PrefillScheduler::run_task(const Job& job, int64_t task, char* workspace) const {
  const int64_t set = job.kv_head * sets_ + task % sets_, block = task / sets_;
  const Call& call = *job.call;
  if (block == job.blocks) return kernels_.decide(call, job.chunk, set, job.workspace);
  const int64_t first = block * job.block;
  kernels_.attend(call,
                  {call.page(job.chunk.state_index), set, job.chunk.token + first,
                   job.chunk.position, first, std::min(job.block, job.chunk.count - first)},
                  workspace);
}

void PrefillScheduler::finish_chunk(Job& job, std::unique_lock<std::mutex>& lock) {
  lock.unlock();
  if (update_due(job)) kernels_.commit(*job.call, job.chunk, job.kv_head, job.workspace);
  lock.lock();
  job.done += job.chunk.count;
  if (job.done < job.row.count || open_next(job)) {
    lock.unlock();
    begin_chunk(job);
    lock.lock();
    publish(job);
  } else {
    --open_;
  }
  ++published_;
  if (sleeping_ > 0) news_.notify_all();
}

int64_t PrefillScheduler::find_task(int64_t first) const {
  const int64_t count = static_cast<int64_t>(jobs_.size());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (first + i) % count;
    const Job& job = jobs_[static_cast<std::size_t>(at)];
    if (job.next < job.tasks) return at;
  }
  return -1;
}

void PrefillScheduler::wait(std::unique_lock<std::mutex>& lock) {
  const int64_t seen = published_;
  lock.unlock();
  for (int i = 0; i < kLooks && published_ == seen; ++i) std::this_thread::yield();
  lock.lock();
  ++sleeping_;
  news_.wait(lock, [&] { return published_ != seen; });
  --sleeping_;
}

void PrefillScheduler::work(int64_t thread, char* workspace) {
  std::unique_lock<std::mutex> lock(mutex_);
  int64_t mine = thread;
  while (open_ > 0) {
    const int64_t found = find_task(mine);
    if (found < 0) {
      wait(lock);
      continue;
    }
    mine = found;
    Job& job = jobs_[static_cast<std::size_t>(found)];
    const int64_t task = job.next++;
    lock.unlock();
    run_task(job, task, workspace);
    lock.lock();
    if (--job.unfinished == 0) finish_chunk(job, lock);
  }
}

}  // namespace lola
