// Decode and prefill on the CPU: how the work is divided among threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/workspace.h"

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

Kernels kernels() {
  switch (cpu_isa()) {
    case Isa::avx512_bf16:
      return avx512_bf16::lola_kernels();
    case Isa::avx512:
      return avx512::lola_kernels();
    case Isa::avx2:
      return avx2::lola_kernels();
    default:
      return baseline::lola_kernels();
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
  if (runs.empty()) return;
  if (a.interval < kShortInterval) {
    parallel(static_cast<int64_t>(runs.size()) * a.Hkv, 1, run.scratch(a, Phase::decode),
             [&](int64_t begin, int64_t end, char* memory) {
               run.sequence(a, runs.data(), begin, end, memory);
             });
    return;
  }
  LolaArgs wide = a;  // keys and values are laid out once per block, whatever its width
  if (cpu_isa() == Isa::avx512_bf16 && a.exact_k.dtype == DType::bf16) wide.columns = 192;
  const int64_t threads = Streams::useful_threads(wide, runs, torch::stable::get_num_threads());
  const int64_t lane_bytes = (run.scratch(wide, Phase::lane) + 63) / 64 * 64;
  const std::size_t bytes = static_cast<std::size_t>(Streams::lanes(wide, runs, threads)) *
                            static_cast<std::size_t>(lane_bytes);
  Streams streams(wide, runs, run.streams, threads, static_cast<char*>(Scratch::of_call(bytes)),
                  lane_bytes);
  parallel(threads, 1, run.scratch(wide, Phase::attend),
           [&](int64_t begin, int64_t end, char* memory) {
             for (int64_t thread = begin; thread < end; ++thread) streams.work(thread, memory);
           });
}

}  // namespace lola
