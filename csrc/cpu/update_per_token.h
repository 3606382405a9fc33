// The update of one page and sparse set where the interval is 1 (docs/algorithm.md, section 3): one
// pair is evicted and at most one folded, so most scores need not be computed anew.
//
// Bounds on recall errors follow each fold by Lemma 1 (drift_bounds.h), and an error is computed
// anew only where Lemma 3 does not rule it out (rescore_doubtful). The choice is the one that all
// scores would give.
#pragma once

#include "cpu/call.h"
#include "cpu/candidates.h"
#include "cpu/dithered_sum.h"
#include "cpu/drift_bounds.h"
#include "cpu/importance.h"
#include "cpu/prefetch.h"
#include "cpu/recall.h"
#include "cpu/workspace.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

constexpr int64_t kRescoreBlock = 96;  // pairs scored at once: whole tiles, phi stays in L2

// What the bounded updates of a sparse set need. They keep nothing: the page holds the bounds.
template <typename T>
struct PerTokenUpdate {
  RecallWorkspace<T> recall;
  T* scores;           // [set]
  T* sums;             // [kRescoreBlock]
  T* dither;           // [2F padded]: of the rows of H
  T* incoming;         // [states, kBounds]: bounds of the evicted pair,
  int8_t* directions;  // [states, d]: and its directions
  int32_t* order;      // [set]

  PerTokenUpdate() = default;
  PerTokenUpdate(const PageLayout& layout, Workspace& memory)
      : recall(layout, kRescoreBlock, memory) {
    const int64_t states = layout.states_per_set();
    scores = memory.take<T>(layout.sparse_cache_size);
    sums = memory.take<T>(kRescoreBlock);
    dither = memory.take<T>(round_up<T>(2 * layout.feature_dim));
    incoming = memory.take<T>(kBounds * states);
    directions = memory.take<int8_t>(layout.head_dim * states);
    order = memory.take<int32_t>(layout.sparse_cache_size);
  }

  ErrorBounds<T> incoming_bounds(int64_t j, int64_t d) const {
    return {incoming + kBounds * j, 1, directions + d * j};
  }
};

// Computes the recall errors of `count` pairs of one state head, whose keys and values are in
// x.recall, into x.recall.errors. What bounds that of the i-th from here on goes to pair at[i] of
// `to`.
template <typename T>
void measure(const Call& call, const Candidates& c, int64_t state_head, int64_t count,
             const ErrorBounds<T>& to, const int32_t* at, PerTokenUpdate<T>& x) {
  const int64_t d = c.layout.head_dim, dp = round_up<T>(d);
  const int64_t phi_stride = feature_stride<T>(c.layout);
  const RecallWorkspace<T>& y = x.recall;
  map_keys(call, state_head, c.n, count, y, y.phi);
  if (!c.empty) recall_errors<T>(c.page, state_head, y.phi, count, y, y.errors, x.sums);
  for (int64_t i = 0; i < count; ++i) {
    T* const n = y.predicted + i * dp;
    const T* const v = y.v + i * dp;
    const T value = norm(v, dp);
    if (c.empty) {
      for (int64_t j = 0; j < dp; ++j) n[j] = 0;
      y.errors[i] = value;
      x.sums[i] = kRecallEps<T>;
    }
    to.row(kSum)[at[i]] = x.sums[i];
    to.row(kValue)[at[i]] = value;
    to.row(kFeatures)[at[i]] = norm(y.phi + i * phi_stride, round_up<T>(2 * c.layout.feature_dim));
    const T low = store_direction(v, n, T(1) / x.sums[i], d, n, to.directions + at[i] * d,
                                  to.row(kAlong) + at[i], to.row(kScale) + at[i]);
    // The slack is far beyond rounding errors.
    to.row(kLow)[at[i]] = low - (y.errors[i] + value) * kBoundSlack<T>;
  }
}

// Computes the listed scores of a set anew.
template <typename T>
void rescore(const Call& call, const Candidates& c, const int32_t* list, int64_t listed,
             PerTokenUpdate<T>& x) {
  const int64_t states = c.layout.states_per_set(), d = c.layout.head_dim, dp = round_up<T>(d);
  for (int64_t first = 0; first < listed; first += kRescoreBlock, list += kRescoreBlock) {
    const int64_t left = listed - first, size = left < kRescoreBlock ? left : kRescoreBlock;
    for (int64_t i = 0; i < size; ++i) {
      c.load_k(list[i], x.recall.k + i * d, d);
      c.load_v(list[i], x.recall.v + i * dp, dp);
    }
    for (int64_t j = 0; j < states; ++j) {
      const int64_t state_head = c.set * states + j;
      const ErrorBounds<T> b = c.page.bounds<T>(state_head);
      measure<T>(call, c, state_head, size, b, list, x);
      for (int64_t i = 0; i < size; ++i) {
        const T score = score_of<T, T>(x.recall.errors[i], b.row(kValue)[list[i]], states > 1);
        x.scores[list[i]] = j == 0 ? score : x.scores[list[i]] + score;
      }
    }
    if (c.layout.has_score_weights) {
      const T* const importance = c.page.score_weights<T>(c.set);
      for (int64_t i = 0; i < size; ++i) x.scores[list[i]] *= importance[list[i]];
    }
  }
}

