// Kernel body of the update of interval 1 (docs/algorithm.md, section 3): one pair is evicted and
// at most one folded, so most scores need not be computed anew.
//
// Bounds on recall errors follow each fold (drift_apart), and an error is computed anew only when
// it may be the least (rescore_doubtful). The choice is the one that all scores would give.
#pragma once

#include "cpu/drift_bounds.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// Where what is known of a head's pairs goes: number r of pair i to numbers[r * ld + i], its
// direction to directions + i * d.
template <typename T>
struct Known {
  T* numbers;
  int64_t ld;
  int8_t* directions;
};

// Computes the recall errors of `count` pairs of one head, whose keys and values are in x.recall,
// into x.recall.errors. What bounds that of the i-th from here on is kept at place at[i].
template <typename T>
void measure(const LolaArgs& a, int64_t page, int64_t head, bool empty, int64_t count,
             const Known<T>& to, const int32_t* at, UpdateScratch<T>& x) {
  const int64_t d = a.d, dp = round_up<T>(d), phi_ld = Features<T>::stride(a), ld = to.ld;
  const RecallScratch<T>& y = x.recall;
  map_keys(a.recall, y, head, count, y.phi);
  if (!empty) recall_errors<T>(a.recall, y, y.phi, page, head, count, y.errors, x.sums);
  for (int64_t i = 0; i < count; ++i) {
    T *const b = to.numbers + at[i], *const n = y.predicted + i * dp;
    const T* const v = y.v + i * dp;
    const T value = norm(v, dp);
    if (empty) {
      for (int64_t j = 0; j < dp; ++j) n[j] = 0;
      y.errors[i] = value;
      x.sums[i] = T(1e-6);
    }
    b[kSum * ld] = x.sums[i];
    b[kValue * ld] = value;
    b[kFeatures * ld] = norm(y.phi + i * phi_ld, round_up<T>(2 * a.F));
    const T low = keep_direction(v, n, T(1) / x.sums[i], d, n, to.directions + at[i] * d,
                                 b + kAlong * ld, b + kScale * ld);
    // The slack is far beyond rounding errors.
    b[kLow * ld] = low - (y.errors[i] + value) * T(2e-5);
  }
}

// Computes the listed scores of a set anew.
template <typename T>
void rescore(const LolaArgs& a, int64_t page, int64_t set, bool empty, const int32_t* list,
             int64_t listed, UpdateScratch<T>& x) {
  const int64_t share = a.Hs / a.Hg, d = a.d, dp = round_up<T>(d), lam = a.lam;
  for (int64_t first = 0; first < listed; first += kUpdateBlock, list += kUpdateBlock) {
    const int64_t left = listed - first, size = left < kUpdateBlock ? left : kUpdateBlock;
    for (int64_t i = 0; i < size; ++i) {
      load_row(x.recall.k + i * d, a.sparse_k.at(page, set, list[i]), a.sparse_k.dtype, d, d);
      load_row(x.recall.v + i * dp, a.sparse_v.at(page, set, list[i]), a.sparse_v.dtype, d, dp);
    }
    for (int64_t j = 0; j < share; ++j) {
      const int64_t head = set * share + j;
      T* const b = bounds_of<T>(a, page, head);
      measure<T>(a, page, head, empty, size, {b, lam, a.direction_rows(page, head)}, list, x);
      for (int64_t i = 0; i < size; ++i) {
        const T score = score_of<T, T>(x.recall.errors[i], b[kValue * lam + list[i]], share > 1);
        x.scores[list[i]] = j == 0 ? score : x.scores[list[i]] + score;
      }
    }
  }
}

// Lower bounds on the scores of a set's cached pairs, into x.scores.
template <typename T>
void bound_scores(const LolaArgs& a, int64_t page, int64_t set, UpdateScratch<T>& x) {
  const int64_t share = a.Hs / a.Hg, lam = a.lam;
  for (int64_t j = 0; j < share; ++j) {
    const T* const b = bounds_of<T>(a, page, set * share + j);
    int64_t i = 0;
    for (; i + kLanes<T> <= lam; i += kLanes<T>) {
      const Vec<T> low =
          score_of<T, Vec<T>>(load(b + kLow * lam + i), load(b + kValue * lam + i), share > 1);
      store<T>(x.scores + i, j == 0 ? low : load(x.scores + i) + low);
    }
    for (; i < lam; ++i) {
      const T low = score_of<T, T>(b[kLow * lam + i], b[kValue * lam + i], share > 1);
      x.scores[i] = j == 0 ? low : x.scores[i] + low;
    }
  }
}

