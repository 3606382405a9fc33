// The argument of the kernels, a layer and the rows of a call, and what a block takes of it: one
// head group. Addresses within a page are formed here alone. The layout is that of csrc/layout.h
// and lola_vllm/core/state.py; csrc/ops.h states the contract.
#pragma once

#include "constants.h"
#include "cuda/device.cuh"
#include "layout.h"

namespace lola {
namespace cuda {

// Tokens by heads, [rows, heads, head_dim]; the last dimension is contiguous, strides in elements.
struct TokenView {
  char* data;
  int64_t row_stride, head_stride;

  LOLA_DEVICE int64_t offset(int64_t row, int64_t head) const {
    return row * row_stride + head * head_stride;
  }
  template <typename T>
  LOLA_DEVICE T* at(int64_t row, int64_t head) const {
    return reinterpret_cast<T*>(data) + offset(row, head);
  }
};

// A vector of state indices or lengths, int32 or int64.
struct Indices {
  const char* data;
  int64_t stride;
  bool wide;

  LOLA_DEVICE int64_t operator[](int64_t i) const {
    return wide ? reinterpret_cast<const int64_t*>(data)[i * stride]
                : reinterpret_cast<const int32_t*>(data)[i * stride];
  }
};

// The argument of every kernel, passed by value: a captured graph holds all of it but the table,
// which lies in device memory because a layer may have any number of groups.
struct Params {
  PageLayout layout;        // of the first group, with the maps' feature_dim; what groups differ in
                            // is read of the table
  const PageLayout* table;  // [num_groups], in device memory
  int num_groups;
  TokenView q, k, v, out;
  DType q_type, out_type;      // k and v are of the pages' type
  const float* feature_map_q;  // [layer_heads, head_dim, feature_dim], contiguous
  const float* feature_map_k;  // [1 or 2, layer_state_heads, head_dim, feature_dim], contiguous
  const float* gates;          // [layer_heads, 2]: log gates, and logits of learned sinks
  const float* importance_weights;  // [KV heads of the layer, importance_size()], only where pairs
                                    // are weighted
  char* pages;
  int64_t page_stride;              // in bytes
  Indices state_indices, seq_lens;  // [num_rows]
  float* phi;                       // [num_rows, layer_heads, 2 feature_dim], scratch
  float* partial;  // [num_rows, layer_sets, splits, heads_per_set, partial_size()], scratch
  int* lists;      // [num_rows, layer_sets, list_stride], scratch of updates
  int* arrivals;   // [num_rows, layer_sets], scratch: blocks that have computed their scores
  int64_t list_stride;
  int64_t num_pages, num_rows;
  int splits;       // blocks that a row and set is divided among, at most
  int split_work;   // keys and rows of H for each of them
  int score_parts;  // blocks that share the scores of a row and set
  int merging;      // blocks of the launch of updates that join the partial answers

  // Counts, which `decode` in lola.cu checks to fit 32 bits.
  __host__ __device__ int num_heads() const { return static_cast<int>(layout.num_heads); }
  __host__ __device__ int num_sparse_heads() const {
    return static_cast<int>(layout.num_sparse_heads);
  }
  __host__ __device__ int head_dim() const { return static_cast<int>(layout.head_dim); }
  __host__ __device__ int feature_dim() const { return static_cast<int>(layout.feature_dim); }
  // Query heads, state heads and sparse sets of the layer.
  __host__ __device__ int layer_heads() const { return num_groups * num_heads(); }
  __host__ __device__ int layer_state_heads() const {
    return num_groups * static_cast<int>(layout.num_state_heads);
  }
  __host__ __device__ int layer_sets() const { return num_groups * num_sparse_heads(); }
  // Query heads and state heads of a sparse set, sparse sets of a KV head, query heads of a state
  // head.
  __host__ __device__ int heads_per_set() const { return num_heads() / num_sparse_heads(); }
  __host__ __device__ int states_per_set() const {
    return static_cast<int>(layout.num_state_heads) / num_sparse_heads();
  }
  __host__ __device__ int sets_per_kv_head() const {
    return num_sparse_heads() / static_cast<int>(layout.num_kv_heads);
  }
  __host__ __device__ int heads_per_state() const {
    return num_heads() / static_cast<int>(layout.num_state_heads);
  }
  __host__ __device__ int partial_size() const { return 4 + 2 * head_dim(); }

