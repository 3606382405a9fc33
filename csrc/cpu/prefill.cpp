#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/ops_cpu.h"
#include "cpu/scheduler.h"
#include "cpu/threads.h"

namespace lola {
namespace {

// Intervals below this are walked token by token: blocks of so few queries gain nothing.
constexpr int64_t kShortInterval = 8;

void answer_zero(const Call& call, int64_t begin, int64_t end) {
  const int64_t bytes = call.layout.head_dim * size_of(call.out.dtype);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < call.layout.num_heads; ++h) std::fill_n(call.out.row(t, h), bytes, 0);
  }
}

}  // namespace

void prefill_cpu(const Call& call, int64_t rows, const Indices& query_start_loc,
                 const Indices& context_lens) {
  const Kernels& kernel = kernels(call.layout.kv_dtype);
  std::vector<NewTokens> new_tokens;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t begin = query_start_loc[r], end = query_start_loc[r + 1];
    if (call.slots[r] <= 0) {
      answer_zero(call, begin, end);
    } else if (end > begin) {
      new_tokens.push_back({call.slots[r], begin, context_lens[r], end - begin});
    }
  }
  if (new_tokens.empty()) return;
  if (call.layout.update_interval < kShortInterval) {
    const auto items = static_cast<int64_t>(new_tokens.size()) * call.layout.num_kv_heads;
    parallel(items, kernel.decode_bytes(call), [&](int64_t begin, int64_t end, char* workspace) {
      kernel.decode_tokens(call, new_tokens.data(), begin, end, workspace);
    });
    return;
  }
  PrefillScheduler scheduler(call, kernel, new_tokens, torch::stable::get_num_threads());
  parallel(scheduler.threads(), kernel.attend_bytes(call),
           [&](int64_t begin, int64_t end, char* workspace) {
             for (int64_t i = begin; i < end; ++i) scheduler.work(i, workspace);
           });
}

}  // namespace lola
