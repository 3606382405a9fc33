// Decode: one query per head over one page, in one pass over the state.
//
// A work item is one row and sparse set with the query heads that it serves. Keys are read once for
// all of these heads, then values once, then H once; logits of a set stay in L1. The new pair is
// taken from the inputs, so no item waits for another one's write.
#pragma once

#include "cpu/attend.h"
#include "cpu/call.h"
#include "cpu/gemm.h"
#include "cpu/int8_rows.h"
#include "cpu/mix.h"
#include "cpu/prefetch.h"
#include "cpu/recall.h"
#include "cpu/update.h"
#include "cpu/work_queue.h"
#include "cpu/workspace.h"
#if LOLA_BF16_DOTS
#include "cpu/bf16/decode_logits.h"
#endif

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// The dtype that keys and values of D are computed in.
template <DType D>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<DType::f64> {
  using type = double;
};
template <DType D>
using Compute = typename ComputeType<D>::type;

template <typename T>
struct DecodeWorkspace {
  T* scaled_q;  // [heads, d padded]: q / sqrt(d)
  T* z;         // [heads, keys padded]: logits, then weights
  T* y;         // [heads, d padded]
  T* sums;      // [heads, 2]: sum of weights, largest logit
  T* q;         // [kMaxTaskSize, d padded]: the queries of one head in a task
  T* mapped_q;  // [kMaxTaskSize, F padded]: q W
  T* phi;       // [kMaxTaskSize, heads, feature_stride()]
  T* linear;    // [heads, d padded]: phi^T H
  T* W;         // [d, F padded], where a map is copied
  T* H;         // [2F, d padded], where H is copied
  T* s;         // [2F padded]
  T* copies;    // [kCopiedRows, d padded]
  UpdateWorkspace<T> update;
  Prefetcher prefetcher;

  DecodeWorkspace(const PageLayout& layout, Workspace& memory)
      : scaled_q(memory.take<T>(layout.heads_per_set() * round_up<T>(layout.head_dim))),
        update(layout, false, memory) {
    const int64_t heads = layout.heads_per_set(), dp = round_up<T>(layout.head_dim);
    const int64_t F2 = 2 * layout.feature_dim, Fp = round_up<T>(layout.feature_dim);
    z = memory.take<T>(heads * round_up<T>(layout.exact_size() + layout.sparse_cache_size + 1));
    y = memory.take<T>(heads * dp);
    sums = memory.take<T>(2 * heads);
    q = memory.take<T>(kMaxTaskSize * dp);
    mapped_q = memory.take<T>(kMaxTaskSize * Fp);
    phi = memory.take<T>(kMaxTaskSize * heads * feature_stride<T>(layout));
    linear = memory.take<T>(heads * dp);
    W = memory.take<T>(layout.head_dim * Fp);
    H = memory.take<T>(F2 * dp);
    s = memory.take<T>(round_up<T>(F2));
    copies = memory.take<T>(kCopiedRows * dp);
    prefetcher.clear();
  }
};

// One query row and sparse set over its page, which n tokens have seen with this one.
struct DecodeItem {
  int64_t token;
  Page page;
  int64_t set, n;

  // Whether queries see pairs of the hidden state.
  bool recalls() const { return !page.is_padding() && page.layout->num_folded(n - 1) > 0; }
};

constexpr int kSegments = 5;

