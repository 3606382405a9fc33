// Prefill: a block of queries of one chunk of a prompt against one page.
//
// A chunk lies within one update interval, so all its queries see the same cache and hidden state,
// and of the window a prefix of the same list of keys. Logits are kept transposed, keys by columns
// of queries: the softmax then runs down the columns without a reduction across lanes.
#pragma once

#include "cpu/call.h"
#include "cpu/gemm.h"
#include "cpu/int8_rows.h"
#include "cpu/mix.h"
#include "cpu/query_block.h"
#include "cpu/recall.h"
#include "cpu/update.h"
#include "cpu/workspace.h"
#if LOLA_BF16_DOTS
#include "cpu/bf16/prefill_attend.h"
#endif

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// Queries per block: as many as keep the logits of their heads in L2. Where pairs of bfloat16 are
// multiplied, keys and values are laid out once per block, whatever its width.
inline int64_t max_block(const Call& call) {
  const bool wide = LOLA_BF16_DOTS && call.layout.kv_dtype == DType::bf16;
  const int64_t columns = wide ? 192 : 96, heads = call.layout.heads_per_set();
  return heads < columns ? columns / heads : 1;
}

// A column is one query of one head.
template <typename T>
struct PrefillWorkspace {
  T* q;         // [columns, d padded]
  T* y;         // [columns, d padded]
  T* limit;     // [columns]: keys that each one sees
  T* sum;       // [columns]: of the weights
  T* largest;   // [columns]: logit
  T* mapped_q;  // [block, F padded]: q W
  T* phi;       // [block, feature_stride()]
  T* linear;    // [block, d padded]: phi^T H
  T* W;         // [d, F padded], where a map is copied
  T* H;         // [2F, d padded], where H is copied
  T* s;         // [2F padded]
  T *k, *v;     // [keys, d padded]
  T* q_t;       // [d, columns]
  T* z;         // [keys, columns]: logits, then weights
#if LOLA_BF16_DOTS
  PairWorkspace pairs;  // in the place of the last four
#endif

  PrefillWorkspace(const Call& call, Workspace& memory) {
    const PageLayout& layout = call.layout;
    const int64_t d = layout.head_dim, dp = round_up<T>(d);
    const int64_t F2 = 2 * layout.feature_dim, Fp = round_up<T>(layout.feature_dim);
    const int64_t keys = layout.sparse_cache_size + layout.exact_size();
    const int64_t block = max_block(call), columns = round_up<T>(layout.heads_per_set() * block);
    q = memory.take<T>(columns * dp);
    y = memory.take<T>(columns * dp);
    limit = memory.take<T>(columns);
    sum = memory.take<T>(columns);
    largest = memory.take<T>(columns);
    mapped_q = memory.take<T>(block * Fp);
    phi = memory.take<T>(block * feature_stride<T>(layout));
    linear = memory.take<T>(block * dp);
    W = memory.take<T>(d * Fp);
    H = memory.take<T>(F2 * dp);
    s = memory.take<T>(round_up<T>(F2));
#if LOLA_BF16_DOTS
    if (sizeof(T) == 4 && attends_pairs(call)) {
      pairs = PairWorkspace(layout, columns, memory);
      return;
    }
#endif
    k = memory.take<T>(keys * dp);
    v = memory.take<T>(keys * dp);
    q_t = memory.take<T>(d * columns);
    z = memory.take<T>(keys * columns);
  }
};

// Query column m sees the first limit[m] of the keys, which are in the order sparse cache, sinks,
// window. Columns of padding see what the first ones see.
template <typename T>
void set_limits(const QueryBlock& block, int64_t columns, T* limit) {
  const int64_t cached = block.cached(), start = block.window_start();
  const int64_t sink = block.page.layout->sink_size;
  for (int64_t m = 0; m < columns; ++m) {
    const int64_t p = block.position + block.first + m % block.count;
    const int64_t exact = p < sink ? p + 1 : sink + p - start + 1;
    limit[m] = static_cast<T>(cached + exact);
  }
}

