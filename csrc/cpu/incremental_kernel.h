// Kernel body of the update of interval 1 (docs/algorithm.md, section 3): one pair is evicted and
// at most one folded, so all scores can be kept up to date instead of being computed anew. Included
// by for_each_isa.h through lola_kernel.h, once per instruction set.

namespace lola {
namespace LOLA_ISA {
namespace {

// A sparse pair's numbers are ||n||^2, n.v, phi.s and ||v||^2 with n = phi^T H. From them
// SRE^2 = ||v - n / z||^2 with z = phi.s + 1e-6, and folding another pair changes n by a multiple
// of that pair's v, so they can be kept up to date without H.

// scores[i] (+)= the self-recall errors of `count` pairs of one state head, or their ratios to
// ||v||. The four numbers of pair i lie at m[i], m[i + ld], m[i + 2 ld], m[i + 3 ld].
template <typename T>
void moment_errors(const T* m, int64_t ld, int64_t count, bool relative, bool first, T* scores) {
  for (int64_t i = 0; i < count; ++i) {
    const T vv = m[i + 3 * ld], inverse = T(1) / (m[i + 2 * ld] + T(1e-6));
    const T square = (m[i] * inverse - 2 * m[i + ld]) * inverse + vv;
    T error = __builtin_sqrt(square > 0 ? square : T(0));
    if (relative) {
      const T length = __builtin_sqrt(vv);
      error /= length > T(1e-6) ? length : T(1e-6);
    }
    scores[i] = first ? error : scores[i] + error;
  }
}

// Features of the newcomer under one head's map into `phi`, and its moments into m[4].
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

// H += phi v^T, s += phi for one pair, and w = H v with H as before.
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
    w[f] = reduce<Sum>(dot);
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

// The update of interval 1: one pair is evicted, and at most one folded. Exact, in O(2F + d) per
// cached pair and head instead of O(2F d). Asks for memory on its way.
template <typename T>
void update_incremental(const LolaArgs& a, int64_t page, int64_t set, int64_t n,
                        UpdateScratch<T>& x, Ahead* ahead) {
  const Candidates c(a, page, set, n);
  const int64_t share = a.Hs / a.Hg, d = a.d, dp = round_up<T>(d), F2 = 2 * a.F;
  const int64_t phi_ld = round_up<T>(F2) + kLanes<T>, size = size_of(a.phi.dtype);
  const bool empty = a.num_folded(n - 1) == 0;
  const char *const new_k = c.k(c.cached), *const new_v = c.v(c.cached);
  load_row(x.recall.k, new_k, a.exact_k.dtype, d, d);
  load_row(x.recall.v, new_v, a.exact_v.dtype, d, dp);
  T* const newcomer = x.newcomer;  // its four numbers, per state head
  for (int64_t j = 0; j < share; ++j) {
    measure_newcomer(a, page, set * share + j, empty, x, x.new_phi + j * phi_ld, newcomer + 4 * j);
  }

  int32_t* const positions = a.position_row(page, set);
  int64_t loser = -1;  // the newcomer: the youngest, so it also loses a tie
  if (c.cached == a.lam) {
    T least = 0;
    for (int64_t j = 0; j < share; ++j) {
      const T* const m = reinterpret_cast<const T*>(a.moments.at(page, set * share + j, 0));
      moment_errors(m, a.lam, a.lam, share > 1, j == 0, x.scores);
      moment_errors(newcomer + 4 * j, 1, 1, share > 1, j == 0, &least);
    }
    for (int64_t i = 0; i < a.lam; ++i) {
      if (x.scores[i] > least) continue;
      if (x.scores[i] < least || (loser >= 0 && positions[i] > positions[loser])) {
        least = x.scores[i];
        loser = i;
      }
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
      for (int64_t i = 0; i < 4; ++i) m[slot + i * a.lam] = newcomer[4 * j + i];
    }
    if (folds) {
      fold_one(a, page, head, empty, x.folded, v_l, x, x.folded + round_up<T>(F2));
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