  // Whether a row has a page. A state index beyond the pool cannot be refused without waiting for
  // the device: its page is not touched and its answer is NaN.
  LOLA_DEVICE bool live(int64_t row) const {
    const int64_t page = state_indices[row];
    return page > 0 && page < num_pages && seq_lens[row] > 0;
  }
  LOLA_DEVICE float answer_of_padding(int64_t row) const {
    return state_indices[row] < num_pages ? 0.0f : __uint_as_float(0x7fc00000u);
  }
};

// One head group of a layer. All heads are counted from the group's first.
struct Group : Params {
  const PageLayout* own;  // its row of the table
  int first_head, first_state, first_set;

  LOLA_DEVICE Group(const Params& all, int index) : Params(all), own(all.table + index) {
    layout.sparse_cache_size = number(&PageLayout::sparse_cache_size);
    layout.recent_size = number(&PageLayout::recent_size);
    first_head = index * num_heads();
    first_state = index * static_cast<int>(layout.num_state_heads);
    first_set = index * num_sparse_heads();
    const int first_kv_head = index * static_cast<int>(layout.num_kv_heads);
    skip(q, q_type, first_head);
    skip(k, layout.kv_dtype, first_kv_head);
    skip(v, layout.kv_dtype, first_kv_head);
    skip(out, out_type, first_head);
    gates += 2 * first_head;
    if (layout.has_score_weights != 0) {
      importance_weights += first_kv_head * layout.importance_size();
    }
  }

  LOLA_DEVICE int sparse_cache_size() const { return static_cast<int>(layout.sparse_cache_size); }
  // Whether a page keeps a weight of each sparse pair's score.
  LOLA_DEVICE bool weighted() const {
    return layout.has_score_weights != 0 && layout.sparse_cache_size > 0;
  }
  // Blocks that a row and set of this group is divided among.
  LOLA_DEVICE int own_splits() const {
    const int wanted = static_cast<int>((layout.step_work() + split_work - 1) / split_work);
    return wanted < splits ? wanted : splits;
  }

  // --- scratch ---

  LOLA_DEVICE float* phi_of(int64_t row, int head) const {
    return phi + (row * layer_heads() + first_head + head) * 2 * feature_dim();
  }
  // Partial answer of a head: largest, total, normal, unused, soft[d], linear[d].
  LOLA_DEVICE float* partial_of(int64_t row, int head, int split) const {
    const int64_t set = first_set + head / heads_per_set(), h = head % heads_per_set();
    return partial +
           (((row * layer_sets() + set) * splits + split) * heads_per_set() + h) * partial_size();
  }

  // --- addresses: where a head's or a set's part of a page starts, and a row of it ---