// The exact pairs that an item sees, the new one last. Returns their number.
LOLA_INLINE int64_t segments_of(const Call& call, const DecodeItem& item, Segment* segments) {
  const PageLayout& layout = call.layout;
  const Page& page = item.page;
  const int64_t kv = layout.kv_head_of(item.set), position = item.n - 1;
  const int64_t bytes = layout.pair_bytes(), sink = layout.sink_size, ring = layout.ring_size();
  const int64_t start = layout.window_start(position), sinks = position < sink ? position : sink;
  const int64_t cached = layout.num_sparse(position);
  const int64_t in_ring = position > start ? position - start : 0;
  const int64_t head_row = start % ring;
  const int64_t to_end = ring - head_row, before_wrap = in_ring < to_end ? in_ring : to_end;
  segments[0] = {page.exact_k(kv, 0), page.exact_v(kv, 0), bytes, sinks};
  segments[1] = {page.sparse_k(item.set, 0), page.sparse_v(item.set, 0), layout.sparse_bytes(),
                 cached};
  if (layout.int8_pairs()) {
    segments[1].k_scale = page.sparse_k_scale(item.set);
    segments[1].v_scale = page.sparse_v_scale(item.set);
  }
  segments[2] = {page.exact_k(kv, sink + head_row), page.exact_v(kv, sink + head_row), bytes,
                 before_wrap};
  segments[3] = {page.exact_k(kv, sink), page.exact_v(kv, sink), bytes, in_ring - before_wrap};
  segments[4] = {call.k.row(item.token, kv), call.v.row(item.token, kv), bytes, 1};
  return sinks + cached + in_ring + 1;
}

// Appends what an item reads of its page to what will be prefetched. Returns the number of bytes.
template <typename T>
int64_t push_reads(const Call& call, const DecodeItem& item, Prefetcher& prefetcher) {
  if (item.page.is_padding()) return 0;
  Segment segments[kSegments];
  segments_of(call, item, segments);
  int64_t bytes = 0;
  if (call.layout.int8_pairs()) {
    const auto size = static_cast<int64_t>(segments[1].count * sizeof(float));
    bytes +=
        prefetcher.push(segments[1].k_scale, size) + prefetcher.push(segments[1].v_scale, size);
  }
  for (int i = 0; i < kSegments - 1; ++i) {
    bytes += prefetcher.push(segments[i].k, segments[i].count * segments[i].row_bytes);
  }
  for (int i = 0; i < kSegments - 1; ++i) {
    bytes += prefetcher.push(segments[i].v, segments[i].count * segments[i].row_bytes);
  }
  if (!item.recalls()) return bytes;
  const PageLayout& layout = call.layout;
  const int64_t states = layout.states_per_set(), first = item.set * states;
  const int64_t F2 = 2 * layout.feature_dim, d = layout.head_dim;
  const auto size = static_cast<int64_t>(sizeof(T));
  bytes += prefetcher.push(item.page.H<T>(first), states * F2 * d * size);
  return bytes + prefetcher.push(item.page.s<T>(first), states * F2 * size);
}

// Where map_queries leaves the features of an item's queries, one row per head.
template <typename T>
LOLA_INLINE T* features_of(const Call& call, int64_t item, const DecodeWorkspace<T>& x) {
  return x.phi + item * call.layout.heads_per_set() * feature_stride<T>(call.layout);
}

// Features of the queries of the items of a task, set after set as `decode_item_at` orders them: a
// feature map is read once for all rows of the task.
template <typename T>
void map_queries(const Call& call, const DecodeItem* items, int64_t count, DecodeWorkspace<T>& x) {
  const PageLayout& layout = call.layout;
  const int64_t d = layout.head_dim, dp = round_up<T>(d), F = layout.feature_dim;
  const int64_t Fp = round_up<T>(F), heads = layout.heads_per_set();
  const int64_t phi_stride = feature_stride<T>(layout), sets = layout.num_sparse_heads;
  for (int64_t head = 0; head < heads * (count < sets ? count : sets); ++head) {
    const int64_t first = head / heads, h = items[first].set * heads + head % heads;
    int64_t rows = 0;
    for (int64_t i = first; i < count; i += sets) {
      if (!items[i].recalls()) continue;
      load_row(x.q + rows++ * dp, call.q.row(items[i].token, h), call.q.dtype, d, dp);
    }
    if (rows == 0) continue;
    const T* const W = padded_matrix(call.query_map<T>(h), d, F, x.W);
    x.prefetcher.template prefetch<48>();
    gemm<T>(x.q, dp, W, Fp, x.mapped_q, Fp, rows, Fp, d);
    rows = 0;
    for (int64_t i = first; i < count; i += sets) {
      if (!items[i].recalls()) continue;
      feature_map(x.mapped_q + rows++ * Fp, F, features_of(call, i, x) + head % heads * phi_stride);
    }
  }
}

