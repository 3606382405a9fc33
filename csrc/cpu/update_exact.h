// Kernel body of the update (LoLA, arXiv 2505.23666, section 3.3) of one page and sparse set:
// evict, rescore all cached and evicted pairs, keep the lam largest, fold the rest into H and s.
#pragma once

#include "cpu/candidates.h"
#include "cpu/carried_bounds.h"
#include "cpu/fold.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

constexpr int64_t kUpdateBlock = 96;  // candidates scored at once: whole tiles, phi stays in L2

template <typename T>
struct UpdateScratch {
  RecallScratch<T> recall;
  T *scores, *block_scores, *highest, *sums, *mean, *lean, *delta, *newcomer, *folded, *features;
  T* dither;  // of the rows of H
  int32_t *positions, *order, *losers;
  int64_t* num_losers;  // of the update that was decided last
  int8_t* direction;    // of the newcomer, one per state head
  unsigned char* keep;
};

// Divides one block of memory into the buffers; returns the bytes needed (with null: only that).
template <typename T>
int64_t carve_update(const LolaArgs& a, bool lane, char* base, UpdateScratch<T>* x) {
  const int64_t E = a.lam + a.interval, F2 = 2 * a.F, dp = round_up<T>(a.d);
  int64_t used = 0;
  x->scores = take_as<T>(base, E, &used);
  x->block_scores = take_as<T>(base, kUpdateBlock, &used);
  x->highest = take_as<T>(base, E, &used);
  x->sums = take_as<T>(base, kUpdateBlock, &used);
  x->mean = take_as<T>(base, dp, &used);
  x->lean = take_as<T>(base, dp, &used);
  x->delta = take_as<T>(base, F2 * dp, &used);
  const int64_t share = a.Hs / a.Hg, phi_ld = round_up<T>(F2) + kLanes<T>;
  x->newcomer = take_as<T>(base, kBounds * share, &used);
  x->folded = take_as<T>(base, phi_ld, &used);
  x->dither = take_as<T>(base, round_up<T>(F2), &used);
  // A lane keeps features from update to update.
  x->features = take_as<T>(base, a.incremental || lane ? 0 : Features<T>::size(a), &used);
  x->positions = take_as<int32_t>(base, E, &used);
  x->order = take_as<int32_t>(base, E, &used);
  x->losers = take_as<int32_t>(base, E, &used);
  x->num_losers = take_as<int64_t>(base, 1, &used);
  x->keep = take_as<unsigned char>(base, E, &used);
  x->direction = take_as<int8_t>(base, a.d * share, &used);
  T* const recall = take_as<T>(base, carve<T>(a.recall, kUpdateBlock, nullptr, &x->recall), &used);
  if (base != nullptr) carve<T>(a.recall, kUpdateBlock, recall, &x->recall);
  return used;
}

// Scores of the listed candidates into x.scores: SRE, or the norm-relative mean over a set's state
// heads. Sets bounds where `b` is not null.
template <typename T>
void score(const LolaArgs& a, const Candidates& c, const int32_t* list, int64_t listed, bool empty,
           const Features<T>& f, Bounds<T>* b, UpdateScratch<T>& x) {
  const int64_t share = a.Hs / a.Hg, d = a.d, dp = round_up<T>(d), phi_ld = Features<T>::stride(a);
  const int64_t phi_bytes = phi_ld * static_cast<int64_t>(sizeof(T));
  T* const errors = x.recall.errors;
  for (int64_t first = 0; first < listed; first += kUpdateBlock) {
    const int64_t left = listed - first, size = left < kUpdateBlock ? left : kUpdateBlock;
    const int32_t* const block = list + first;
    const bool run = block[size - 1] - block[0] == size - 1;  // one after the other, as they ascend
    for (int64_t i = 0; i < size; ++i) {
      load_row(x.recall.v + i * dp, c.v(block[i]), a.exact_v.dtype, d, dp);
    }
    T* const scores = x.block_scores;
    for (int64_t j = 0; j < share; ++j) {
      T* const out = share == 1 ? scores : errors;
      if (empty) {
        for (int64_t i = 0; i < size; ++i) out[i] = norm(x.recall.v + i * dp, dp);
      } else {
        const T* phi = f.row(a, j, block[0]);
        if (!run) {
          phi = x.recall.phi;
          for (int64_t i = 0; i < size; ++i) {
            copy_row(reinterpret_cast<char*>(x.recall.phi + i * phi_ld),
                     reinterpret_cast<const char*>(f.row(a, j, block[i])), phi_bytes);
          }
        }
        recall_errors<T>(a.recall, x.recall, phi, c.page, c.set * share + j, size, out,
                         b == nullptr ? nullptr : x.sums);
      }
      if (share > 1) add_relative(x.recall.v, dp, errors, size, j == 0, scores);
    }
    for (int64_t i = 0; i < size; ++i) {
      const T score = share > 1 ? scores[i] / static_cast<T>(share) : scores[i];
      x.scores[block[i]] = score;
      if (b == nullptr) continue;
      set_bounds(*b, block[i], score, f.row(a, 0, block[i]), round_up<T>(2 * a.F),
                 x.recall.predicted + i * dp, dp, x.sums[i]);
    }
  }
}

