// The update of one page and sparse set after a token (docs/algorithm.md, section 3): it evicts,
// scores all cached and evicted pairs, but for those that Lemmas 1 and 2 let it leave out
// (carried_bounds.h), keeps those of largest score, and folds the others into H and s.
//
// It is decided first, which only reads the page, and carried out then: prefill answers queries
// while it decides.
#pragma once

#include "cpu/call.h"
#include "cpu/candidates.h"
#include "cpu/carried_bounds.h"
#include "cpu/dithered_sum.h"
#include "cpu/importance.h"
#include "cpu/recall.h"
#include "cpu/select.h"
#include "cpu/workspace.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

constexpr int64_t kUpdateBlock = 96;  // candidates scored at once: whole tiles, phi stays in L2

// What the updates of one sparse set need, and what they know from one to the next.
template <typename T>
struct UpdateWorkspace {
  RecallWorkspace<T> recall;
  Features<T> features;
  CarriedBounds<T> bounds;
  bool carries;                // whether `bounds` is used
  bool keeps_features;         // from update to update, of all candidates
  T* scores;                   // [candidates]
  T* highest;                  // [candidates]
  T* importance;               // [candidates], where the layout has it: what weighs their scores
  T* block_scores;             // [kUpdateBlock]
  T* sums;                     // [kUpdateBlock]
  T *mean, *s_residual;        // [d padded]
  T* dH;                       // [2F, d padded]
  T* ds;                       // [2F padded]
  T* dither;                   // [2F padded]: of the rows of H
  int32_t *positions, *order;  // [candidates]
  int32_t* folded;             // [candidates]: the first num_folded, of the update decided last
  int64_t num_folded = 0;
  unsigned char* keep;  // [candidates]

  UpdateWorkspace() = default;
  // `carry`: whether features are kept from update to update, and bounds, where a layer's can be.
  UpdateWorkspace(const PageLayout& layout, bool carry, Workspace& memory)
      : recall(layout, kUpdateBlock, memory),
        features(layout, memory),
        carries(carry && carries_bounds(layout)),
        keeps_features(carry) {
    const int64_t count = max_candidates(layout), dp = round_up<T>(layout.head_dim);
    const int64_t F2 = 2 * layout.feature_dim;
    if (carries) bounds = CarriedBounds<T>(layout, memory);
    scores = memory.take<T>(count);
    highest = memory.take<T>(count);
    importance = memory.take<T>(layout.has_score_weights ? count : 0);
    block_scores = memory.take<T>(kUpdateBlock);
    sums = memory.take<T>(kUpdateBlock);
    mean = memory.take<T>(dp);
    s_residual = memory.take<T>(dp);
    dH = memory.take<T>(F2 * dp);
    ds = memory.take<T>(round_up<T>(F2));
    dither = memory.take<T>(round_up<T>(F2));
    positions = memory.take<int32_t>(count);
    order = memory.take<int32_t>(count);
    folded = memory.take<int32_t>(count);
    keep = memory.take<unsigned char>(count);
  }
};

// Scores of the listed candidates into x.scores: SRE, or the norm-relative mean over a set's state
// heads, times the importance. Sets bounds on the SRE where `bound` says so.
template <typename T>
void score(const Candidates& c, const int32_t* list, int64_t listed, bool bound,
           UpdateWorkspace<T>& x) {
  const int64_t states = c.layout.states_per_set(), d = c.layout.head_dim, dp = round_up<T>(d);
  const int64_t phi_stride = x.features.stride;
  T* const errors = x.recall.errors;
  for (int64_t first = 0; first < listed; first += kUpdateBlock) {
    const int64_t left = listed - first, size = left < kUpdateBlock ? left : kUpdateBlock;
    const int32_t* const block = list + first;
    const bool adjacent = block[size - 1] - block[0] == size - 1;  // lists ascend
    for (int64_t i = 0; i < size; ++i) {
      c.load_v(block[i], x.recall.v + i * dp, dp);
    }
    T* const scores = x.block_scores;
    for (int64_t j = 0; j < states; ++j) {
      T* const out = states == 1 ? scores : errors;
      if (c.empty) {
        for (int64_t i = 0; i < size; ++i) out[i] = norm(x.recall.v + i * dp, dp);
      } else {
        const T* phi = x.features.row(j, block[0]);
        if (!adjacent) {
          phi = x.recall.phi;
          for (int64_t i = 0; i < size; ++i) {
            copy_row(x.recall.phi + i * phi_stride, x.features.row(j, block[i]), phi_stride);
          }
        }
        recall_errors<T>(c.page, c.set * states + j, phi, size, x.recall, out,
                         bound ? x.sums : nullptr);
      }
      if (states > 1) add_relative(x.recall.v, dp, errors, size, j == 0, scores);
    }
    for (int64_t i = 0; i < size; ++i) {
      const T score = states > 1 ? scores[i] / static_cast<T>(states) : scores[i];
      x.scores[block[i]] = c.layout.has_score_weights ? score * x.importance[block[i]] : score;
      if (!bound) continue;
      x.bounds.set(block[i], score, x.features.row(0, block[i]),
                   round_up<T>(2 * c.layout.feature_dim), x.recall.predicted + i * dp, dp,
                   x.sums[i]);
    }
  }
}