// Keys and values as T. Returns their number.
template <typename T>
int64_t gather_keys(const QueryBlock& block, PrefillWorkspace<T>& x) {
  const PageLayout& layout = *block.page.layout;
  const int64_t d = layout.head_dim, dp = round_up<T>(d), kv = layout.kv_head_of(block.set);
  const int64_t cached = block.cached(), sinks = block.sinks();
  int64_t n = 0;
  for (int64_t i = 0; i < cached; ++i, ++n) {
    load_sparse_k(block.page, block.set, i, x.k + n * dp, dp);
    load_sparse_v(block.page, block.set, i, x.v + n * dp, dp);
  }
  for (int64_t i = 0; i < sinks; ++i, ++n) {
    load_row(x.k + n * dp, block.page.exact_k(kv, i), layout.kv_dtype, d, dp);
    load_row(x.v + n * dp, block.page.exact_v(kv, i), layout.kv_dtype, d, dp);
  }
  for (int64_t p = block.window_start(); p < block.end(); ++p, ++n) {
    const int64_t row = layout.exact_row(p);
    load_row(x.k + n * dp, block.page.exact_k(kv, row), layout.kv_dtype, d, dp);
    load_row(x.v + n * dp, block.page.exact_v(kv, row), layout.kv_dtype, d, dp);
  }
  return n;
}

// z[s, m] becomes exp(z - max over the visible s), 0 where s >= limit[m]; sums and maxima per m.
template <typename T>
void softmax_columns(T* z, int64_t keys, int64_t columns, const T* limit, T* sum, T* largest) {
  for (int64_t m = 0; m < columns; m += kLanes<T>) {
    const Vec<T> visible = load(limit + m);
    const int64_t all = static_cast<int64_t>(reduce<Min>(visible));
    Vec<T> high = load(z + m);  // key 0 is visible to every query
    for (int64_t s = 1; s < keys; ++s) {
      const Vec<T> x = load(z + s * columns + m);
      high = max(s < all ? x : (splat(static_cast<T>(s)) < visible ? x : high), high);
    }
    Vec<T> total{};
    for (int64_t s = 0; s < keys; ++s) {
      Vec<T> e = exp(load(z + s * columns + m) - high);
      if (s >= all) e = splat(static_cast<T>(s)) < visible ? e : Vec<T>{};
      store<T>(z + s * columns + m, e);
      total += e;
    }
    store<T>(sum + m, total);
    store<T>(largest + m, high);
  }
}

// Softmax attention of a block's queries with the exact pairs: fills x.y, not divided by the sums
// yet, x.sum and x.largest.
template <typename T>
void attend_exact(const QueryBlock& block, PrefillWorkspace<T>& x) {
  const int64_t d = block.page.layout->head_dim, dp = round_up<T>(d);
  const int64_t M = block.page.layout->heads_per_set() * block.count, columns = round_up<T>(M);
  const T scale = T(1) / __builtin_sqrt(static_cast<T>(d));
  for (int64_t m = 0; m < columns; ++m) {
    const T* const q = x.q + m * dp;
    for (int64_t j = 0; j < d; ++j) x.q_t[j * columns + m] = m < M ? q[j] * scale : T(0);
  }
  const int64_t keys = gather_keys(block, x);
  gemm<T>(x.k, dp, x.q_t, columns, x.z, columns, keys, columns, d);
  softmax_columns(x.z, keys, columns, x.limit, x.sum, x.largest);
  gemm_transposed<T>(x.z, columns, x.v, dp, x.y, dp, M, dp, keys);
}

