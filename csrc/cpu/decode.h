// Kernel body of decode: one query per head over one page, in one pass over the state.
//
// A work item is one row and sparse set with the query heads it serves. Keys are read once for all
// of these heads, then values once, then H once; logits of a set stay in L1. The new pair is taken
// from the inputs, so no item waits for another one's write.
#pragma once

#include "cpu/attend.h"
#include "cpu/update_bounded.h"
#if LOLA_BF16_DOTS
#include "cpu/bf16/decode_logits.h"
#endif

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// Rows of keys and values that lie one after the other.
struct Run {
  const char *k, *v;
  int64_t row_bytes, count;
};

template <typename T>
struct DecodeScratch {
  T *scaled, *z, *y, *sums, *asking, *feature, *phi, *linear, *W, *H, *s, *row;
  UpdateScratch<T> update;
  Ahead ahead;
};

template <typename T>
int64_t carve_decode(const LolaArgs& a, char* base, DecodeScratch<T>* x) {
  const int64_t heads = a.Hq / a.Hg, dp = round_up<T>(a.d), F2 = 2 * a.F, Fp = round_up<T>(a.F);
  const int64_t keys = round_up<T>(a.sink + a.ring() + a.lam + 1);
  int64_t used = 0;
  x->ahead.clear();
  x->scaled = take_as<T>(base, heads * dp, &used);
  x->z = take_as<T>(base, heads * keys, &used);
  x->y = take_as<T>(base, heads * dp, &used);
  x->sums = take_as<T>(base, 2 * heads, &used);
  x->asking = take_as<T>(base, kTurnItems * dp, &used);
  x->feature = take_as<T>(base, kTurnItems * Fp, &used);
  x->phi = take_as<T>(base, kTurnItems * heads * (round_up<T>(F2) + kLanes<T>), &used);
  x->linear = take_as<T>(base, heads * dp, &used);
  x->W = take_as<T>(base, a.d * Fp, &used);
  x->H = take_as<T>(base, F2 * dp, &used);
  x->s = take_as<T>(base, round_up<T>(F2), &used);
  x->row = take_as<T>(base, kRowChunk * dp, &used);
  return used + carve_update<T>(a, false, base == nullptr ? nullptr : base + used, &x->update);
}

// Logits, then weighted values, of `heads` query heads over one run.
template <typename T, DType D>
void runs_dot(const T* q, int64_t heads, int64_t d, const Run& run, T* z, int64_t ld, T* scratch,
              Ahead* ahead) {
  const int64_t dp = round_up<T>(d);
  int64_t h = 0;
  for (; h + kHeads <= heads; h += kHeads) {
    dot_heads<T, D, kHeads>(q + h * dp, d, run.k, run.row_bytes, ahead, run.count, z + h * ld, ld,
                            scratch);
    ahead = nullptr;  // the first heads have done the asking
  }
  if (heads - h == 3) {
    dot_heads<T, D, 3>(q + h * dp, d, run.k, run.row_bytes, ahead, run.count, z + h * ld, ld,
                       scratch);
  } else if (heads - h == 2) {
    dot_heads<T, D, 2>(q + h * dp, d, run.k, run.row_bytes, ahead, run.count, z + h * ld, ld,
                       scratch);
  } else if (heads - h == 1) {
    dot_heads<T, D, 1>(q + h * dp, d, run.k, run.row_bytes, ahead, run.count, z + h * ld, ld,
                       scratch);
  }
}

template <typename T, DType D>
void runs_add(const T* p, int64_t ld, int64_t heads, int64_t d, const Run& run, T* y, T* scratch,
              Ahead* ahead) {
  const int64_t dp = round_up<T>(d);
  int64_t h = 0;
  for (; h + kHeads <= heads; h += kHeads) {
    add_heads<T, D, kHeads>(p + h * ld, ld, run.v, run.row_bytes, run.count, y + h * dp, d, scratch,
                            ahead);
    ahead = nullptr;
  }
  if (heads - h == 3) {
    add_heads<T, D, 3>(p + h * ld, ld, run.v, run.row_bytes, run.count, y + h * dp, d, scratch,
                       ahead);
  } else if (heads - h == 2) {
    add_heads<T, D, 2>(p + h * ld, ld, run.v, run.row_bytes, run.count, y + h * dp, d, scratch,
                       ahead);
  } else if (heads - h == 1) {
    add_heads<T, D, 1>(p + h * ld, ld, run.v, run.row_bytes, run.count, y + h * dp, d, scratch,
                       ahead);
  }
}

