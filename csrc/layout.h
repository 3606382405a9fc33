// The layout of a state page, and what a token count says is valid in it: the C++ form of
// `StateLayout` (lola_vllm/core/state.py). Free of torch; CPU and CUDA kernels include it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LOLA_HOST_DEVICE __host__ __device__
#else
#define LOLA_HOST_DEVICE
#endif

namespace lola {

enum class DType : int64_t { f32, bf16, f16, f64, i8 };

LOLA_HOST_DEVICE constexpr int64_t size_of(DType t) {
  return t == DType::f64 ? 8 : t == DType::f32 ? 4 : t == DType::i8 ? 1 : 2;
}

// A row of the table that `LayerLayout.table` makes, field by field (`TABLE_FIELDS`). The last
// ten fields are byte offsets of the parts in the layer's bytes; every part is contiguous.
struct PageLayout {
  int64_t num_heads, num_kv_heads, num_state_heads, num_sparse_heads, head_dim, feature_dim;
  int64_t window_size, sparse_cache_size, recent_size;
  int64_t folds_after;  // pairs of a set that leave the window before any is folded; without a
                        // hidden state none is
  int64_t update_interval, sink_size;
  int64_t subtract_max;       // 1: mixing "lolcats"
  int64_t has_score_weights;  // 1: scores are weighted, and pages keep a weight per sparse pair
  int64_t rotated_map_after;  // pages with more tokens map keys by the second maps
  DType kv_dtype;             // of keys and values
  DType sparse_dtype;         // of those in the sparse cache: kv_dtype, or i8 with a scale each
  DType state_dtype;          // of H and s
  int64_t page_bytes;         // where the page ends in the layer's bytes
  int64_t H, s, positions, score_weights, sparse_k_scale, sparse_v_scale, sparse_k, sparse_v;
  int64_t exact_k, exact_v;

  // Heads of one kind for each of another. They are grouped in order: query head h has the hidden
  // state h / heads_per_state(), for instance.
  LOLA_HOST_DEVICE int64_t heads_per_set() const { return num_heads / num_sparse_heads; }
  LOLA_HOST_DEVICE int64_t heads_per_state() const { return num_heads / num_state_heads; }
  LOLA_HOST_DEVICE int64_t states_per_set() const { return num_state_heads / num_sparse_heads; }
  LOLA_HOST_DEVICE int64_t sets_per_kv_head() const { return num_sparse_heads / num_kv_heads; }
  LOLA_HOST_DEVICE int64_t kv_head_of(int64_t set) const { return set / sets_per_kv_head(); }

  // Rows of the window ring, and of exact_k and exact_v: the sinks and the ring.
  LOLA_HOST_DEVICE int64_t ring_size() const { return window_size + update_interval; }
  LOLA_HOST_DEVICE int64_t exact_size() const { return sink_size + ring_size(); }

  // Numbers of a KV head's importance weights: of the lengths of a key's rotary pairs, of a value,
  // and a constant.
  LOLA_HOST_DEVICE int64_t importance_size() const { return head_dim / 2 + head_dim + 1; }

  // Bytes of one key or value, and of one in the sparse cache.
  LOLA_HOST_DEVICE int64_t pair_bytes() const { return head_dim * size_of(kv_dtype); }
  LOLA_HOST_DEVICE int64_t sparse_bytes() const { return head_dim * size_of(sparse_dtype); }

  // Whether pairs are rounded to int8 as they leave the window.
  LOLA_HOST_DEVICE bool int8_pairs() const { return sparse_dtype == DType::i8; }

  // Row of exact_k and exact_v that holds a position.
  LOLA_HOST_DEVICE int64_t exact_row(int64_t position) const {
    return position < sink_size ? position : sink_size + position % ring_size();
  }

  // First position of the window after n tokens, sinks aside.
  LOLA_HOST_DEVICE int64_t window_start(int64_t n) const {
    const int64_t start = n / update_interval * update_interval - window_size;
    return start < sink_size ? sink_size : start;
  }

  // Valid pairs of a sparse set after n tokens.
  LOLA_HOST_DEVICE int64_t num_sparse(int64_t n) const {
    const int64_t evicted = window_start(n) - sink_size;
    return evicted < sparse_cache_size ? evicted : sparse_cache_size;
  }

  // Pairs of a sparse set that are in H and s after n tokens.
  LOLA_HOST_DEVICE int64_t num_folded(int64_t n) const {
    const int64_t evicted = window_start(n) - sink_size;
    return evicted > folds_after ? evicted - sparse_cache_size : 0;
  }

  // Whether the n-th token is followed by an update that evicts anything. A sliding layer, without
  // H and sparse pairs, drops what leaves its window.
  LOLA_HOST_DEVICE bool update_due(int64_t n) const {
    return (feature_dim > 0 || sparse_cache_size > 0) && n % update_interval == 0 &&
           window_start(n) > window_start(n - update_interval);
  }

  // Keys and rows of H that a decode step of a set reads, at most.
  LOLA_HOST_DEVICE int64_t step_work() const {
    return exact_size() + sparse_cache_size + 2 * feature_dim;
  }
};

constexpr int64_t kTableFields = 29;
static_assert(sizeof(PageLayout) == kTableFields * sizeof(int64_t));

}  // namespace lola