// z[0 .. count) becomes exp(z - max); returns the sum, and the max through `largest`. z is padded
// to whole vectors.
template <typename T>
T softmax_weights(T* z, int64_t count, T* largest) {
  const int64_t padded = round_up<T>(count), whole = count / kLanes<T> * kLanes<T>;
  const IntVec<T> in_tail = first_lanes<T>(count - whole);
  if (whole < padded) store<T>(z + whole, in_tail ? load(z + whole) : splat(z[0]));
  Vec<T> high = load(z);
  for (int64_t i = kLanes<T>; i < padded; i += kLanes<T>) high = max(load(z + i), high);
  *largest = reduce<Max>(high);
  Vec<T> sum{};
  for (int64_t i = 0; i < padded; i += kLanes<T>) {
    Vec<T> e = exp(load(z + i) - *largest);
    if (i == whole) e = in_tail ? e : Vec<T>{};
    store<T>(z + i, e);
    sum += e;
  }
  return reduce<Sum>(sum);
}

// Logits of an item's heads with one segment into z, rows of `stride`.
template <DType D, typename T>
void segment_logits(const Call& call, [[maybe_unused]] const DecodeItem& item,
                    const Segment& segment, T* z, int64_t stride, DecodeWorkspace<T>& x) {
  const int64_t d = call.layout.head_dim, heads = call.layout.heads_per_set();
  if (segment.k_scale != nullptr) {
    for_head_groups<kHeads>(heads, SegmentLogits<T, DType::i8>{x.scaled_q, d, segment, z, stride,
                                                               x.copies, &x.prefetcher});
    for (int64_t h = 0; h < heads; ++h) multiply(segment.k_scale, segment.count, z + h * stride);
    return;
  }
#if LOLA_BF16_DOTS
  if constexpr (D == DType::bf16) {
    if (multiplies_pairs(call)) {
      const char* const q = call.q.row(item.token, item.set * heads);
      const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d));
      return for_head_groups<3>(
          heads, PairLogits{q, call.q.head_stride, segment, scale, z, stride, &x.prefetcher});
    }
  }
#endif
  for_head_groups<kHeads>(
      heads, SegmentLogits<T, D>{x.scaled_q, d, segment, z, stride, x.copies, &x.prefetcher});
}

// Adds an item's values of one segment to x.y. `weights` has rows of `stride`.
template <DType D, typename T>
void segment_values(const Call& call, const Segment& segment, T* weights, int64_t stride,
                    DecodeWorkspace<T>& x) {
  const int64_t d = call.layout.head_dim, heads = call.layout.heads_per_set();
  if (segment.v_scale != nullptr) {
    for (int64_t h = 0; h < heads; ++h) {
      multiply(segment.v_scale, segment.count, weights + h * stride);
    }
    return for_head_groups<kHeads>(
        heads,
        SegmentValues<T, DType::i8>{weights, stride, d, segment, x.y, x.copies, &x.prefetcher});
  }
  for_head_groups<kHeads>(
      heads, SegmentValues<T, D>{weights, stride, d, segment, x.y, x.copies, &x.prefetcher});
}

