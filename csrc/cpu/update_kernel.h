// Kernel body of the update (LoLA, arXiv 2505.23666, section 3.3) of one page and sparse set:
// evict, rescore all cached and evicted pairs, keep the lam largest, fold the rest into H and s.
// Included by for_each_isa.h through lola_kernel.h, once per instruction set.

namespace lola {
namespace LOLA_ISA {
namespace {

constexpr int64_t kUpdateBlock = 48;  // candidates scored at once: whole tiles, phi stays in L2

template <typename T>
struct UpdateScratch {
  SreScratch<T> recall;
  T *scores, *delta, *newcomer, *new_phi, *folded, *products, *features;
  int32_t *positions, *order, *losers;
  unsigned char* keep;
};

// Divides one block of memory into the buffers; returns the bytes needed (with null: only that).
template <typename T>
int64_t carve_update(const LolaArgs& a, bool stream, char* base, UpdateScratch<T>* x) {
  const int64_t E = a.lam + a.interval, F2 = 2 * a.F, dp = round_up<T>(a.d);
  int64_t used = 0;
  x->scores = take_as<T>(base, E, &used);
  x->delta = take_as<T>(base, F2 * dp, &used);
  const int64_t share = a.Hs / a.Hg, phi_ld = round_up<T>(F2) + kLanes<T>;
  x->newcomer = take_as<T>(base, 4 * share, &used);
  x->new_phi = take_as<T>(base, share * phi_ld, &used);
  x->folded = take_as<T>(base, 2 * phi_ld, &used);
  x->products = take_as<T>(base, 3 * round_up<T>(a.lam), &used);
  // A run of a stream has features of its own.
  x->features = take_as<T>(base, a.incremental || stream ? 0 : Features<T>::size(a), &used);
  x->positions = take_as<int32_t>(base, E, &used);
  x->order = take_as<int32_t>(base, E, &used);
  x->losers = take_as<int32_t>(base, E, &used);
  x->keep = take_as<unsigned char>(base, E, &used);
  T* const recall = take_as<T>(base, carve<T>(a.recall, kUpdateBlock, nullptr, &x->recall), &used);
  if (base != nullptr) carve<T>(a.recall, kUpdateBlock, recall, &x->recall);
  return used;
}

// Scores of all candidates into x.scores: SRE, or the norm-relative mean over a set's state heads.
template <typename T>
void score(const LolaArgs& a, const Candidates& c, bool empty, const Features<T>& f,
           UpdateScratch<T>& x) {
  const int64_t share = a.Hs / a.Hg, d = a.d, dp = round_up<T>(d);
  T* const errors = x.recall.errors;
  for (int64_t first = 0; first < c.count; first += kUpdateBlock) {
    const int64_t left = c.count - first, size = left < kUpdateBlock ? left : kUpdateBlock;
    for (int64_t i = 0; i < size; ++i) {
      load_row(x.recall.v + i * dp, c.v(first + i), a.exact_v.dtype, d, dp);
    }
    T* const scores = x.scores + first;
    for (int64_t j = 0; j < share; ++j) {
      T* const out = share == 1 ? scores : errors;
      if (empty) {
        for (int64_t i = 0; i < size; ++i) out[i] = norm(x.recall.v + i * dp, dp);
      } else {
        recall_errors<T>(a.recall, x.recall, f.row(a, j, first), c.page, c.set * share + j, size,
                         out);
      }
      if (share > 1) add_relative(x.recall.v, dp, errors, size, j == 0, scores);
    }
    for (int64_t i = 0; share > 1 && i < size; ++i) scores[i] /= static_cast<T>(share);
  }
}

// H += sum phi(k) v^T and s += sum phi(k) over the losers, for state head j of the set. `fresh`: H
// and s hold leftovers and are written instead.
template <typename T>
void fold(const LolaArgs& a, const Candidates& c, int64_t j, int64_t losers, bool fresh,
          const Features<T>& features, UpdateScratch<T>& x) {
  const int64_t d = a.d, dp = round_up<T>(d), F2 = 2 * a.F, phi_ld = Features<T>::stride(a);
  const int64_t head = c.set * (a.Hs / a.Hg) + j;
  const SreArgs& r = a.recall;
  for (int64_t first = 0; first < losers; first += kUpdateBlock) {
    const int64_t left = losers - first, size = left < kUpdateBlock ? left : kUpdateBlock;
    const bool write = fresh && first == 0;
    T* const s = x.recall.s;
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
        store<T>(s + f, load(s + f) + y);
      }
      load_row(x.recall.v + i * dp, c.v(x.losers[first + i]), a.exact_v.dtype, d, dp);
    }
    store_row(r.s.at(c.page, head), s, r.s.dtype, F2);
    gemm_transposed<T>(x.recall.phi, phi_ld, x.recall.v, dp, x.delta, dp, F2, dp, size);
    for (int64_t f = 0; f < F2; ++f) {
      char* const row = r.H.at(c.page, head, f);
      T* const sum = x.recall.predicted;  // one row of scratch
      if (write) {
        store_row(row, x.delta + f * dp, r.H.dtype, d);
      } else {
        load_row(sum, row, r.H.dtype, d, dp);
        for (int64_t i = 0; i < dp; i += kLanes<T>) {
          store<T>(sum + i, load(sum + i) + load(x.delta + f * dp + i));
        }
        store_row(row, sum, r.H.dtype, d);
      }
    }
  }
}

// The i-th kept newcomer goes to the i-th slot that is empty or whose pair was folded.
template <typename T>
void replace(const LolaArgs& a, const Candidates& c, Features<T>& f, UpdateScratch<T>& x) {
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
    positions[slot++] = x.positions[i];
  }
  if (f.known > a.lam) f.known = a.lam;
}

// The update of one page, which just reached n tokens, and one sparse set, scoring directly.
template <typename T>
void update_direct(const LolaArgs& a, int64_t page, int64_t set, int64_t n, Features<T>& f,
                   UpdateScratch<T>& x) {
  const Candidates c(a, page, set, n);
  const int32_t* const known = a.position_row(page, set);
  for (int64_t i = 0; i < c.count; ++i) {
    x.positions[i] = i < c.cached ? known[i] : static_cast<int32_t>(c.start + i - c.cached);
  }
  const bool empty = a.num_folded(n - a.interval) == 0;
  if (c.count > a.lam) map_candidates(a, c, x.recall, kUpdateBlock, f);
  if (c.count > a.lam && a.lam > 0) score(a, c, empty, f, x);  // else there is nothing to choose
  select_largest(x.scores, x.positions, c.count, a.lam, x.order, x.keep);
  int64_t losers = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    if (!x.keep[i]) x.losers[losers++] = static_cast<int32_t>(i);
  }
  if (losers > 0) {
    for (int64_t j = 0; j < a.Hs / a.Hg; ++j) fold(a, c, j, losers, empty, f, x);
  }
  replace(a, c, f, x);
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
