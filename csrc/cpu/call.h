// One call of decode or prefill on the CPU, as its kernels see it: the layer's pages and weights,
// the new tokens, and the only functions that know where anything lies. Free of torch.
#pragma once

#include <cstdint>

#include "layout.h"

namespace lola {

// A vector of state indices or token counts, int32 or int64.
struct Indices {
  const char* data = nullptr;
  bool wide = false;
  int64_t stride = 1;  // elements

  int64_t operator[](int64_t i) const {
    const char* p = data + i * stride * (wide ? 8 : 4);
    return wide ? *reinterpret_cast<const int64_t*>(p) : *reinterpret_cast<const int32_t*>(p);
  }
};

// New tokens by heads, [T, heads, d]; the last dimension is contiguous.
struct TokenRows {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t token_stride = 0, head_stride = 0;  // bytes

  char* row(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

// One state page; `csrc/layout.h` says what it holds. T is the dtype of H and s.
struct Page {
  const PageLayout* layout;
  char* data;  // null: the page of a row that is padding

  bool is_padding() const { return data == nullptr; }

  // Keys and values: d numbers of layout->sparse_dtype, or of layout->kv_dtype.
  char* sparse_k(int64_t set, int64_t row) const { return sparse(layout->sparse_k, set, row); }
  char* sparse_v(int64_t set, int64_t row) const { return sparse(layout->sparse_v, set, row); }
  char* exact_k(int64_t kv_head, int64_t row) const { return exact(layout->exact_k, kv_head, row); }
  char* exact_v(int64_t kv_head, int64_t row) const { return exact(layout->exact_v, kv_head, row); }

  // Positions of the pairs of a set.
  int32_t* positions(int64_t set) const {
    return reinterpret_cast<int32_t*>(data + layout->positions) + set * layout->sparse_cache_size;
  }

  // What multiplies the numbers of keys and values of a set; only where layout->int8_pairs().
  float* sparse_k_scale(int64_t set) const { return scales(layout->sparse_k_scale, set); }
  float* sparse_v_scale(int64_t set) const { return scales(layout->sparse_v_scale, set); }

  // What weighs the scores of the pairs of a set; only where layout->has_score_weights.
  template <typename T>
  T* score_weights(int64_t set) const {
    return reinterpret_cast<T*>(data + layout->score_weights) + set * layout->sparse_cache_size;
  }

  // The hidden state of a state head, [2F, d] and [2F].
  template <typename T>
  T* H(int64_t state_head) const {
    return reinterpret_cast<T*>(data + layout->H) +
           state_head * 2 * layout->feature_dim * layout->head_dim;
  }
  template <typename T>
  T* s(int64_t state_head) const {
    return reinterpret_cast<T*>(data + layout->s) + state_head * 2 * layout->feature_dim;
  }

 private:
  char* sparse(int64_t part, int64_t set, int64_t row) const {
    return data + part + (set * layout->sparse_cache_size + row) * layout->sparse_bytes();
  }
  float* scales(int64_t part, int64_t set) const {
    return reinterpret_cast<float*>(data + part) + set * layout->sparse_cache_size;
  }
  char* exact(int64_t part, int64_t kv_head, int64_t row) const {
    return data + part + (kv_head * layout->exact_size() + row) * layout->pair_bytes();
  }
};

struct Call {
  const PageLayout& layout;
  char* pages;
  int64_t page_stride;        // bytes
  Indices state_indices;      // [rows]
  TokenRows q, k, v, out;     // [T, heads, d]
  const void* feature_map_q;  // [Hq, d, F], of the dtype of H and s
  const void* feature_map_k;  // [1 or 2, Hs of the layer, d, F], at the first map of these heads
  const void* gates;          // [Hq, 2]
  const void* importance;     // [Hkv, importance_size()], only where layout.has_score_weights
  int64_t layer_state_heads;  // Hs of the layer

  // State index 0 is vLLM's null block: what has it, or less, is padding.
  Page page(int64_t state_index) const {
    return {&layout, state_index > 0 ? pages + state_index * page_stride : nullptr};
  }

  // The map of a head, [d, F].
  template <typename T>
  const T* query_map(int64_t head) const {
    return static_cast<const T*>(feature_map_q) + head * layout.head_dim * layout.feature_dim;
  }
  // That of the keys that the hidden state of a page takes with its n-th token.
  template <typename T>
  const T* key_map(int64_t state_head, int64_t n) const {
    const int64_t head = state_head + (n > layout.rotated_map_after ? layer_state_heads : 0);
    return static_cast<const T*>(feature_map_k) + head * layout.head_dim * layout.feature_dim;
  }
  // The importance weights of a KV head: d / 2 of lengths, d of a value, and a constant.
  template <typename T>
  const T* importance_weights(int64_t kv_head) const {
    return static_cast<const T*>(importance) + kv_head * layout.importance_size();
  }
  template <typename T>
  T gate(int64_t head) const {
    return static_cast<const T*>(gates)[2 * head];
  }
  // The logit of a head's learned sink, -inf where it has none.
  template <typename T>
  T sink_logit(int64_t head) const {
    return static_cast<const T*>(gates)[2 * head + 1];
  }
};

// Consecutive new tokens of one page: all of a row of the batch, or a part of them (a chunk).
struct NewTokens {
  int64_t state_index;
  int64_t token;     // of the first one: its row in q, k, v and out,
  int64_t position;  // and its position in the sequence
  int64_t count;
};

}  // namespace lola
