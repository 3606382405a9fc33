// The candidates of an update, and their features phi(k), which scoring and folding both need.
#pragma once

#include "cpu/call.h"
#include "cpu/int8_rows.h"
#include "cpu/recall.h"
#include "cpu/workspace.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// Which update: that of one page and sparse set after its n-th token.
struct UpdatePoint {
  Page page;
  int64_t set, n;
};

// The pairs that an update chooses among: cached ones by entry, then evicted ones by position.
struct Candidates {
  const Page& page;
  const PageLayout& layout;
  int64_t set, kv_head, n;
  int64_t cached, start, count;  // `start` is the position of the first evicted pair
  int64_t first_recent;          // pairs from this position on stay, whatever their score is
  bool empty;                    // H and s hold nothing yet

  explicit Candidates(const UpdatePoint& at)
      : page(at.page),
        layout(*at.page.layout),
        set(at.set),
        kv_head(layout.kv_head_of(at.set)),
        n(at.n),
        cached(layout.num_sparse(at.n - layout.update_interval)),
        start(layout.window_start(at.n - layout.update_interval)),
        count(cached + layout.window_start(at.n) - start),
        first_recent(layout.window_start(at.n) - layout.recent_size),
        empty(layout.num_folded(at.n - layout.update_interval) == 0) {}

  // Key and value of candidate i as T, as they are outside the window, then zeros up to `padded`.
  template <typename T>
  LOLA_INLINE void load_k(int64_t i, T* to, int64_t padded) const {
    if (i < cached) return load_sparse_k(page, set, i, to, padded);
    load_evicted(page.exact_k(kv_head, exact_row(i)), to, padded);
  }
  template <typename T>
  LOLA_INLINE void load_v(int64_t i, T* to, int64_t padded) const {
    if (i < cached) return load_sparse_v(page, set, i, to, padded);
    load_evicted(page.exact_v(kv_head, exact_row(i)), to, padded);
  }

  // Puts the evicted pair i into an entry; `room` is for d numbers.
  template <typename T>
  LOLA_INLINE void put(int64_t i, int64_t entry, T* room) const {
    const char *const k = page.exact_k(kv_head, exact_row(i)), *const v = page.exact_v(
                                                                   kv_head, exact_row(i));
    char *const to_k = page.sparse_k(set, entry), *const to_v = page.sparse_v(set, entry);
    const int64_t d = layout.head_dim;
    if (layout.int8_pairs()) {
      load_row(room, k, layout.kv_dtype, d, d);
      store_int8_row(room, d, to_k, page.sparse_k_scale(set) + entry);
      load_row(room, v, layout.kv_dtype, d, d);
      store_int8_row(room, d, to_v, page.sparse_v_scale(set) + entry);
    } else {
      copy_bytes(to_k, k, layout.pair_bytes());
      copy_bytes(to_v, v, layout.pair_bytes());
    }
  }

 private:
  LOLA_INLINE int64_t exact_row(int64_t i) const { return layout.exact_row(start + i - cached); }

  template <typename T>
  LOLA_INLINE void load_evicted(const char* row, T* to, int64_t padded) const {
    load_row(to, row, layout.kv_dtype, layout.head_dim, padded);
    if (layout.int8_pairs()) round_row(to, layout.head_dim);
  }
};

// The most candidates that an update of a layer can have.
inline int64_t max_candidates(const PageLayout& layout) {
  return layout.sparse_cache_size + layout.update_interval;
}

// Features of the candidates of one sparse set, for each of its state heads. The first `known` rows
// of every head are right: prefill keeps those of the pairs that stay from update to update.
template <typename T>
struct Features {
  T* rows;
  int64_t stride;          // between rows
  int64_t rows_per_state;  // max_candidates()
  int64_t known = 0;

  Features() = default;
  Features(const PageLayout& layout, Workspace& memory)
      : rows(memory.take<T>(layout.states_per_set() * max_candidates(layout) *
                            feature_stride<T>(layout))),
        stride(feature_stride<T>(layout)),
        rows_per_state(max_candidates(layout)) {}

  // Of candidate i under the j-th state head of the set.
  LOLA_INLINE T* row(int64_t j, int64_t i) const {
    return rows + (j * rows_per_state + i) * stride;
  }
};

// Fills the rows of the listed candidates, in blocks of up to `block`.
template <typename T>
void map_listed(const Call& call, const Candidates& c, const int32_t* list, int64_t listed,
                const RecallWorkspace<T>& x, int64_t block, const Features<T>& features) {
  const int64_t d = c.layout.head_dim, states = c.layout.states_per_set();
  for (int64_t first = 0; first < listed; first += block, list += block) {
    const int64_t left = listed - first, size = left < block ? left : block;
    const bool adjacent = list[size - 1] - list[0] == size - 1;  // lists ascend
    for (int64_t i = 0; i < size; ++i) c.load_k(list[i], x.k + i * d, d);
    for (int64_t j = 0; j < states; ++j) {
      T* const phi = adjacent ? features.row(j, list[0]) : x.phi;
      map_keys(call, c.set * states + j, c.n, size, x, phi);
      for (int64_t i = 0; i < size && !adjacent; ++i) {
        copy_row(features.row(j, list[i]), phi + i * features.stride, features.stride);
      }
    }
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
