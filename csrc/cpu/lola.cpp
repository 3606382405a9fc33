// Decode and prefill on the CPU: how the work is divided among threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/isa.h"
#include "cpu/page.h"
#include "cpu/scratch.h"

#define LOLA_KERNEL_BODY "cpu/lola_kernel.h"
#include "cpu/for_each_isa.h"

namespace lola {
namespace {

// Intervals below this are walked token by token: blocks of so few queries gain nothing.
constexpr int64_t kShortInterval = 8;

// State bytes below which a further thread costs more to wake than it saves.
constexpr int64_t kThreadBytes = 512 * 1024;

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

struct Kernels {
  decltype(&baseline::lola_scratch) scratch;
  decltype(&baseline::decode_run) decode;
  decltype(&baseline::sequence_run) sequence;
  decltype(&baseline::stream_run) stream;
  decltype(&baseline::attend_run) attend;
  decltype(&baseline::update_run) update;
};

Kernels kernels() {
  switch (cpu_isa()) {
    case Isa::avx512_bf16:
      return {avx512_bf16::lola_scratch, avx512_bf16::decode_run, avx512_bf16::sequence_run,
              avx512_bf16::stream_run,   avx512_bf16::attend_run, avx512_bf16::update_run};
    case Isa::avx512:
      return {avx512::lola_scratch, avx512::decode_run, avx512::sequence_run,
              avx512::stream_run,   avx512::attend_run, avx512::update_run};
    case Isa::avx2:
      return {avx2::lola_scratch, avx2::decode_run, avx2::sequence_run,
              avx2::stream_run,   avx2::attend_run, avx2::update_run};
    default:
      return {baseline::lola_scratch, baseline::decode_run, baseline::sequence_run,
              baseline::stream_run,   baseline::attend_run, baseline::update_run};
  }
}

// Runs `body(begin, end, scratch)` over the items, each thread with scratch of its own.
template <typename Body>
void parallel(int64_t items, int64_t grain, int64_t scratch_bytes, const Body& body) {
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    void* const memory = Scratch::of_thread(static_cast<std::size_t>(scratch_bytes));
    body(begin, end, static_cast<char*>(memory));
  });
}

// Whether that many equal items keep the threads busy without anything finer.
bool fills_threads(int64_t items) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rounds = (items + threads - 1) / threads;
  return 10 * items >= 7 * rounds * threads;
}

// The runs cut at the update points; piece i of every run is one step.
std::vector<std::vector<Sequence>> steps_of(const LolaArgs& a, const std::vector<Sequence>& runs) {
  std::vector<std::vector<Sequence>> steps;
  for (const Sequence& run : runs) {
    int64_t done = 0;
    for (std::size_t step = 0; done < run.count; ++step) {
      if (steps.size() <= step) steps.emplace_back();
      steps[step].push_back(next_piece(a, run, done));
      done += steps[step].back().count;
    }
  }
  return steps;
}

// Waits for the turns that others have begun, without falling asleep for what takes a few
// microseconds: where idle threads sleep (OMP_WAIT_POLICY=PASSIVE) waking this one would take
// longer than that. Gives up soon, in case the others do not run; the barrier that follows waits.
void await(const Turns& turns) {
  const auto begin = std::chrono::steady_clock::now();
  while (!turns.finished()) {
    for (int i = 0; i < 16; ++i) relax();
    if (std::chrono::steady_clock::now() - begin > kPatience) return;
  }
  // And until they are at the barrier, so that this thread passes it.
  for (int i = 0; i < 16; ++i) relax();
}

}  // namespace

void decode_cpu(const LolaArgs& a, int64_t rows, const Indices& seq_lens) {
  const Kernels run = kernels();
  const int64_t state = (2 * (a.window + a.sink + a.lam) * size_of(a.exact_k.dtype) +
                         2 * a.F * size_of(a.recall.H.dtype) * (a.Hs / a.Hg)) *
                        a.d;
  const int64_t items = rows * a.Hg, scratch = run.scratch(a, Phase::decode);
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), 1 + items * state / kThreadBytes / 2);
  // Several turns for each thread, of the sets of a row or more: these lie side by side in its
  // page.
  const int64_t per_turn = std::clamp<int64_t>(items / (4 * threads), 1, kTurnItems);
  Turns turns{(items + per_turn - 1) / per_turn, per_turn};
  if (threads == 1) {
    run.decode(a, rows, seq_lens, turns, static_cast<char*>(Scratch::of_thread(scratch)));
    return;
  }
  parallel(threads, 1, scratch, [&](int64_t begin, int64_t end, char* memory) {
    run.decode(a, rows, seq_lens, turns, memory);
    if (begin == 0) await(turns);
  });
}

void prefill_cpu(const LolaArgs& a, int64_t rows, const Indices& query_start,
                 const Indices& context_lens) {
  const Kernels run = kernels();
  std::vector<Sequence> runs;
  const int64_t token_bytes = a.d * size_of(a.out.dtype);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t start = query_start[r], end = query_start[r + 1];
    if (a.slots[r] > 0) {
      if (end > start) runs.push_back({a.slots[r], start, context_lens[r], end - start});
      continue;
    }
    for (int64_t t = start; t < end; ++t) {  // padding answers zero
      for (int64_t h = 0; h < a.Hq; ++h) std::fill_n(a.out.at(t, h), token_bytes, 0);
    }
  }
  const int64_t streams = static_cast<int64_t>(runs.size()) * a.Hkv;
  if (a.interval < kShortInterval) {
    parallel(streams, 1, run.scratch(a, Phase::decode),
             [&](int64_t begin, int64_t end, char* memory) {
               run.sequence(a, runs.data(), begin, end, memory);
             });
    return;
  }
  if (fills_threads(streams)) {
    LolaArgs wide = a;
    if (cpu_isa() == Isa::avx512_bf16 && a.exact_k.dtype == DType::bf16) wide.columns = 192;
    parallel(streams, 1, run.scratch(wide, Phase::stream),
             [&](int64_t begin, int64_t end, char* memory) {
               run.stream(wide, runs.data(), begin, end, memory);
             });
    return;
  }
  // Fewer heads than threads: their blocks of queries are shared out, at the price of waiting for
  // each other at every piece.
  const int64_t attend_scratch = run.scratch(a, Phase::attend);
  const int64_t update_scratch = run.scratch(a, Phase::update);
  const int64_t block = query_block(a);
  for (const std::vector<Sequence>& pieces : steps_of(a, runs)) {
    std::vector<AttendItem> items;
    std::vector<Sequence> due;
    for (const Sequence& piece : pieces) {
      for (int64_t kv = 0; kv < a.Hkv; ++kv) write_pairs(a, piece, kv);
      for (int64_t set = 0; set < a.Hg; ++set) {
        for (int64_t first = 0; first < piece.count; first += block) {
          items.push_back(attend_item(piece, set, first, block));
        }
      }
      if (a.update_due(piece.position + piece.count)) due.push_back(piece);
    }
    parallel(static_cast<int64_t>(items.size()), 1, attend_scratch,
             [&](int64_t begin, int64_t end, char* memory) {
               run.attend(a, items.data(), begin, end, memory);
             });
    parallel(static_cast<int64_t>(due.size()) * a.Hg, 1, update_scratch,
             [&](int64_t begin, int64_t end, char* memory) {
               run.update(a, due.data(), begin, end, memory);
             });
  }
}

}  // namespace lola
