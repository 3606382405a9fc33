// Kernel body of prefill: a block of queries of one piece of a prompt against one page.
//
// A piece lies within one update interval, so all its queries see the same cache and hidden state,
// and of the window a prefix of the same list of keys. Logits are kept transposed, keys by columns
// of queries: the softmax then runs down the columns without a reduction across lanes.
#pragma once

#include "cpu/decode.h"
#if LOLA_BF16_DOTS
#include "cpu/bf16/prefill_attend.h"
#endif

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

template <typename T>
struct PrefillScratch {
  T *k, *v, *q, *q_t, *z, *y, *limit, *sum, *largest, *feature, *phi, *linear, *W, *H, *s;
#if LOLA_BF16_DOTS
  DotScratch dots;
#endif
};

template <typename T>
int64_t carve_prefill(const LolaArgs& a, char* base, PrefillScratch<T>* x) {
  const int64_t dp = round_up<T>(a.d), F2 = 2 * a.F, Fp = round_up<T>(a.F);
  const int64_t keys = a.lam + a.sink + a.ring();
  const int64_t block = query_block(a), columns = round_up<T>(a.Hq / a.Hg * block);
  int64_t used = 0;
  x->q = take_as<T>(base, columns * dp, &used);
  x->y = take_as<T>(base, columns * dp, &used);
  x->limit = take_as<T>(base, columns, &used);
  x->sum = take_as<T>(base, columns, &used);
  x->largest = take_as<T>(base, columns, &used);
  x->feature = take_as<T>(base, block * Fp, &used);
  x->phi = take_as<T>(base, block * (round_up<T>(F2) + kLanes<T>), &used);
  x->linear = take_as<T>(base, block * dp, &used);
  x->W = take_as<T>(base, a.d * Fp, &used);
  x->H = take_as<T>(base, F2 * dp, &used);
  x->s = take_as<T>(base, round_up<T>(F2), &used);
#if LOLA_BF16_DOTS
  if (sizeof(T) == 4 && takes_dots(a)) {
    return used + carve_dots(a, base == nullptr ? nullptr : base + used, &x->dots);
  }
#endif
  x->k = take_as<T>(base, keys * dp, &used);
  x->v = take_as<T>(base, keys * dp, &used);
  x->q_t = take_as<T>(base, a.d * columns, &used);
  x->z = take_as<T>(base, keys * columns, &used);
  return used;
}

// Query column m sees the first limit[m] of the keys, which are in the order sparse cache, sinks,
// window. Columns of padding see what the first ones see.
template <typename T>
void set_limits(const LolaArgs& a, const AttendItem& item, int64_t columns, T* limit) {
  const int64_t cached = a.num_sparse(item.position), start = a.window_start(item.position);
  for (int64_t m = 0; m < columns; ++m) {
    const int64_t p = item.position + item.first + m % item.count;
    const int64_t exact = p < a.sink ? p + 1 : a.sink + p - start + 1;
    limit[m] = static_cast<T>(cached + exact);
  }
}