// Lower bounds on the scores of a set's cached pairs, into x.scores.
template <typename T>
void bound_scores(const Candidates& c, PerTokenUpdate<T>& x) {
  const int64_t states = c.layout.states_per_set(), size = c.layout.sparse_cache_size;
  for (int64_t j = 0; j < states; ++j) {
    const ErrorBounds<T> b = c.page.bounds<T>(c.set * states + j);
    const T *const low = b.row(kLow), *const value = b.row(kValue);
    int64_t i = 0;
    for (; i + kLanes<T> <= size; i += kLanes<T>) {
      const Vec<T> score = score_of<T, Vec<T>>(load(low + i), load(value + i), states > 1);
      store<T>(x.scores + i, j == 0 ? score : load(x.scores + i) + score);
    }
    for (; i < size; ++i) {
      const T score = score_of<T, T>(low[i], value[i], states > 1);
      x.scores[i] = j == 0 ? score : x.scores[i] + score;
    }
  }
  if (c.layout.has_score_weights) weigh(c.page.score_weights<T>(c.set), size, x.scores);
}

// The least of x.scores; a NaN counts as the largest.
template <typename T>
T least_score(int64_t count, const PerTokenUpdate<T>& x) {
  Vec<T> low = splat(static_cast<T>(__builtin_inff()));
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) low = min(load(x.scores + i), low);
  T least = reduce<Min>(low);
  for (; i < count; ++i) least = x.scores[i] < least ? x.scores[i] : least;
  return least;
}

// Lists the indices of x.scores that are at most `limit` in x.order, ascending. Returns their
// number.
template <typename T>
int64_t list_up_to(T limit, int64_t count, PerTokenUpdate<T>& x) {
  int64_t listed = 0;
  for (int64_t first = 0; first < count; first += kLanes<T>) {
    const int64_t left = count - first, lanes = left < kLanes<T> ? left : kLanes<T>;
    if (lanes == kLanes<T> && !any(load(x.scores + first) <= limit)) continue;
    for (int64_t i = first; i < first + lanes; ++i) {
      if (x.scores[i] <= limit) x.order[listed++] = static_cast<int32_t>(i);
    }
  }
  return listed;
}

// Makes x.scores, bounds so far, exact wherever they may be the least and below `limit`.
template <typename T>
void rescore_doubtful(const Call& call, const Candidates& c, T limit, PerTokenUpdate<T>& x) {
  const int64_t size = c.layout.sparse_cache_size;
  const T low = least_score(size, x);
  if (!(low < limit)) return;
  list_up_to(low, size, x);
  // The likely least one first: its score rules out most others.
  const int32_t likely = x.order[0];
  rescore(call, c, &likely, 1, x);
  if (x.scores[likely] < limit) limit = x.scores[likely];
  int64_t listed = 0, found = list_up_to(limit, size, x);
  for (int64_t i = 0; i < found; ++i) {
    if (x.order[i] != likely) x.order[listed++] = x.order[i];
  }
  rescore(call, c, x.order, listed, x);
}

// The entry of the pair that is folded in place of an incoming pair of this score, or -1: the
// incoming pair itself is folded, as it also is at a tie, being the youngest.
template <typename T>
int64_t folded_entry(const Call& call, const Candidates& c, T incoming, PerTokenUpdate<T>& x) {
  const int64_t size = c.layout.sparse_cache_size;
  bound_scores(c, x);
  rescore_doubtful(call, c, incoming, x);
  const T low = least_score(size, x);
  const int32_t* const positions = c.page.positions(c.set);
  if (!(low < incoming)) return -1;
  const int64_t least = list_up_to(low, size, x);
  int64_t folded = x.order[0];
  for (int64_t i = 1; i < least; ++i) {
    if (positions[x.order[i]] > positions[folded]) folded = x.order[i];
  }
  return folded;
}

