// The candidates of an update and their features phi(k), which scoring and folding both need.
#pragma once

#include "cpu/recall.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// The next `bytes` of a block of memory, from a cache line on; null stays null.
inline char* take(char* base, int64_t bytes, int64_t* used) {
  char* const p = base == nullptr ? nullptr : base + *used;
  *used += (bytes + 63) / 64 * 64;
  return p;
}

template <typename T>
inline T* take_as(char* base, int64_t count, int64_t* used) {
  return reinterpret_cast<T*>(take(base, count * static_cast<int64_t>(sizeof(T)), used));
}

// The candidates of an update: cached pairs by slot, then evicted ones by position.
struct Candidates {
  const LolaArgs& a;
  int64_t page, set, cached, start, count;

  Candidates(const LolaArgs& args, int64_t page_, int64_t set_, int64_t n)
      : a(args),
        page(page_),
        set(set_),
        cached(args.num_sparse(n - args.interval)),
        start(args.window_start(n - args.interval)),
        count(cached + args.window_start(n) - start) {}

  int64_t kv_head() const { return set / (a.Hg / a.Hkv); }
  LOLA_INLINE const char* k(int64_t i) const {
    return i < cached ? a.sparse_k.at(page, set, i)
                      : a.exact_k.at(page, kv_head(), a.exact_row(start + i - cached));
  }
  LOLA_INLINE const char* v(int64_t i) const {
    return i < cached ? a.sparse_v.at(page, set, i)
                      : a.exact_v.at(page, kv_head(), a.exact_row(start + i - cached));
  }
};

// Features of the candidates of one sparse set: share x E rows for `share` state heads and E = lam
// + interval candidates. The first `known` rows of every head are right: a run of updates of one
// page keeps those of the pairs that stay.
template <typename T>
struct Features {
  T* rows;
  int64_t known;

  static int64_t stride(const LolaArgs& a) { return round_up<T>(2 * a.F) + kLanes<T>; }
  static int64_t size(const LolaArgs& a) { return a.Hs / a.Hg * (a.lam + a.interval) * stride(a); }
  LOLA_INLINE T* row(const LolaArgs& a, int64_t head, int64_t i) const {
    return rows + (head * (a.lam + a.interval) + i) * stride(a);
  }
};

// Fills the rows of candidates from f.known on.
template <typename T>
void map_candidates(const LolaArgs& a, const Candidates& c, const RecallScratch<T>& x,
                    int64_t block, Features<T>& f) {
  const int64_t d = a.d, share = a.Hs / a.Hg;
  for (int64_t first = f.known; first < c.count; first += block) {
    const int64_t left = c.count - first, size = left < block ? left : block;
    for (int64_t i = 0; i < size; ++i) {
      load_row(x.k + i * d, c.k(first + i), a.exact_k.dtype, d, d);
    }
    for (int64_t j = 0; j < share; ++j) {
      map_keys(a.recall, x, c.set * share + j, size, f.row(a, j, first));
    }
  }
  f.known = c.count;
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