// Keys and values as T. Returns their number.
template <typename T>
int64_t gather_keys(const LolaArgs& a, const AttendItem& item, PrefillScratch<T>& x) {
  const int64_t d = a.d, dp = round_up<T>(d), kv = item.set / (a.Hg / a.Hkv), page = item.page;
  const int64_t end = item.position + item.first + item.count;
  const int64_t cached = a.num_sparse(item.position), start = a.window_start(item.position);
  const int64_t sinks = end < a.sink ? end : a.sink;
  int64_t n = 0;
  for (int64_t i = 0; i < cached; ++i, ++n) {
    load_row(x.k + n * dp, a.sparse_k.at(page, item.set, i), a.sparse_k.dtype, d, dp);
    load_row(x.v + n * dp, a.sparse_v.at(page, item.set, i), a.sparse_v.dtype, d, dp);
  }
  for (int64_t i = 0; i < sinks; ++i, ++n) {
    load_row(x.k + n * dp, a.exact_k.at(page, kv, i), a.exact_k.dtype, d, dp);
    load_row(x.v + n * dp, a.exact_v.at(page, kv, i), a.exact_v.dtype, d, dp);
  }
  for (int64_t p = start; p < end; ++p, ++n) {
    const int64_t row = a.exact_row(p);
    load_row(x.k + n * dp, a.exact_k.at(page, kv, row), a.exact_k.dtype, d, dp);
    load_row(x.v + n * dp, a.exact_v.at(page, kv, row), a.exact_v.dtype, d, dp);
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
void attend_exact(const LolaArgs& a, const AttendItem& item, PrefillScratch<T>& x) {
  const int64_t d = a.d, dp = round_up<T>(d), M = a.Hq / a.Hg * item.count;
  const int64_t columns = round_up<T>(M);
  const T scale = T(1) / __builtin_sqrt(static_cast<T>(d));
  for (int64_t m = 0; m < columns; ++m) {
    const T* const q = x.q + m * dp;
    for (int64_t j = 0; j < d; ++j) x.q_t[j * columns + m] = m < M ? q[j] * scale : T(0);
  }
  const int64_t keys = gather_keys(a, item, x);
  gemm<T>(x.k, dp, x.q_t, columns, x.z, columns, keys, columns, d);
  softmax_columns(x.z, keys, columns, x.limit, x.sum, x.largest);
  gemm_transposed<T>(x.z, columns, x.v, dp, x.y, dp, M, dp, keys);
}

// The answers of a block: what attend_exact() found, mixed with the hidden state.
template <typename T>
void mix_block(const LolaArgs& a, const AttendItem& item, PrefillScratch<T>& x) {
  const int64_t d = a.d, dp = round_up<T>(d), heads = a.Hq / a.Hg, first_head = item.set * heads;
  const int64_t L = item.count;
  const bool linear = a.num_folded(item.position) > 0;
  const int64_t F2 = 2 * a.F, Fp = round_up<T>(a.F), phi_ld = round_up<T>(F2) + kLanes<T>;
  const RecallArgs& r = a.recall;
  const T* H = nullptr;
  int64_t H_ld = 0, loaded = -1;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t head = first_head + h;
    if (linear) {
      const int64_t state = head / (a.Hq / a.Hs);
      if (state != loaded) {
        H = padded_matrix<T>(r.H.at(item.page, state), r.H.dtype, r.H.stride[2], F2, d, x.H, &H_ld);
        load_row(x.s, r.s.at(item.page, state), r.s.dtype, F2, round_up<T>(F2));
        loaded = state;
      }
      int64_t W_ld;
      const T* W = padded_matrix<T>(a.feature_map_q.at(head), a.feature_map_q.dtype,
                                    a.feature_map_q.stride[1], d, a.F, x.W, &W_ld);
      gemm<T>(x.q + h * L * dp, dp, W, W_ld, x.feature, Fp, L, Fp, d);
      for (int64_t t = 0; t < L; ++t) feature_map(x.feature + t * Fp, a.F, x.phi + t * phi_ld);
      gemm<T>(x.phi, phi_ld, H, H_ld, x.linear, dp, L, dp, F2);
    }
    for (int64_t t = 0; t < L; ++t) {
      const int64_t m = h * L + t;
      T soft = T(1) / x.sum[m], rest = 0;
      if (linear) {
        Vec<T> dot{};
        for (int64_t f = 0; f < round_up<T>(F2); f += kLanes<T>) {
          dot = fma(load(x.phi + t * phi_ld + f), load(x.s + f), dot);
        }
        const T D = reduce<Sum>(dot);
        const T share = exact_share<T>(a, head, x.largest[m], x.sum[m], D);
        soft *= share;
        rest = (T(1) - share) / D;
      }
      T* const y = x.y + m * dp;
      for (int64_t j = 0; j < dp; j += kLanes<T>) {
        Vec<T> sum = load(y + j) * soft;
        if (linear) sum = fma(load(x.linear + t * dp + j), splat(rest), sum);
        store<T>(y + j, sum);
      }
      store_row(a.out.at(item.token + t, head), y, a.out.dtype, d);
    }
  }
}

template <typename T>
void attend_block(const LolaArgs& a, const AttendItem& item, PrefillScratch<T>& x) {
  const int64_t dp = round_up<T>(a.d), L = item.count, M = a.Hq / a.Hg * L;
  for (int64_t m = 0; m < M; ++m) {
    const char* const q = a.q.at(item.token + m % L, item.set * (a.Hq / a.Hg) + m / L);
    load_row(x.q + m * dp, q, a.q.dtype, a.d, dp);
  }
  set_limits(a, item, round_up<T>(M), x.limit);
#if LOLA_BF16_DOTS
  if constexpr (sizeof(T) == 4) {
    if (takes_dots(a)) {
      attend_dots(a, item, x.dots, {x.y, x.limit, x.sum, x.largest});
      return mix_block(a, item, x);
    }
  }
#endif
  attend_exact(a, item, x);
  mix_block(a, item, x);
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