// phi^T H of `heads` query heads that share a hidden state.
template <typename T>
void state_recall(const T* phi, int64_t ld, int64_t heads, const T* H, int64_t H_ld, int64_t F2,
                  T* y, int64_t dp, Ahead* ahead) {
  int64_t h = 0;
  for (; h + kHeads <= heads; h += kHeads) {
    recall_heads<T, kHeads>(phi + h * ld, ld, H, H_ld, F2, y + h * dp, dp, ahead);
  }
  if (heads - h == 3) {
    recall_heads<T, 3>(phi + h * ld, ld, H, H_ld, F2, y + h * dp, dp, ahead);
  } else if (heads - h == 2) {
    recall_heads<T, 2>(phi + h * ld, ld, H, H_ld, F2, y + h * dp, dp, ahead);
  } else if (heads - h == 1) {
    recall_heads<T, 1>(phi + h * ld, ld, H, H_ld, F2, y + h * dp, dp, ahead);
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

// Share of the exact pairs in a head's output: sigmoid(log of their weight over the linear one).
template <typename T>
LOLA_INLINE T exact_share(const LolaArgs& a, int64_t head, T largest, T sum, T D) {
  T log_gate;
  load_row(&log_gate, a.log_gate.at(head), a.log_gate.dtype, 1, 1);
  const T lse = __builtin_log(sum) + (a.subtract_max ? T(0) : largest);
  return T(1) / (T(1) + __builtin_exp(-(lse + log_gate - __builtin_log(D))));
}

// One query row and sparse set over its page, which n tokens have seen with this one.
struct DecodeItem {
  int64_t token, page, set, n;
};

constexpr int kRuns = 5;

// The exact pairs that an item sees, the new one last. Returns their number.
LOLA_INLINE int64_t runs_of(const LolaArgs& a, const DecodeItem& item, Run* runs) {
  const int64_t page = item.page, kv = item.set / (a.Hg / a.Hkv), position = item.n - 1;
  const int64_t bytes = a.d * size_of(a.exact_k.dtype);
  const int64_t start = a.window_start(position), sinks = position < a.sink ? position : a.sink;
  const int64_t cached = a.num_sparse(position), in_ring = position > start ? position - start : 0;
  const int64_t head_row = start % a.ring();
  const int64_t to_end = a.ring() - head_row, before_wrap = in_ring < to_end ? in_ring : to_end;
  runs[0] = {a.exact_k.at(page, kv, 0), a.exact_v.at(page, kv, 0), bytes, sinks};
  runs[1] = {a.sparse_k.at(page, item.set, 0), a.sparse_v.at(page, item.set, 0), bytes, cached};
  runs[2] = {a.exact_k.at(page, kv, a.sink + head_row), a.exact_v.at(page, kv, a.sink + head_row),
             bytes, before_wrap};
  runs[3] = {a.exact_k.at(page, kv, a.sink), a.exact_v.at(page, kv, a.sink), bytes,
             in_ring - before_wrap};
  runs[4] = {a.k.at(item.token, kv), a.v.at(item.token, kv), bytes, 1};
  return sinks + cached + in_ring + 1;
}

// Appends what an item reads to what memory is asked for. Returns the number of bytes.
inline int64_t announce(const LolaArgs& a, const DecodeItem& item, Ahead& ahead) {
  if (item.page <= 0) return 0;
  Run runs[kRuns];
  runs_of(a, item, runs);
  int64_t bytes = 0;
  for (int i = 0; i < kRuns - 1; ++i) {
    bytes += ahead.push(runs[i].k, runs[i].count * runs[i].row_bytes);
  }
  for (int i = 0; i < kRuns - 1; ++i) {
    bytes += ahead.push(runs[i].v, runs[i].count * runs[i].row_bytes);
  }
  if (a.num_folded(item.n - 1) <= 0) return bytes;
  const int64_t page = item.page, share = a.Hs / a.Hg, head = item.set * share;
  const Strided<4>&H = a.recall.H, &bounds = a.bounds;
  const Strided<3>& s = a.recall.s;
  bytes += ahead.push(H.at(page, head), share * H.stride[1] * size_of(H.dtype));
  bytes += ahead.push(s.at(page, head), share * s.stride[1] * size_of(s.dtype));
  if (!a.incremental) return bytes;
  bytes += ahead.push(bounds.at(page, head), share * bounds.stride[1] * size_of(bounds.dtype));
  return bytes + ahead.push(reinterpret_cast<char*>(a.direction_rows(page, head)),
                            share * a.directions_stride[1]);
}

// Where map_queries leaves the features of an item's queries, one row per head.
template <typename T>
LOLA_INLINE T* phi_of(const LolaArgs& a, int64_t item, const DecodeScratch<T>& x) {
  return x.phi + item * (a.Hq / a.Hg) * (round_up<T>(2 * a.F) + kLanes<T>);
}

// Features of the queries of the items of a turn, set after set as `decode_item` orders them: a
// feature map is read once for all rows of the turn.
template <typename T>
void map_queries(const LolaArgs& a, const DecodeItem* items, int64_t count, DecodeScratch<T>& x) {
  const int64_t d = a.d, dp = round_up<T>(d), Fp = round_up<T>(a.F), heads = a.Hq / a.Hg;
  const int64_t phi_ld = round_up<T>(2 * a.F) + kLanes<T>;
  for (int64_t head = 0; head < heads * (count < a.Hg ? count : a.Hg); ++head) {
    const int64_t first = head / heads, h = items[first].set * heads + head % heads;
    int64_t rows = 0;
    for (int64_t i = first; i < count; i += a.Hg) {
      if (items[i].page <= 0 || a.num_folded(items[i].n - 1) <= 0) continue;
      load_row(x.asking + rows++ * dp, a.q.at(items[i].token, h), a.q.dtype, d, dp);
    }
    if (rows == 0) continue;
    int64_t W_ld;
    const T* W = padded_matrix<T>(a.feature_map_q.at(h), a.feature_map_q.dtype,
                                  a.feature_map_q.stride[1], d, a.F, x.W, &W_ld);
    x.ahead.template ask<48>();
    gemm<T>(x.asking, dp, W, W_ld, x.feature, Fp, rows, Fp, d);
    rows = 0;
    for (int64_t i = first; i < count; i += a.Hg) {
      if (items[i].page <= 0 || a.num_folded(items[i].n - 1) <= 0) continue;
      feature_map(x.feature + rows++ * Fp, a.F, phi_of(a, i, x) + head % heads * phi_ld);
    }
  }
}

// Logits of an item into x.z, rows of `ld`, from x.scaled or the queries themselves.
template <typename T, DType D>
void logits(const LolaArgs& a, const DecodeItem& item, const Run* runs, int64_t ld,
            DecodeScratch<T>& x) {
  const int64_t heads = a.Hq / a.Hg;
  T* z = x.z;
#if LOLA_BF16_DOTS
  if constexpr (D == DType::bf16) {
    if (pairs_fit(a)) {
      const char* const q = a.q.at(item.token, item.set * heads);
      const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.d));
      for (int i = 0; i < kRuns; z += runs[i++].count) {
        pairs_dot(q, a.q.stride[1] * size_of(a.q.dtype), heads, runs[i].k, runs[i].row_bytes,
                  runs[i].count, scale, z, ld, &x.ahead);
      }
      return;
    }
  }
#endif
  for (int i = 0; i < kRuns; z += runs[i++].count) {
    runs_dot<T, D>(x.scaled, heads, a.d, runs[i], z, ld, x.row, &x.ahead);
  }
}