// Scores of all candidates that can lose, infinity for the others.
template <typename T>
void score_needed(const LolaArgs& a, const Candidates& c, bool empty, const Features<T>& f,
                  Bounds<T>* b, UpdateScratch<T>& x) {
  if (empty) b = nullptr;
  const int64_t known = b == nullptr ? 0 : b->known;
  int32_t* const list = x.order;
  for (int64_t i = known; i < c.count; ++i) list[i - known] = static_cast<int32_t>(i);
  score(a, c, list, c.count - known, empty, f, b, x);
  if (b == nullptr) return;
  if (known > 0) {
    T* const highest = x.highest;
    for (int64_t i = 0; i < c.count; ++i) highest[i] = b->high[i];
    const T limit = kth_smallest(highest, c.count, c.count - a.lam);
    int64_t listed = 0;
    for (int64_t i = 0; i < known; ++i) {
      x.scores[i] = __builtin_inff();
      if (!(b->low[i] > limit)) list[listed++] = static_cast<int32_t>(i);
    }
    score(a, c, list, listed, false, f, b, x);
  }
  b->known = c.count;
}

// H += sum phi(k) v^T and s += sum phi(k) over the losers of update number `update`, for state head
// j of the set. `fresh`: H and s hold leftovers and are written instead. Carries the bounds in `b`
// along unless it is null.
template <typename T>
void fold(const LolaArgs& a, const Candidates& c, int64_t j, int64_t update, int64_t losers,
          bool fresh, const Features<T>& features, Bounds<T>* b, UpdateScratch<T>& x) {
  const int64_t d = a.d, dp = round_up<T>(d), F2 = 2 * a.F, phi_ld = Features<T>::stride(a);
  const int64_t head = c.set * (a.Hs / a.Hg) + j;
  const RecallArgs& r = a.recall;
  for (int64_t first = 0; first < losers; first += kUpdateBlock) {
    const int64_t left = losers - first, size = left < kUpdateBlock ? left : kUpdateBlock;
    const bool write = fresh && first == 0;
    T *const s = x.recall.s, *const added = x.folded;
    for (int64_t f = 0; f < round_up<T>(F2); ++f) {
      added[f] = 0;
      x.dither[f] = dither<T>(update, first / kUpdateBlock * F2 + f);
    }
    if (write) {
      for (int64_t f = 0; f < round_up<T>(F2); ++f) s[f] = 0;
    } else {
      load_row(s, r.s.at(c.page, head), r.s.dtype, F2, round_up<T>(F2));
    }
    for (int64_t i = 0; i < size; ++i) {
      const T* const from = features.row(a, j, x.losers[first + i]);
      T* const phi = x.recall.phi + i * phi_ld;
      for (int64_t f = 0; f < round_up<T>(F2); f += kLanes<T>) {
        const Vec<T> y = load(from + f);
        store<T>(phi + f, y);
        store<T>(added + f, load(added + f) + y);
      }
      load_row(x.recall.v + i * dp, c.v(x.losers[first + i]), a.exact_v.dtype, d, dp);
    }
    gemm_transposed<T>(x.recall.phi, phi_ld, x.recall.v, dp, x.delta, dp, F2, dp, size);
    if (b != nullptr) {
      for (int64_t i = 0; i < dp; i += kLanes<T>) {
        Vec<T> sum{};
        for (int64_t e = 0; e < size; ++e) sum += load(x.recall.v + e * dp + i);
        store<T>(x.mean + i, sum * (T(1) / static_cast<T>(size)));
      }
      carry_bounds<T>(a, c, features.row(a, 0, 0), phi_ld, {x.delta, added, s, x.mean, x.lean},
                      x.recall.v, *b);
    }
    for (int64_t f = 0; f < round_up<T>(F2); f += kLanes<T>) {
      store<T>(s + f, add_dithered<T>(load(s + f), load(added + f), load(x.dither + f)));
    }
    store_row(r.s.at(c.page, head), s, r.s.dtype, F2);
    for (int64_t f = 0; f < F2; ++f) {
      char* const row = r.H.at(c.page, head, f);
      T* const sum = x.recall.predicted;  // one row of scratch
      if (write) {
        store_row(row, x.delta + f * dp, r.H.dtype, d);
      } else {
        load_row(sum, row, r.H.dtype, d, dp);
        for (int64_t i = 0; i < dp; i += kLanes<T>) {
          const Vec<T> more = load(x.delta + f * dp + i);
          store<T>(sum + i, add_dithered<T>(load(sum + i), more, splat(x.dither[f])));
        }
        store_row(row, sum, r.H.dtype, d);
      }
    }
  }
}

