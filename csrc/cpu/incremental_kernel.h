// Kernel body of the update of interval 1 (docs/algorithm.md, section 3): one pair is evicted and
// at most one folded, so scores can be kept up to date instead of being computed anew. Included by
// for_each_isa.h through lola_kernel.h, once per instruction set.
//
// While few pairs are folded, each fold moves every prediction far, and the numbers of all pairs
// are brought up to date (refresh_moments). Later a fold moves p = n / z by little:
//   p' - p = c / (z + c) (v_l - p),  c = phi . phi_l <= ||phi|| ||phi_l||,
// so it is enough to add up how far a pair's score can have moved at most since it was computed
// (drift_apart), and to compute anew those that might be the least (rescore_doubtful). The choice
// is the one that all scores would give.

namespace lola {
namespace LOLA_ISA {
namespace {

// A sparse pair's numbers, the rows of `moments`, are ||n||^2, n.v, phi.s and ||v||^2 with
// n = phi^T H, as they were when they were last computed, ||phi||, and how far its recall error may
// have moved since. From the first four SRE^2 = ||v - n / z||^2 with z = phi.s + 1e-6, and folding
// another pair changes n by a multiple of that pair's v, so they can be kept up to date without H.

// Folded pairs from which on bounds cost less than bringing all scores up to date.
constexpr int64_t kBoundedFrom = 256;

// Whether scores are bounded after so many folds. A hidden state that is rounded to fewer bits than
// it is computed in moves by more than the bound knows of.
inline bool scores_bounded(const LolaArgs& a, int64_t folded) {
  return folded >= kBoundedFrom &&
         a.recall.H.dtype == (a.exact_k.dtype == DType::f64 ? DType::f64 : DType::f32);
}

// A lower bound on the recall error of a pair with these numbers, or on its ratio to ||v||; the
// error itself where nothing moved. V is T, or a vector of it.
template <typename T, typename V>
LOLA_INLINE V least_error(V nn, V nv, V z, V vv, V moved, bool relative) {
  const V inverse = T(1) / (z + T(1e-6)), square = (nn * inverse - T(2) * nv) * inverse + vv;
  const V error = root(square > 0 ? square : V{}), length = root(vv);
  // The slack is far beyond rounding errors.
  const V slack = moved * T(1.0001) + (error + length) * T(2e-5);
  const V low = error - (moved > 0 ? slack : V{});
  return relative ? low / max(length, V{} + T(1e-6)) : low;
}

// The same of pair i of a head, whose number r is m[r * ld + i].
template <typename T>
LOLA_INLINE T least_error_of(const T* m, int64_t ld, int64_t i, bool relative) {
  return least_error<T, T>(m[i], m[i + ld], m[i + 2 * ld], m[i + 3 * ld], m[i + 5 * ld], relative);
}

// Features of the newcomer under one head's map into `phi`, and its numbers into m.
template <typename T>
void measure_newcomer(const LolaArgs& a, int64_t page, int64_t head, bool empty,
                      UpdateScratch<T>& x, T* phi, T* m) {
  const int64_t d = a.d, dp = round_up<T>(d), F2 = 2 * a.F, Fp = round_up<T>(a.F);
  const SreArgs& r = a.recall;
  int64_t W_ld;
  const T* W = padded_matrix<T>(r.feature_map_k.at(head), r.feature_map_k.dtype,
                                r.feature_map_k.stride[1], d, a.F, x.recall.W, &W_ld);
  gemm<T>(x.recall.k, d, W, W_ld, x.recall.y, Fp, 1, Fp, d);
  feature_map(x.recall.y, a.F, phi);
  m[0] = m[1] = m[2] = 0;
  Vec<T> vv{};
  for (int64_t j = 0; j < dp; j += kLanes<T>) {
    vv = fma(load(x.recall.v + j), load(x.recall.v + j), vv);
  }
  m[3] = reduce<Sum>(vv);
  m[4] = norm(phi, round_up<T>(F2));
  m[5] = 0;
  if (empty) return;
  int64_t H_ld;
  const T* H =
      padded_matrix<T>(r.H.at(page, head), r.H.dtype, r.H.stride[2], F2, d, x.recall.H, &H_ld);
  gemm<T>(phi, F2, H, H_ld, x.recall.predicted, dp, 1, dp, F2);
  load_row(x.recall.s, r.s.at(page, head), r.s.dtype, F2, round_up<T>(F2));
  Vec<T> nn{}, nv{}, z{};
  for (int64_t j = 0; j < dp; j += kLanes<T>) {
    const Vec<T> n = load(x.recall.predicted + j);
    nn = fma(n, n, nn);
    nv = fma(n, load(x.recall.v + j), nv);
  }
  for (int64_t f = 0; f < round_up<T>(F2); f += kLanes<T>) {
    z = fma(load(phi + f), load(x.recall.s + f), z);
  }
  m[0] = reduce<Sum>(nn);
  m[1] = reduce<Sum>(nv);
  m[2] = reduce<Sum>(z);
}

// H += phi v^T, s += phi for one pair, and w = H v with H as before unless w is null.
template <typename T>
void fold_one(const LolaArgs& a, int64_t page, int64_t head, bool empty, const T* phi, const T* v,
              UpdateScratch<T>& x, T* w) {
  const int64_t d = a.d, dp = round_up<T>(d), F2 = 2 * a.F;
  const SreArgs& r = a.recall;
  for (int64_t f = 0; f < F2; ++f) {
    char* const stored = r.H.at(page, head, f);
    T* const row = x.recall.predicted;
    Vec<T> dot{};
    if (empty) {
      for (int64_t j = 0; j < dp; j += kLanes<T>) store<T>(row + j, load(v + j) * phi[f]);
    } else {
      load_row(row, stored, r.H.dtype, d, dp);
      for (int64_t j = 0; j < dp; j += kLanes<T>) {
        const Vec<T> old = load(row + j), value = load(v + j);
        dot = fma(old, value, dot);
        store<T>(row + j, fma(splat(phi[f]), value, old));
      }
    }
    if (w != nullptr) w[f] = reduce<Sum>(dot);
    store_row(stored, row, r.H.dtype, d);
  }
  T* const s = x.recall.s;
  load_row(s, r.s.at(page, head), r.s.dtype, F2, round_up<T>(F2));
  for (int64_t f = 0; f < F2; ++f) s[f] = (empty ? T(0) : s[f]) + phi[f];
  store_row(r.s.at(page, head), s, r.s.dtype, F2);
}

// Bring the moments of a set's pairs up to date with a folded pair. x.folded holds its features
// and, after them, w = H v; v_l its value.
template <typename T>
void refresh_moments(const LolaArgs& a, int64_t page, int64_t set, int64_t head, const T* v_l,
                     UpdateScratch<T>& x, Ahead* ahead) {
  constexpr DType own = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const int64_t dp = round_up<T>(a.d), F2 = 2 * a.F, lam = a.lam, ld = round_up<T>(lam);
  T *const c = x.products, *const u = c + ld, *const t = c + 2 * ld;  // phi.phi_l, phi.w, v.v_l
  dot_heads<T, own, 2>(x.folded, F2, a.phi.at(page, head, 0), F2 * static_cast<int64_t>(sizeof(T)),
                       ahead, lam, c, ld, x.delta);
  const char* const values = a.sparse_v.at(page, set, 0);
  const int64_t bytes = a.d * size_of(a.sparse_v.dtype);
  if (sizeof(T) == 4 && a.sparse_v.dtype == DType::bf16) {
    constexpr DType half = sizeof(T) == 4 ? DType::bf16 : own;
    dot_heads<T, half, 1>(v_l, a.d, values, bytes, nullptr, lam, t, ld, x.delta);
  } else {
    dot_heads<T, own, 1>(v_l, a.d, values, bytes, nullptr, lam, t, ld, x.delta);
  }
  Vec<T> square{};
  for (int64_t j = 0; j < dp; j += kLanes<T>) square = fma(load(v_l + j), load(v_l + j), square);
  const T vv = reduce<Sum>(square);
  T* const m = reinterpret_cast<T*>(a.moments.at(page, head, 0));
  for (int64_t i = 0; i < lam; ++i) {
    m[i] += c[i] * (2 * u[i] + c[i] * vv);
    m[i + lam] += c[i] * t[i];
    m[i + 2 * lam] += c[i];
  }
}

// The numbers of the listed pairs of one head, computed anew.
template <typename T>
void rescore_pairs(const LolaArgs& a, int64_t page, int64_t set, int64_t head, const int32_t* list,
                   int64_t listed, UpdateScratch<T>& x) {
  const int64_t d = a.d, dp = round_up<T>(d), F2 = 2 * a.F, Fp = round_up<T>(F2);
  const int64_t phi_ld = Fp + kLanes<T>, lam = a.lam;
  const SreArgs& r = a.recall;
  const SreScratch<T>& y = x.recall;
  int64_t H_ld;
  const T* H = padded_matrix<T>(r.H.at(page, head), r.H.dtype, r.H.stride[2], F2, d, y.H, &H_ld);
  load_row(y.s, r.s.at(page, head), r.s.dtype, F2, Fp);
  T* const v = y.v + 2 * dp;  // after the newcomer's and the loser's
  T* const m = reinterpret_cast<T*>(a.moments.at(page, head, 0));
  for (int64_t first = 0; first < listed; first += kUpdateBlock) {
    const int64_t left = listed - first, size = left < kUpdateBlock ? left : kUpdateBlock;
    for (int64_t i = 0; i < size; ++i) {
      load_row(y.phi + i * phi_ld, a.phi.at(page, head, list[first + i]), a.phi.dtype, F2, Fp);
    }
    gemm<T>(y.phi, phi_ld, H, H_ld, y.predicted, dp, size, dp, F2);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t slot = list[first + i];
      load_row(v, a.sparse_v.at(page, set, slot), a.sparse_v.dtype, d, dp);
      Vec<T> nn{}, nv{}, z{};
      for (int64_t j = 0; j < dp; j += kLanes<T>) {
        const Vec<T> n = load(y.predicted + i * dp + j);
        nn = fma(n, n, nn);
        nv = fma(n, load(v + j), nv);
      }
      for (int64_t f = 0; f < Fp; f += kLanes<T>) {
        z = fma(load(y.phi + i * phi_ld + f), load(y.s + f), z);
      }
      m[slot] = reduce<Sum>(nn);
      m[slot + lam] = reduce<Sum>(nv);
      m[slot + 2 * lam] = reduce<Sum>(z);
      m[slot + 5 * lam] = 0;
    }
  }
}

// Lower bounds on the scores of a set's cached pairs, into x.scores.
template <typename T>
void bound_scores(const LolaArgs& a, int64_t page, int64_t set, UpdateScratch<T>& x) {
  const int64_t share = a.Hs / a.Hg, lam = a.lam;
  for (int64_t j = 0; j < share; ++j) {
    const T* const m = reinterpret_cast<const T*>(a.moments.at(page, set * share + j, 0));
    int64_t i = 0;
    for (; i + kLanes<T> <= lam; i += kLanes<T>) {
      const Vec<T> low =
          least_error<T, Vec<T>>(load(m + i), load(m + i + lam), load(m + i + 2 * lam),
                                 load(m + i + 3 * lam), load(m + i + 5 * lam), share > 1);
      store<T>(x.scores + i, j == 0 ? low : load(x.scores + i) + low);
    }
    for (; i < lam; ++i) {
      const T low = least_error_of(m, lam, i, share > 1);
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

// Computes the scores of the listed pairs of a set anew.
template <typename T>
void rescore(const LolaArgs& a, int64_t page, int64_t set, const int32_t* list, int64_t listed,
             UpdateScratch<T>& x) {
  const int64_t share = a.Hs / a.Hg;
  for (int64_t j = 0; j < share; ++j) {
    rescore_pairs(a, page, set, set * share + j, list, listed, x);
    const T* const m = reinterpret_cast<const T*>(a.moments.at(page, set * share + j, 0));
    for (int64_t e = 0; e < listed; ++e) {
      const T score = least_error_of(m, a.lam, list[e], share > 1);
      x.scores[list[e]] = j == 0 ? score : x.scores[list[e]] + score;
    }
  }
}

// Makes x.scores, bounds so far, exact wherever they may be the least and at most `limit`.
template <typename T>
void rescore_doubtful(const LolaArgs& a, int64_t page, int64_t set, T limit, UpdateScratch<T>& x) {
  const int64_t share = a.Hs / a.Hg, lam = a.lam;
  // The numbers of all heads of a set are computed at the same time.
  const T* const moved = reinterpret_cast<const T*>(a.moments.at(page, set * share, 5));
  const T low = least_score(lam, x);
  if (!(low < limit)) return;
  int32_t likely = 0;
  while (likely < lam && x.scores[likely] != low) ++likely;
  if (likely == lam) return;
  // The likely least one first: its score rules out most others.
  if (moved[likely] > 0) rescore(a, page, set, &likely, 1, x);
  if (x.scores[likely] < limit) limit = x.scores[likely];
  int64_t listed = 0;
  for (int64_t i = 0; i < lam; ++i) {
    if (x.scores[i] > limit || moved[i] == 0) continue;
    x.order[listed++] = static_cast<int32_t>(i);
    for (int64_t j = 0; j < share; ++j) {
      const char* const row = a.phi.at(page, set * share + j, i);
      for (int64_t b = 0; b < 2 * a.F * size_of(a.phi.dtype); b += 64) __builtin_prefetch(row + b);
    }
  }
  rescore(a, page, set, x.order, listed, x);
}

// How far the recall error of a pair may have moved after another was folded, with features of
// this length and a value of length `reach`: by at most c / (z + c) ||v_l - p|| more.
template <typename T, typename V>
LOLA_INLINE V moved_by(T length, T reach, V nn, V z, V own_length, V moved) {
  const V sum = z + T(1e-6), c = length * own_length;
  const V p = root(nn > 0 ? nn : V{}) / sum + moved;
  return moved + c / (sum + c) * (reach + p);
}

// Takes note of a folded pair, phi_l and v_l, in the numbers of a head's pairs.
template <typename T>
void drift_apart(const LolaArgs& a, int64_t page, int64_t head, const T* phi_l, const T* v_l) {
  const T length = norm(phi_l, round_up<T>(2 * a.F)), reach = norm(v_l, round_up<T>(a.d));
  const int64_t lam = a.lam;
  T* const m = reinterpret_cast<T*>(a.moments.at(page, head, 0));
  T* const moved = m + 5 * lam;
  int64_t i = 0;
  for (; i + kLanes<T> <= lam; i += kLanes<T>) {
    store<T>(moved + i, moved_by<T, Vec<T>>(length, reach, load(m + i), load(m + i + 2 * lam),
                                            load(m + i + 4 * lam), load(moved + i)));
  }
  for (; i < lam; ++i) {
    moved[i] = moved_by<T, T>(length, reach, m[i], m[i + 2 * lam], m[i + 4 * lam], moved[i]);
  }
}

// The update of interval 1: one pair is evicted, and at most one folded. Exact, in O(2F + d) per
// cached pair and head instead of O(2F d), or less where scores are bounded. Asks for memory on its
// way.
template <typename T>
void update_incremental(const LolaArgs& a, int64_t page, int64_t set, int64_t n,
                        UpdateScratch<T>& x, Ahead* ahead) {
  const Candidates c(a, page, set, n);
  const int64_t share = a.Hs / a.Hg, d = a.d, dp = round_up<T>(d), F2 = 2 * a.F;
  const int64_t phi_ld = round_up<T>(F2) + kLanes<T>, size = size_of(a.phi.dtype);
  const bool empty = a.num_folded(n - 1) == 0, bounded = scores_bounded(a, a.num_folded(n - 1));
  const char *const new_k = c.k(c.cached), *const new_v = c.v(c.cached);
  load_row(x.recall.k, new_k, a.exact_k.dtype, d, d);
  load_row(x.recall.v, new_v, a.exact_v.dtype, d, dp);
  T* const newcomer = x.newcomer;  // its numbers, per state head
  for (int64_t j = 0; j < share; ++j) {
    measure_newcomer(a, page, set * share + j, empty, x, x.new_phi + j * phi_ld,
                     newcomer + kMoments * j);
  }

  int32_t* const positions = a.position_row(page, set);
  int64_t loser = -1;  // the newcomer: the youngest, so it also loses a tie
  if (c.cached == a.lam) {
    T least = 0;
    for (int64_t j = 0; j < share; ++j) {
      const T score = least_error_of(newcomer + kMoments * j, 1, 0, share > 1);
      least = j == 0 ? score : least + score;
    }
    bound_scores(a, page, set, x);
    if (bounded) rescore_doubtful(a, page, set, least, x);
    const T low = least_score(a.lam, x);
    for (int64_t i = 0; low < least && i < a.lam; ++i) {
      if (x.scores[i] == low && (loser < 0 || positions[i] > positions[loser])) loser = i;
    }
  }
  const bool folds = c.cached == a.lam;
  const int64_t slot = folds ? loser : c.cached;  // where the newcomer goes, if anywhere
  const T* v_l = x.recall.v;
  if (folds && loser >= 0) {
    load_row(x.recall.v + dp, a.sparse_v.at(page, set, loser), a.sparse_v.dtype, d, dp);
    v_l = x.recall.v + dp;
  }
  if (slot >= 0) {
    const int64_t bytes = d * size_of(a.exact_k.dtype);
    copy_row(a.sparse_k.at(page, set, slot), new_k, bytes);
    copy_row(a.sparse_v.at(page, set, slot), new_v, bytes);
    positions[slot] = static_cast<int32_t>(c.start);
  }
  for (int64_t j = 0; j < share; ++j) {
    const int64_t head = set * share + j;
    const char* const phi_new = reinterpret_cast<const char*>(x.new_phi + j * phi_ld);
    char* const folded = reinterpret_cast<char*>(x.folded);
    copy_row(folded, loser >= 0 ? a.phi.at(page, head, loser) : phi_new, F2 * size);
    if (slot >= 0) {
      copy_row(a.phi.at(page, head, slot), phi_new, F2 * size);
      T* const m = reinterpret_cast<T*>(a.moments.at(page, head, 0));
      for (int64_t i = 0; i < kMoments; ++i) m[slot + i * a.lam] = newcomer[kMoments * j + i];
    }
    if (!folds) continue;
    T* const w = bounded ? nullptr : x.folded + round_up<T>(F2);
    fold_one(a, page, head, empty, x.folded, v_l, x, w);
    if (bounded) {
      drift_apart(a, page, head, x.folded, v_l);
    } else {
      refresh_moments(a, page, set, head, v_l, x, ahead);
    }
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