// H += phi v^T, s += phi for one pair, in update number `update`. Where they are empty, H and s
// hold leftovers and are written instead.
template <typename T>
void fold_one(const Candidates& c, int64_t state_head, int64_t update, const T* phi, const T* v,
              PerTokenUpdate<T>& x, Prefetcher* prefetcher) {
  const int64_t d = c.layout.head_dim, dp = round_up<T>(d);
  const int64_t F2 = 2 * c.layout.feature_dim, phi_padded = round_up<T>(F2);
  T *const stored_H = c.page.H<T>(state_head), *const stored_s = c.page.s<T>(state_head);
  const bool in_place = d == dp && !c.empty;
  T *const s = x.recall.s, *const places = x.dither;
  for (int64_t f = 0; f < phi_padded; ++f) places[f] = dither<T>(update, f);
  for (int64_t f = 0; f < F2; ++f) {
    prefetcher->prefetch<2>();
    T* const stored = stored_H + f * d;
    const Vec<T> weight = splat(phi[f]), place = splat(places[f]);
    if (in_place) {
      for (int64_t j = 0; j < dp; j += kLanes<T>) {
        store<T>(stored + j, add_dithered<T>(load(stored + j), weight * load(v + j), place));
      }
      continue;
    }
    T* const row = x.recall.predicted;  // room for one row
    if (!c.empty) load_padded(row, stored, d, dp);
    for (int64_t j = 0; j < dp; j += kLanes<T>) {
      const Vec<T> old = c.empty ? Vec<T>{} : load(row + j);
      store<T>(row + j, add_dithered<T>(old, weight * load(v + j), place));
    }
    copy_row(stored, row, d);
  }
  if (c.empty) {
    for (int64_t f = 0; f < phi_padded; ++f) s[f] = 0;
  } else {
    load_padded(s, stored_s, F2, phi_padded);
  }
  for (int64_t f = 0; f < phi_padded; f += kLanes<T>) {
    store<T>(s + f, add_dithered<T>(load(s + f), load(phi + f), load(places + f)));
  }
  copy_row(stored_s, s, F2);
}

// Puts the evicted pair with its bounds and its importance, if there is one, into an entry.
template <typename T>
void put_incoming(const Candidates& c, int64_t entry, T importance, const PerTokenUpdate<T>& x) {
  const int64_t d = c.layout.head_dim;
  c.put(c.cached, entry, x.recall.predicted);
  c.page.positions(c.set)[entry] = static_cast<int32_t>(c.start);
  if (c.layout.has_score_weights) c.page.score_weights<T>(c.set)[entry] = importance;
  for (int64_t j = 0; j < c.layout.states_per_set(); ++j) {
    const ErrorBounds<T> b = c.page.bounds<T>(c.set * c.layout.states_per_set() + j);
    for (int64_t r = 0; r < kBounds; ++r)
      b.rows[r * b.stride + entry] = x.incoming[kBounds * j + r];
    copy_row(b.directions + entry * d, x.directions + d * j, d);
  }
}

// The update at one point.
template <typename T>
void update_per_token(const Call& call, const UpdatePoint& at, PerTokenUpdate<T>& x,
                      Prefetcher* prefetcher) {
  const Candidates c(at);
  const int64_t states = c.layout.states_per_set(), d = c.layout.head_dim, dp = round_up<T>(d);
  const int64_t size = c.layout.sparse_cache_size;
  const bool folds = c.cached == size;
  const RecallWorkspace<T>& y = x.recall;
  c.load_k(c.cached, y.k, d);
  c.load_v(c.cached, y.v, dp);
  const T importance =
      c.layout.has_score_weights ? pair_importance(call, c.kv_head, y.k, y.v) : T(1);
  T incoming = 0;
  const int32_t only = 0;
  for (int64_t j = 0; j < states; ++j) {
    const ErrorBounds<T> b = x.incoming_bounds(j, d);
    measure<T>(call, c, c.set * states + j, 1, b, &only, x);
    const T score = score_of<T, T>(y.errors[0], *b.row(kValue), states > 1);
    incoming = j == 0 ? score : incoming + score;
  }
  incoming *= importance;
  if (incoming != incoming) incoming = static_cast<T>(__builtin_inff());  // NaN counts as infinite

  const int64_t folded = folds ? folded_entry(call, c, incoming, x) : -1;
  if (folds) {  // what will be folded, before the incoming pair takes its place
    c.load_k(folded < 0 ? c.cached : folded, y.k, d);
    c.load_v(folded < 0 ? c.cached : folded, y.v, dp);
  }
  const int64_t entry = folds ? folded : c.cached;  // where the incoming pair goes, if anywhere
  if (entry >= 0) put_incoming(c, entry, importance, x);
  for (int64_t j = 0; folds && j < states; ++j) {
    const int64_t state_head = c.set * states + j;
    map_keys(call, state_head, c.n, 1, y, y.phi);
    fold_one(c, state_head, at.n, y.phi, y.v, x, prefetcher);
    lower_bounds(c.page.bounds<T>(state_head), size, d, y.phi,
                 round_up<T>(2 * c.layout.feature_dim), y.v, x.scores, prefetcher);
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