// Lists the candidates that are not recent in x.order, ascending. Returns their number.
template <typename T>
int64_t list_old(const Candidates& c, UpdateWorkspace<T>& x) {
  int64_t listed = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    if (x.positions[i] < c.first_recent) x.order[listed++] = static_cast<int32_t>(i);
  }
  return listed;
}

// Scores of all candidates that can be folded, infinity for the others. `old` says how many are
// not recent; their list is in x.order.
template <typename T>
void score_needed(const Candidates& c, int64_t old, UpdateWorkspace<T>& x) {
  const bool carry = x.carries && !c.empty;
  const bool weighs = c.layout.has_score_weights;
  const int64_t known = carry ? x.bounds.known : 0, dp = round_up<T>(c.layout.head_dim);
  const bool all_fold = old == c.count - c.layout.sparse_cache_size;
  unsigned char* const scored = x.keep;  // which select_largest() fills later
  for (int64_t i = 0; i < c.count; ++i) {
    x.scores[i] = __builtin_inff();
    scored[i] = 0;
    if (carry && i >= known) x.bounds.unset(i, dp);
  }
  if (carry) x.bounds.known = c.count;
  int32_t* const list = x.order;
  int64_t listed = 0;
  for (int64_t j = 0; j < old; ++j) {
    const int32_t i = list[j];
    if (all_fold) x.scores[i] = 0;
    if (all_fold || (carry && x.bounds.is_set[i])) continue;
    list[listed++] = i;
    scored[i] = 1;
  }
  score(c, list, listed, carry, x);
  if (known == 0 || all_fold) return;
  for (int64_t i = 0; i < c.count; ++i) {
    x.highest[i] = x.positions[i] < c.first_recent ? x.bounds.high[i] : T(__builtin_inff());
  }
  if (weighs) weigh(x.importance, c.count, x.highest);
  const T limit = kth_smallest(x.highest, c.count, c.count - c.layout.sparse_cache_size);
  listed = 0;
  for (int64_t i = 0; i < known; ++i) {
    if (scored[i] || x.positions[i] >= c.first_recent) continue;
    const T low = weighs ? x.bounds.low[i] * x.importance[i] : x.bounds.low[i];
    if (!(low > limit)) list[listed++] = static_cast<int32_t>(i);
  }
  score(c, list, listed, true, x);
}

// H += sum phi(k) v^T and s += sum phi(k) over the folded pairs of update `update`, for state head
// j of the set. Where they are empty, H and s hold leftovers and are written instead.
template <typename T>
void fold(const Candidates& c, int64_t j, int64_t update, UpdateWorkspace<T>& x) {
  const int64_t d = c.layout.head_dim, dp = round_up<T>(d);
  const int64_t F2 = 2 * c.layout.feature_dim, phi_stride = x.features.stride;
  const int64_t state_head = c.set * c.layout.states_per_set() + j;
  T *const stored_s = c.page.s<T>(state_head), *const stored_H = c.page.H<T>(state_head);
  for (int64_t first = 0; first < x.num_folded; first += kUpdateBlock) {
    const int64_t left = x.num_folded - first, size = left < kUpdateBlock ? left : kUpdateBlock;
    const bool write = c.empty && first == 0;
    T *const s = x.recall.s, *const ds = x.ds;
    for (int64_t f = 0; f < round_up<T>(F2); ++f) {
      ds[f] = 0;
      x.dither[f] = dither<T>(update, first / kUpdateBlock * F2 + f);
    }
    if (write) {
      for (int64_t f = 0; f < round_up<T>(F2); ++f) s[f] = 0;
    } else {
      load_padded(s, stored_s, F2, round_up<T>(F2));
    }
    for (int64_t i = 0; i < size; ++i) {
      const T* const from = x.features.row(j, x.folded[first + i]);
      T* const phi = x.recall.phi + i * phi_stride;
      for (int64_t f = 0; f < round_up<T>(F2); f += kLanes<T>) {
        const Vec<T> y = load(from + f);
        store<T>(phi + f, y);
        store<T>(ds + f, load(ds + f) + y);
      }
      c.load_v(x.folded[first + i], x.recall.v + i * dp, dp);
    }
    gemm_transposed<T>(x.recall.phi, phi_stride, x.recall.v, dp, x.dH, dp, F2, dp, size);
    if (x.carries) {
      for (int64_t i = 0; i < dp; i += kLanes<T>) {
        Vec<T> sum{};
        for (int64_t e = 0; e < size; ++e) sum += load(x.recall.v + e * dp + i);
        store<T>(x.mean + i, sum * (T(1) / static_cast<T>(size)));
      }
      carry_bounds<T>(c, x.features.row(0, 0), phi_stride, {x.dH, ds, s, x.mean, x.s_residual},
                      x.recall.v, x.bounds);
    }
    for (int64_t f = 0; f < round_up<T>(F2); f += kLanes<T>) {
      store<T>(s + f, add_dithered<T>(load(s + f), load(ds + f), load(x.dither + f)));
    }
    copy_row(stored_s, s, F2);
    for (int64_t f = 0; f < F2; ++f) {
      T* const row = stored_H + f * d;
      if (write) {
        copy_row(row, x.dH + f * dp, d);
        continue;
      }
      T* const sum = x.recall.predicted;  // room for one row
      load_padded(sum, row, d, dp);
      for (int64_t i = 0; i < dp; i += kLanes<T>) {
        const Vec<T> more = load(x.dH + f * dp + i);
        store<T>(sum + i, add_dithered<T>(load(sum + i), more, splat(x.dither[f])));
      }
      copy_row(row, sum, d);
    }
  }
}