  // float32 [head_dim, feature_dim].
  LOLA_DEVICE const float* query_map(int head) const {
    return feature_map_q + static_cast<int64_t>(first_head + head) * head_dim() * feature_dim();
  }
  // float32 [head_dim, feature_dim]: the map of the keys that a hidden state takes with the n-th
  // token of its page.
  LOLA_DEVICE const float* key_map(int state, int64_t n) const {
    const int64_t head =
        first_state + state + (n > layout.rotated_map_after ? layer_state_heads() : 0);
    return feature_map_k + head * head_dim() * feature_dim();
  }
  // float32 [2 feature_dim, head_dim].
  LOLA_DEVICE float* H(int64_t page, int state, int row = 0) const {
    return part<float>(page, &PageLayout::H) +
           (static_cast<int64_t>(state) * (2 * feature_dim()) + row) * head_dim();
  }
  // float32 [2 feature_dim].
  LOLA_DEVICE float* s(int64_t page, int state) const {
    return part<float>(page, &PageLayout::s) + static_cast<int64_t>(state) * (2 * feature_dim());
  }
  // int32 [sparse_cache_size].
  LOLA_DEVICE int32_t* positions(int64_t page, int set) const {
    return part<int32_t>(page, &PageLayout::positions) + first_entry(set);
  }
  // float32 [sparse_cache_size], only where pairs are weighted.
  LOLA_DEVICE float* score_weights(int64_t page, int set) const {
    return part<float>(page, &PageLayout::score_weights) + first_entry(set);
  }
  // float32 [sparse_cache_size], only where the layout has int8_pairs(): what multiplies the
  // numbers of each key, and of each value.
  LOLA_DEVICE float* sparse_k_scale(int64_t page, int set) const {
    return part<float>(page, &PageLayout::sparse_k_scale) + first_entry(set);
  }
  LOLA_DEVICE float* sparse_v_scale(int64_t page, int set) const {
    return part<float>(page, &PageLayout::sparse_v_scale) + first_entry(set);
  }
  // [sparse_cache_size, head_dim]; T is int8_t where the layout has int8_pairs().
  template <typename T>
  LOLA_DEVICE T* sparse_k(int64_t page, int set, int64_t entry = 0) const {
    return part<T>(page, &PageLayout::sparse_k) + (first_entry(set) + entry) * head_dim();
  }
  template <typename T>
  LOLA_DEVICE T* sparse_v(int64_t page, int set, int64_t entry = 0) const {
    return part<T>(page, &PageLayout::sparse_v) + (first_entry(set) + entry) * head_dim();
  }
  // [sink_size + ring, head_dim].
  template <typename T>
  LOLA_DEVICE T* exact_k(int64_t page, int kv_head, int64_t row = 0) const {
    return part<T>(page, &PageLayout::exact_k) + (first_exact(kv_head) + row) * head_dim();
  }
  template <typename T>
  LOLA_DEVICE T* exact_v(int64_t page, int kv_head, int64_t row = 0) const {
    return part<T>(page, &PageLayout::exact_v) + (first_exact(kv_head) + row) * head_dim();
  }

  // --- what a token count says ---

  // Whether something was folded into H and s before there were more than n tokens.
  LOLA_DEVICE bool any_folded(int64_t n) const {
    return layout.window_start(n) - layout.sink_size > number(&PageLayout::folds_after);
  }

 private:
  template <typename T>
  LOLA_DEVICE T* part(int64_t page, int64_t PageLayout::* offset) const {
    return reinterpret_cast<T*>(pages + page * page_stride + number(offset));
  }
  // Entries of the sets before this one.
  LOLA_DEVICE int64_t first_entry(int set) const {
    return static_cast<int64_t>(set) * sparse_cache_size();
  }
  LOLA_DEVICE int64_t first_exact(int kv_head) const {
    return kv_head * (layout.sink_size + layout.ring_size());
  }
  // A field of this group. A plain load, which stays where it is used: 10 offsets would take 20
  // registers, and loads that the compiler may move made kernels spill.
  LOLA_DEVICE int64_t number(int64_t PageLayout::* field) const { return own->*field; }
  LOLA_DEVICE static void skip(TokenView& view, DType type, int heads) {
    view.data += heads * view.head_stride * size_of(type);
  }
};

// sum + added, rounded with the dither of row f of H, or of s[f], in update number `update`
// (Lemma 3, docs/bounds.md). An update that is added in several parts gives each part rows of
// its own.
LOLA_DEVICE float add_dithered(float sum, float added, int64_t update, int f) {
  const unsigned place =
      static_cast<unsigned>(update) * kDitherUpdate + static_cast<unsigned>(f) * kDitherRow;
  const float dither = static_cast<float>(static_cast<int>(place)) * kDitherUnit;
  return sum + (added + __uint_as_float(__float_as_uint(sum) & kExponentBits) * dither);
}

}  // namespace cuda
}  // namespace lola