// Softmax attention of an item's heads with the exact pairs into x.y, and x.sums.
template <DType D, typename T>
LOLA_INLINE void attend_segments(const Call& call, const DecodeItem& item, const Segment* segments,
                                 int64_t keys, DecodeWorkspace<T>& x) {
  const int64_t d = call.layout.head_dim, dp = round_up<T>(d);
  const int64_t heads = call.layout.heads_per_set(), stride = round_up<T>(keys);
  const T scale = T(1) / __builtin_sqrt(static_cast<T>(d));
  for (int64_t h = 0; h < heads; ++h) {
    load_row(x.scaled_q + h * dp, call.q.row(item.token, item.set * heads + h), call.q.dtype, d,
             dp);
    for (int64_t j = 0; j < dp; j += kLanes<T>) {
      store<T>(x.scaled_q + h * dp + j, load(x.scaled_q + h * dp + j) * scale);
      store<T>(x.y + h * dp + j, Vec<T>{});
    }
  }
  T* z = x.z;
  for (int i = 0; i < kSegments; z += segments[i++].count) {
    segment_logits<D>(call, item, segments[i], z, stride, x);
  }
  for (int64_t h = 0; h < heads; ++h) {
    x.prefetcher.template prefetch<48>();
    const T sum = softmax_weights(x.z + h * stride, keys, x.sums + 2 * h + 1);
    x.sums[2 * h] = sum + sink_weight(call, item.set * heads + h, x.sums[2 * h + 1]);
  }
  z = x.z;
  for (int i = 0; i < kSegments; z += segments[i++].count) {
    segment_values<D>(call, segments[i], z, stride, x);
  }
  for (int64_t h = 0; h < heads; ++h) {
    const T inverse = T(1) / x.sums[2 * h];
    for (int64_t j = 0; j < dp; j += kLanes<T>) {
      store<T>(x.y + h * dp + j, load(x.y + h * dp + j) * inverse);
    }
  }
}

// Mixes what attend_segments() left with the hidden state; `phi` are the features of the queries.
template <typename T>
LOLA_INLINE void mix_state(const Call& call, const DecodeItem& item, const T* phi,
                           DecodeWorkspace<T>& x) {
  const PageLayout& layout = call.layout;
  const int64_t d = layout.head_dim, dp = round_up<T>(d), F2 = 2 * layout.feature_dim;
  const int64_t heads = layout.heads_per_set(), per_state = layout.heads_per_state();
  const int64_t phi_stride = feature_stride<T>(layout), first_head = item.set * heads;
  for (int64_t first = 0; first < heads; first += per_state) {
    const int64_t state_head = (first_head + first) / per_state;
    const T* const H = padded_matrix(item.page.H<T>(state_head), F2, d, x.H);
    load_padded(x.s, item.page.s<T>(state_head), F2, round_up<T>(F2));
    for_head_groups<kHeads>(per_state, StateProduct<T>{phi + first * phi_stride, phi_stride, H, F2,
                                                       dp, x.linear, &x.prefetcher});
    for (int64_t i = 0; i < per_state; ++i) {
      const int64_t h = first + i;
      const T D = feature_sum(phi + h * phi_stride, x.s, F2);
      const T exact = exact_weight(call, first_head + h, x.sums[2 * h + 1], x.sums[2 * h], D);
      const T linear = (T(1) - exact) / D;
      for (int64_t j = 0; j < dp; j += kLanes<T>) {
        store<T>(x.y + h * dp + j,
                 load(x.y + h * dp + j) * exact + load(x.linear + i * dp + j) * linear);
      }
    }
  }
}