// The least of x.scores; a NaN counts as the largest.
template <typename T>
T least_score(int64_t count, const UpdateScratch<T>& x) {
  Vec<T> low = splat(static_cast<T>(__builtin_inff()));
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) low = min(load(x.scores + i), low);
  T least = reduce<Min>(low);
  for (; i < count; ++i) least = x.scores[i] < least ? x.scores[i] : least;
  return least;
}

// Lists the indices of x.scores that are at most `limit`, in order. Returns their number.
template <typename T>
int64_t list_up_to(T limit, int64_t count, UpdateScratch<T>& x) {
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
void rescore_doubtful(const LolaArgs& a, int64_t page, int64_t set, bool empty, T limit,
                      UpdateScratch<T>& x) {
  const T low = least_score(a.lam, x);
  if (!(low < limit)) return;
  list_up_to(low, a.lam, x);
  // The likely least one first: its score rules out most others.
  const int32_t likely = x.order[0];
  rescore(a, page, set, empty, &likely, 1, x);
  if (x.scores[likely] < limit) limit = x.scores[likely];
  int64_t listed = 0, found = list_up_to(limit, a.lam, x);
  for (int64_t i = 0; i < found; ++i) {
    if (x.order[i] != likely) x.order[listed++] = x.order[i];
  }
  rescore(a, page, set, empty, x.order, listed, x);
}

// The slot of the pair that loses against a newcomer of this score, or -1: the newcomer, which as
// the youngest also loses a tie.
template <typename T>
int64_t loser_slot(const LolaArgs& a, int64_t page, int64_t set, bool empty, T newcomer,
                   UpdateScratch<T>& x) {
  bound_scores(a, page, set, x);
  rescore_doubtful(a, page, set, empty, newcomer, x);
  const T low = least_score(a.lam, x);
  const int32_t* const positions = a.position_row(page, set);
  if (!(low < newcomer)) return -1;
  const int64_t least = list_up_to(low, a.lam, x);
  int64_t loser = x.order[0];
  for (int64_t i = 1; i < least; ++i) {
    if (positions[x.order[i]] > positions[loser]) loser = x.order[i];
  }
  return loser;
}

// H += phi v^T, s += phi for one pair, in update number `update`. `empty`: H and s hold leftovers
// and are written instead.
template <typename T>
void fold_one(const LolaArgs& a, int64_t page, int64_t head, int64_t update, bool empty,
              const T* phi, const T* v, UpdateScratch<T>& scratch, Ahead* ahead) {
  const int64_t d = a.d, dp = round_up<T>(d), F2 = 2 * a.F, Fp = round_up<T>(F2);
  const RecallArgs& r = a.recall;
  const bool in_place = d == dp && !empty;
  T *const s = scratch.recall.s, *const places = scratch.dither;
  for (int64_t f = 0; f < Fp; ++f) places[f] = dither<T>(update, f);
  for (int64_t f = 0; f < F2; ++f) {
    ahead->template ask<2>();
    char* const stored = r.H.at(page, head, f);
    const Vec<T> weight = splat(phi[f]), place = splat(places[f]);
    if (in_place) {
      T* const row = reinterpret_cast<T*>(stored);
      for (int64_t j = 0; j < dp; j += kLanes<T>) {
        store<T>(row + j, add_dithered<T>(load(row + j), weight * load(v + j), place));
      }
      continue;
    }
    T* const row = scratch.recall.predicted;
    if (!empty) load_row(row, stored, r.H.dtype, d, dp);
    for (int64_t j = 0; j < dp; j += kLanes<T>) {
      const Vec<T> old = empty ? Vec<T>{} : load(row + j);
      store<T>(row + j, add_dithered<T>(old, weight * load(v + j), place));
    }
    store_row(stored, row, r.H.dtype, d);
  }
  if (empty) {
    for (int64_t f = 0; f < Fp; ++f) s[f] = 0;
  } else {
    load_row(s, r.s.at(page, head), r.s.dtype, F2, Fp);
  }
  for (int64_t f = 0; f < Fp; f += kLanes<T>) {
    store<T>(s + f, add_dithered<T>(load(s + f), load(phi + f), load(places + f)));
  }
  store_row(r.s.at(page, head), s, r.s.dtype, F2);
}

// The update of interval 1: one pair is evicted, and at most one folded.
template <typename T>
void update_incremental(const LolaArgs& a, int64_t page, int64_t set, int64_t n,
                        UpdateScratch<T>& x, Ahead* ahead) {
  const Candidates c(a, page, set, n);
  const int64_t share = a.Hs / a.Hg, d = a.d, dp = round_up<T>(d), lam = a.lam;
  const bool empty = a.num_folded(n - 1) == 0, folds = c.cached == lam;
  const char *const new_k = c.k(c.cached), *const new_v = c.v(c.cached);
  const RecallScratch<T>& y = x.recall;
  load_row(y.k, new_k, a.exact_k.dtype, d, d);
  load_row(y.v, new_v, a.exact_v.dtype, d, dp);
  T newcomer = 0;
  const int32_t only = 0;
  for (int64_t j = 0; j < share; ++j) {
    T* const numbers = x.newcomer + kBounds * j;
    measure<T>(a, page, set * share + j, empty, 1, {numbers, 1, x.direction + d * j}, &only, x);
    const T score = score_of<T, T>(y.errors[0], numbers[kValue], share > 1);
    newcomer = j == 0 ? score : newcomer + score;
  }
  if (newcomer != newcomer) newcomer = static_cast<T>(__builtin_inff());  // NaN counts as infinite

  const int64_t loser = folds ? loser_slot(a, page, set, empty, newcomer, x) : -1;
  if (folds) {  // what will be folded, before the newcomer takes its place
    load_row(y.k, loser < 0 ? new_k : a.sparse_k.at(page, set, loser), a.exact_k.dtype, d, d);
    load_row(y.v, loser < 0 ? new_v : a.sparse_v.at(page, set, loser), a.exact_v.dtype, d, dp);
  }
  const int64_t slot = folds ? loser : c.cached;  // where the newcomer goes, if anywhere
  if (slot >= 0) {
    const int64_t bytes = d * size_of(a.exact_k.dtype);
    copy_row(a.sparse_k.at(page, set, slot), new_k, bytes);
    copy_row(a.sparse_v.at(page, set, slot), new_v, bytes);
    a.position_row(page, set)[slot] = static_cast<int32_t>(c.start);
    for (int64_t j = 0; j < share; ++j) {
      T* const b = bounds_of<T>(a, page, set * share + j) + slot;
      for (int64_t i = 0; i < kBounds; ++i) b[i * lam] = x.newcomer[kBounds * j + i];
      copy_row(reinterpret_cast<char*>(a.direction_rows(page, set * share + j) + slot * d),
               reinterpret_cast<const char*>(x.direction + d * j), d);
    }
  }
  for (int64_t j = 0; folds && j < share; ++j) {
    const int64_t head = set * share + j;
    map_keys(a.recall, y, head, 1, y.phi);
    fold_one(a, page, head, n, empty, y.phi, y.v, x, ahead);
    drift_apart(a, page, head, y.phi, y.v, x, ahead);
  }
}

// An update that knows nothing of the ones before.
template <typename T>
void update_alone(const LolaArgs& a, int64_t page, int64_t set, int64_t n, UpdateScratch<T>& x,
                  Ahead* ahead) {
  if (a.incremental) return update_incremental(a, page, set, n, x, ahead);
  Features<T> f{x.features, 0};
  decide_update<T>(a, page, set, n, f, nullptr, x);
  commit_update<T>(a, page, set, n, f, nullptr, x);
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