// The i-th kept newcomer goes to the i-th slot that is empty or whose pair was folded.
template <typename T>
void replace(const LolaArgs& a, const Candidates& c, Features<T>& f, Bounds<T>* b,
             UpdateScratch<T>& x) {
  const int64_t row_bytes = a.d * size_of(a.exact_k.dtype);
  int32_t* const positions = a.position_row(c.page, c.set);
  int64_t slot = 0;
  for (int64_t i = c.cached; i < c.count; ++i) {
    if (!x.keep[i]) continue;
    while (slot < c.cached && x.keep[slot]) ++slot;
    copy_row(a.sparse_k.at(c.page, c.set, slot), c.k(i), row_bytes);
    copy_row(a.sparse_v.at(c.page, c.set, slot), c.v(i), row_bytes);
    for (int64_t j = 0; i < f.known && i != slot && j < a.Hs / a.Hg; ++j) {
      const int64_t bytes = Features<T>::stride(a) * static_cast<int64_t>(sizeof(T));
      copy_row(reinterpret_cast<char*>(f.row(a, j, slot)),
               reinterpret_cast<const char*>(f.row(a, j, i)), bytes);
    }
    if (b != nullptr && i < b->known) move_bounds(*b, i, slot, round_up<T>(a.d));
    positions[slot++] = x.positions[i];
  }
  if (f.known > a.lam) f.known = a.lam;
  if (b != nullptr && b->known > a.lam) b->known = a.lam;
}

// Decides the update of one page, which just reached n tokens, and one sparse set, scoring
// directly: who loses, in `x`. Reads the page and changes nothing of it. `b` may be null.
template <typename T>
void decide_update(const LolaArgs& a, int64_t page, int64_t set, int64_t n, Features<T>& f,
                   Bounds<T>* b, UpdateScratch<T>& x) {
  const Candidates c(a, page, set, n);
  const int32_t* const known = a.position_row(page, set);
  for (int64_t i = 0; i < c.count; ++i) {
    x.positions[i] = i < c.cached ? known[i] : static_cast<int32_t>(c.start + i - c.cached);
  }
  const bool empty = a.num_folded(n - a.interval) == 0;
  if (c.count > a.lam) map_candidates(a, c, x.recall, kUpdateBlock, f);
  if (c.count > a.lam && a.lam > 0) score_needed(a, c, empty, f, b, x);
  select_largest(x.scores, x.positions, c.count, a.lam, x.order, x.keep);
  int64_t losers = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    if (!x.keep[i]) x.losers[losers++] = static_cast<int32_t>(i);
  }
  *x.num_losers = losers;
}

// Carries out what decide_update() found, with the same arguments.
template <typename T>
void commit_update(const LolaArgs& a, int64_t page, int64_t set, int64_t n, Features<T>& f,
                   Bounds<T>* b, UpdateScratch<T>& x) {
  const Candidates c(a, page, set, n);
  const bool empty = a.num_folded(n - a.interval) == 0;
  const int64_t losers = *x.num_losers;
  if (losers > 0) {
    for (int64_t j = 0; j < a.Hs / a.Hg; ++j) {
      fold(a, c, j, n / a.interval, losers, empty, f, b, x);
    }
  }
  replace(a, c, f, b, x);
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