// Answers an item's queries, writes the new pair, and updates the set where that is due. `phi` are
// the features of the queries.
template <DType D, typename T>
void decode_item(const Call& call, const DecodeItem& item, const T* phi, DecodeWorkspace<T>& x) {
  const PageLayout& layout = call.layout;
  const int64_t d = layout.head_dim, dp = round_up<T>(d);
  const int64_t heads = layout.heads_per_set(), first_head = item.set * heads;
  if (item.page.is_padding()) {  // the answer is zero
    for (int64_t h = first_head; h < first_head + heads; ++h) {
      const auto bytes = static_cast<unsigned long>(d * size_of(call.out.dtype));
      __builtin_memset(call.out.row(item.token, h), 0, bytes);
    }
    return;
  }
  Segment segments[kSegments];
  const int64_t keys = segments_of(call, item, segments);
  attend_segments<D>(call, item, segments, keys, x);
  if (item.recalls()) mix_state(call, item, phi, x);
  for (int64_t h = 0; h < heads; ++h) {
    store_row(call.out.row(item.token, first_head + h), x.y + h * dp, call.out.dtype, d);
  }

  if (item.set % layout.sets_per_kv_head() == 0) {
    const Segment& fresh = segments[kSegments - 1];
    const int64_t kv = layout.kv_head_of(item.set), row = layout.exact_row(item.n - 1);
    copy_bytes(item.page.exact_k(kv, row), fresh.k, fresh.row_bytes);
    copy_bytes(item.page.exact_v(kv, row), fresh.v, fresh.row_bytes);
  }
  if (layout.update_due(item.n)) update<T>(call, {item.page, item.set, item.n}, x.update);
}

// Item i of a step: rows in order, of each one its sets. What a page holds of these lies side by
// side, so memory is read in long stretches.
inline DecodeItem decode_item_at(const Call& call, int64_t i, const Indices& seq_lens) {
  const int64_t row = i / call.layout.num_sparse_heads;
  return {row, call.page(call.state_indices[row]), i % call.layout.num_sparse_heads, seq_lens[row]};
}

// Takes tasks until none is left. The next one is taken before the last item of a task, so that its
// pages can be prefetched in time.
template <DType D>
void decode_items(const Call& call, const Indices& seq_lens, WorkQueue& queue, char* memory) {
  using T = Compute<D>;
  Workspace workspace(memory);
  DecodeWorkspace<T> x(call.layout, workspace);
  int64_t reading = 0;  // bytes of the item at hand, once they were pushed
  for (int64_t task = queue.take(); task < queue.tasks;) {
    const int64_t first = task * queue.task_size, left = queue.items - first;
    const int64_t count = left < queue.task_size ? left : queue.task_size;
    DecodeItem own[kMaxTaskSize];
    for (int64_t i = 0; i < count; ++i) own[i] = decode_item_at(call, first + i, seq_lens);
    int64_t next_task = 0;
    for (int64_t i = 0; i < count; ++i) {
      int64_t next = first + i + 1;
      if (i + 1 == count) {
        next_task = queue.take();
        next = next_task * queue.task_size;
      }
      if (reading == 0) reading = push_reads<T>(call, own[i], x.prefetcher);
      const int64_t coming =
          next < queue.items
              ? push_reads<T>(call, decode_item_at(call, next, seq_lens), x.prefetcher)
              : 0;
      x.prefetcher.keep_distance(reading + coming);
      reading = coming;
      if (i == 0) map_queries(call, own, count, x);
      decode_item<D>(call, own[i], features_of(call, i, x), x);
    }
    queue.finish();
    task = next_task;
  }
}

// Prefill token by token: items [begin, end) of rows by KV heads.
template <DType D>
void decode_tokens(const Call& call, const NewTokens* rows, int64_t begin, int64_t end,
                   char* memory) {
  using T = Compute<D>;
  Workspace workspace(memory);
  DecodeWorkspace<T> x(call.layout, workspace);
  const int64_t sets = call.layout.sets_per_kv_head(), kv_heads = call.layout.num_kv_heads;
  for (int64_t i = begin; i < end; ++i) {
    const NewTokens& row = rows[i / kv_heads];
    const Page page = call.page(row.state_index);
    const int64_t kv = i % kv_heads;
    for (int64_t t = 0; t < row.count; ++t) {
      for (int64_t set = kv * sets; set < (kv + 1) * sets; ++set) {
        const DecodeItem item = {row.token + t, page, set, row.position + t + 1};
        map_queries(call, &item, 1, x);
        decode_item<D>(call, item, features_of(call, 0, x), x);
      }
    }
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