// x.importance of all candidates: the page has that of cached ones.
template <typename T>
void find_importance(const Call& call, const Candidates& c, UpdateWorkspace<T>& x) {
  const int64_t d = c.layout.head_dim;
  copy_row(x.importance, c.page.score_weights<T>(c.set), c.cached);
  for (int64_t i = c.cached; i < c.count; ++i) {
    c.load_k(i, x.recall.k, d);
    c.load_v(i, x.recall.v, d);
    x.importance[i] = pair_importance(call, c.kv_head, x.recall.k, x.recall.v);
  }
}

// The i-th kept incoming pair goes to the i-th entry that is empty or whose pair was folded.
template <typename T>
void replace(const Candidates& c, UpdateWorkspace<T>& x) {
  const int64_t size = c.layout.sparse_cache_size;
  int32_t* const positions = c.page.positions(c.set);
  int64_t entry = 0;
  for (int64_t i = c.cached; i < c.count; ++i) {
    if (!x.keep[i]) continue;
    while (entry < c.cached && x.keep[entry]) ++entry;
    c.put(i, entry, x.recall.k);
    for (int64_t j = 0; i < x.features.known && i != entry && j < c.layout.states_per_set(); ++j) {
      copy_row(x.features.row(j, entry), x.features.row(j, i), x.features.stride);
    }
    if (x.carries && i < x.bounds.known) x.bounds.move(i, entry, round_up<T>(c.layout.head_dim));
    if (c.layout.has_score_weights) c.page.score_weights<T>(c.set)[entry] = x.importance[i];
    positions[entry++] = x.positions[i];
  }
  if (x.features.known > size) x.features.known = size;
  if (x.carries && x.bounds.known > size) x.bounds.known = size;
}

// Decides an update: x.folded are to be folded. Changes nothing of the page.
template <typename T>
void decide_update(const Call& call, const UpdatePoint& at, UpdateWorkspace<T>& x) {
  const Candidates c(at);
  const int64_t size = c.layout.sparse_cache_size;
  const int32_t* const cached = c.page.positions(c.set);
  for (int64_t i = 0; i < c.count; ++i) {
    x.positions[i] = i < c.cached ? cached[i] : static_cast<int32_t>(c.start + i - c.cached);
  }
  if (c.layout.has_score_weights && size > 0) find_importance(call, c, x);
  if (c.count > size) {
    const bool maps = c.layout.feature_dim > 0;
    if (maps && x.keeps_features) {
      for (int64_t i = x.features.known; i < c.count; ++i) {
        x.order[i - x.features.known] = static_cast<int32_t>(i);
      }
      map_listed(call, c, x.order, c.count - x.features.known, x.recall, kUpdateBlock, x.features);
      x.features.known = c.count;
    }
    const int64_t old = list_old(c, x);
    if (maps && !x.keeps_features) {
      map_listed(call, c, x.order, old, x.recall, kUpdateBlock, x.features);
    }
    if (size > 0) score_needed(c, old, x);
  }
  select_largest(x.scores, x.positions, c.count, size, x.order, x.keep);
  x.num_folded = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    if (!x.keep[i]) x.folded[x.num_folded++] = static_cast<int32_t>(i);
  }
}

// Carries out what decide_update() found at the same point.
template <typename T>
void commit_update(const UpdatePoint& at, UpdateWorkspace<T>& x) {
  const Candidates c(at);
  const int64_t states = c.layout.num_folded(at.n) > 0 ? c.layout.states_per_set() : 0;
  for (int64_t j = 0; j < states; ++j) {
    fold(c, j, at.n / c.layout.update_interval, x);
  }
  replace(c, x);
}

// An update that knows of those before only what the page holds.
template <typename T>
void update(const Call& call, const UpdatePoint& at, UpdateWorkspace<T>& x) {
  x.features.known = 0;
  decide_update(call, at, x);
  commit_update(at, x);
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
