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

void prefill_cpu(const std::vector<Call>& calls, int64_t rows, const Indices& query_start_loc,
                 const Indices& context_lens) {
  const Kernels& kernel = kernels(calls[0].layout.kv_dtype);
  std::vector<NewTokens> new_tokens;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t begin = query_start_loc[r], end = query_start_loc[r + 1];
    const int64_t state_index = calls[0].state_indices[r];
    if (state_index <= 0) {
      for (const Call& call : calls) answer_zero(call, begin, end);
    } else if (end > begin) {
      new_tokens.push_back({state_index, begin, context_lens[r], end - begin});
    }
  }
  if (new_tokens.empty()) return;
  int64_t bytes = 0;
  if (calls[0].layout.update_interval < kShortInterval) {
    const int64_t each = static_cast<int64_t>(new_tokens.size()) * calls[0].layout.num_kv_heads;
    for (const Call& call : calls) bytes = std::max(bytes, kernel.decode_bytes(call));
    const int64_t items = each * static_cast<int64_t>(calls.size());
    parallel(items, bytes, [&](int64_t begin, int64_t end, char* workspace) {
      for (int64_t i = begin; i < end; ++i) {
        const Call& call = calls[static_cast<std::size_t>(i / each)];
        kernel.decode_tokens(call, new_tokens.data(), i % each, i % each + 1, workspace);
      }
    });
    return;
  }
  for (const Call& call : calls) bytes = std::max(bytes, kernel.attend_bytes(call));
  PrefillScheduler scheduler(calls, kernel, new_tokens, torch::stable::get_num_threads());
  parallel(scheduler.threads(), bytes, [&](int64_t begin, int64_t end, char* workspace) {
    for (int64_t i = begin; i < end; ++i) scheduler.work(i, workspace);
  });
}

}  // namespace lola