// The answers of a block: what attend_exact() found, mixed with the hidden state.
template <typename T>
void mix_block(const Call& call, const QueryBlock& block, PrefillWorkspace<T>& x) {
  const PageLayout& layout = call.layout;
  const int64_t d = layout.head_dim, dp = round_up<T>(d), L = block.count;
  const int64_t F = layout.feature_dim, F2 = 2 * F, Fp = round_up<T>(F);
  const int64_t heads = layout.heads_per_set(), phi_stride = feature_stride<T>(layout);
  const bool recalls = layout.num_folded(block.position) > 0;
  const T* H = nullptr;
  int64_t loaded = -1;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t head = block.set * heads + h;
    if (recalls) {
      const int64_t state_head = head / layout.heads_per_state();
      if (state_head != loaded) {
        H = padded_matrix(block.page.H<T>(state_head), F2, d, x.H);
        load_padded(x.s, block.page.s<T>(state_head), F2, round_up<T>(F2));
        loaded = state_head;
      }
      const T* const W = padded_matrix(call.query_map<T>(head), d, F, x.W);
      gemm<T>(x.q + h * L * dp, dp, W, Fp, x.mapped_q, Fp, L, Fp, d);
      for (int64_t t = 0; t < L; ++t) feature_map(x.mapped_q + t * Fp, F, x.phi + t * phi_stride);
      gemm<T>(x.phi, phi_stride, H, dp, x.linear, dp, L, dp, F2);
    }
    for (int64_t t = 0; t < L; ++t) {
      const int64_t m = h * L + t;
      const T total = x.sum[m] + sink_weight(call, head, x.largest[m]);
      T of_exact = T(1) / total, of_linear = 0;
      if (recalls) {
        const T D = feature_sum(x.phi + t * phi_stride, x.s, F2);
        const T weight = exact_weight(call, head, x.largest[m], total, D);
        of_exact *= weight;
        of_linear = (T(1) - weight) / D;
      }
      T* const y = x.y + m * dp;
      for (int64_t j = 0; j < dp; j += kLanes<T>) {
        Vec<T> sum = load(y + j) * of_exact;
        if (recalls) sum = fma(load(x.linear + t * dp + j), splat(of_linear), sum);
        store<T>(y + j, sum);
      }
      store_row(call.out.row(block.token + t, head), y, call.out.dtype, d);
    }
  }
}

template <typename T>
void attend_block(const Call& call, const QueryBlock& block, char* memory) {
  Workspace workspace(memory);
  PrefillWorkspace<T> x(call, workspace);
  const int64_t d = call.layout.head_dim, dp = round_up<T>(d), L = block.count;
  const int64_t heads = call.layout.heads_per_set(), M = heads * L;
  for (int64_t m = 0; m < M; ++m) {
    const char* const q = call.q.row(block.token + m % L, block.set * heads + m / L);
    load_row(x.q + m * dp, q, call.q.dtype, d, dp);
  }
  set_limits(block, round_up<T>(M), x.limit);
#if LOLA_BF16_DOTS
  if constexpr (sizeof(T) == 4) {
    if (attends_pairs(call)) {
      attend_pairs(call, block, x.pairs, {x.y, x.limit, x.sum, x.largest});
      return mix_block(call, block, x);
    }
  }
#endif
  attend_exact(block, x);
  mix_block(call, block, x);
}

// --- updates of the sparse sets of one KV head, in memory that begins with one for each ---

// Divides the memory of the updates; returns the bytes needed (with null: only that).
template <typename T>
int64_t open_updates(const Call& call, char* memory) {
  Workspace workspace(memory);
  const int64_t sets = call.layout.sets_per_kv_head();
  auto* const updates = workspace.take<UpdateWorkspace<T>>(sets);
  for (int64_t i = 0; i < sets; ++i) {
    const UpdateWorkspace<T> x(call.layout, true, workspace);
    if (memory != nullptr) updates[i] = x;
  }
  return workspace.bytes();
}

// The update that a chunk ends with, of one set.
template <typename T>
void decide_chunk(const Call& call, const NewTokens& chunk, int64_t set, char* memory) {
  auto* const updates = reinterpret_cast<UpdateWorkspace<T>*>(memory);
  decide_update(call, {call.page(chunk.state_index), set, chunk.position + chunk.count},
                updates[set % call.layout.sets_per_kv_head()]);
}

// The same of all sets of the KV head.
template <typename T>
void commit_chunk(const Call& call, const NewTokens& chunk, int64_t kv_head, char* memory) {
  auto* const updates = reinterpret_cast<UpdateWorkspace<T>*>(memory);
  const int64_t sets = call.layout.sets_per_kv_head();
  for (int64_t i = 0; i < sets; ++i) {
    const UpdatePoint at = {call.page(chunk.state_index), kv_head * sets + i,
                            chunk.position + chunk.count};
    commit_update(at, updates[i]);
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