template <typename T, DType D>
void decode_set(const LolaArgs& a, const DecodeItem& item, const T* phi, DecodeScratch<T>& x) {
  const int64_t token = item.token, page = item.page, set = item.set, n = item.n;
  const int64_t d = a.d, dp = round_up<T>(d), F2 = 2 * a.F;
  const int64_t heads = a.Hq / a.Hg, first_head = set * heads, kv = set / (a.Hg / a.Hkv);
  const int64_t position = n - 1;
  const T scale = T(1) / __builtin_sqrt(static_cast<T>(d));
  for (int64_t h = 0; h < heads; ++h) {
    load_row(x.scaled + h * dp, a.q.at(token, first_head + h), a.q.dtype, d, dp);
    for (int64_t j = 0; j < dp; j += kLanes<T>) {
      store<T>(x.scaled + h * dp + j, load(x.scaled + h * dp + j) * scale);
      store<T>(x.y + h * dp + j, Vec<T>{});
    }
  }

  Run runs[kRuns];
  const int64_t keys = runs_of(a, item, runs), ld = round_up<T>(keys);
  logits<T, D>(a, item, runs, ld, x);
  for (int64_t h = 0; h < heads; ++h) {
    x.ahead.template ask<48>();
    x.sums[2 * h] = softmax_weights(x.z + h * ld, keys, x.sums + 2 * h + 1);
  }
  int64_t at = 0;
  for (const Run& run : runs) {
    runs_add<T, D>(x.z + at, ld, heads, d, run, x.y, x.row, &x.ahead);
    at += run.count;
  }
  for (int64_t h = 0; h < heads; ++h) {
    const T inverse = T(1) / x.sums[2 * h];
    for (int64_t j = 0; j < dp; j += kLanes<T>) {
      store<T>(x.y + h * dp + j, load(x.y + h * dp + j) * inverse);
    }
  }

  if (a.num_folded(position) > 0) {
    const int64_t phi_ld = round_up<T>(F2) + kLanes<T>, per_state = a.Hq / a.Hs;
    for (int64_t first = 0; first < heads; first += per_state) {
      const int64_t state = (first_head + first) / per_state;
      const RecallArgs& r = a.recall;
      int64_t H_ld;
      const T* H =
          padded_matrix<T>(r.H.at(page, state), r.H.dtype, r.H.stride[2], F2, d, x.H, &H_ld);
      load_row(x.s, r.s.at(page, state), r.s.dtype, F2, round_up<T>(F2));
      state_recall(phi + first * phi_ld, phi_ld, per_state, H, H_ld, F2, x.linear, dp, &x.ahead);
      for (int64_t i = 0; i < per_state; ++i) {
        const int64_t h = first + i;
        Vec<T> dot{};
        for (int64_t f = 0; f < round_up<T>(F2); f += kLanes<T>) {
          dot = fma(load(phi + h * phi_ld + f), load(x.s + f), dot);
        }
        const T D_h = reduce<Sum>(dot);
        const T share = exact_share<T>(a, first_head + h, x.sums[2 * h + 1], x.sums[2 * h], D_h);
        const T rest = (T(1) - share) / D_h;
        for (int64_t j = 0; j < dp; j += kLanes<T>) {
          store<T>(x.y + h * dp + j,
                   load(x.y + h * dp + j) * share + load(x.linear + i * dp + j) * rest);
        }
      }
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    store_row(a.out.at(token, first_head + h), x.y + h * dp, a.out.dtype, d);
  }

  if (set % (a.Hg / a.Hkv) == 0) {
    const Run& fresh = runs[kRuns - 1];
    copy_row(a.exact_k.at(page, kv, a.exact_row(position)), fresh.k, fresh.row_bytes);
    copy_row(a.exact_v.at(page, kv, a.exact_row(position)), fresh.v, fresh.row_bytes);
  }
  if (a.update_due(n)) update_alone<T>(a, page, set, n, x.update, &x.ahead);
}

// Zeros for the query heads of a set: the answer of a row that is padding.
inline void zero_set(const LolaArgs& a, int64_t token, int64_t set) {
  const int64_t heads = a.Hq / a.Hg;
  for (int64_t h = set * heads; h < (set + 1) * heads; ++h) {
    const auto bytes = static_cast<unsigned long>(a.d * size_of(a.out.dtype));
    __builtin_memset(a.out.at(token, h), 0, bytes);
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
