// Attention of a few queries over rows of keys and values that lie one after the other in a page:
// logits, weighted sums of values, and the products with the hidden state. The rows come from
// memory once, for all the query heads that they serve.
#pragma once

#include "cpu/prefetch.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// Neighbouring rows of keys and values: of the dtype of a layer's, or of int8, with scales.
struct Segment {
  const char *k, *v;
  int64_t row_bytes, count;
  const float *k_scale = nullptr, *v_scale = nullptr;
};

constexpr int kHeads = 4;  // query heads whose accumulators fit the registers

// Calls body.run<G>(first) for groups of G heads: kMost at a time, and what is left at once.
template <int kMost, typename Body>
LOLA_INLINE void for_head_groups(int64_t heads, const Body& body) {
  static_assert(kMost == 3 || kMost == 4);
  int64_t first = 0;
  for (; first + kMost <= heads; first += kMost) body.template run<kMost>(first);
  const int64_t left = heads - first;
  if (kMost == 4 && left == 3) {
    body.template run<3>(first);
  } else if (left == 2) {
    body.template run<2>(first);
  } else if (left == 1) {
    body.template run<1>(first);
  }
}

// Element i of a row as T: whole vectors of it.
template <typename T, DType D>
LOLA_INLINE Vec<T> load_as(const char* row, int64_t i) {
  if constexpr (D == DType::bf16) {
    return load_bf16(reinterpret_cast<const uint16_t*>(row) + i);
  } else if constexpr (D == DType::i8) {
    return load_bytes<T>(reinterpret_cast<const int8_t*>(row) + i);
  } else {
    return load(reinterpret_cast<const T*>(row) + i);
  }
}

// Logits of R neighbouring rows of keys for G heads.
template <typename T, DType D, int G, int R>
LOLA_INLINE void dot_tile(const T* q, int64_t dp, const char* k, int64_t row_bytes, T* z,
                          int64_t ld) {
  Vec<T> acc[G][R];
#pragma GCC unroll 8
  for (int h = 0; h < G; ++h) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) acc[h][i] = Vec<T>{};
  }
  for (int64_t j = 0; j < dp; j += kLanes<T>) {
    Vec<T> x[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) x[i] = load_as<T, D>(k + i * row_bytes, j);
#pragma GCC unroll 8
    for (int h = 0; h < G; ++h) {
      const Vec<T> y = load(q + h * dp + j);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) acc[h][i] = fma(y, x[i], acc[h][i]);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < G; ++h) {
    if constexpr (R == 4) {
      sum_lanes(acc[h], z + h * ld, 1);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) z[h * ld + i] = reduce<Sum>(acc[h][i]);
    }
  }
}

// z[h * ld + i] = q_h . k_i for G heads and `count` rows of d elements, d a whole number of
// vectors.
template <typename T, DType D, int G>
LOLA_INLINE void dot_rows(const T* q, int64_t dp, const char* k, int64_t row_bytes, int64_t count,
                          T* z, int64_t ld, Prefetcher* prefetcher) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    if (prefetcher != nullptr) {
      for (int64_t j = 0; j < row_bytes; j += 64) prefetcher->prefetch<4>();
    }
    dot_tile<T, D, G, 4>(q, dp, k + i * row_bytes, row_bytes, z + i, ld);
  }
  for (; i < count; ++i) dot_tile<T, D, G, 1>(q, dp, k + i * row_bytes, row_bytes, z + i, ld);
}

// y_h[0 .. V vectors) += sum_i p[h * ld + i] v_i for G heads: the sum runs over i in order.
template <typename T, DType D, int G, int V>
LOLA_INLINE void add_rows(const T* p, int64_t ld, const char* v, int64_t row_bytes, int64_t count,
                          T* y, int64_t dp, Prefetcher* prefetcher) {
  constexpr int kLines = (4 * V * kLanes<T> * size_of(D) + 63) / 64;  // of four rows
  Vec<T> acc[G][V];
#pragma GCC unroll 8
  for (int h = 0; h < G; ++h) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[h][j] = load(y + h * dp + j * kLanes<T>);
  }
  for (int64_t i = 0; i < count; ++i, v += row_bytes) {
    if (prefetcher != nullptr && i % 4 == 3) prefetcher->prefetch<kLines>();
    Vec<T> x[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) x[j] = load_as<T, D>(v, j * kLanes<T>);
#pragma GCC unroll 8
    for (int h = 0; h < G; ++h) {
      const Vec<T> w = splat(p[h * ld + i]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) acc[h][j] = fma(w, x[j], acc[h][j]);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < G; ++h) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) store<T>(y + h * dp + j * kLanes<T>, acc[h][j]);
  }
}

// y_r[0 .. V vectors) = sum_f phi[r * ld + f] H_f for R heads: a product like any other, in the
// same order, that prefetches on its way.
template <typename T, int R, int V>
LOLA_INLINE void recall_tile(const T* phi, int64_t ld, const T* H, int64_t H_ld, int64_t F2, T* y,
                             int64_t dp, Prefetcher* prefetcher) {
  constexpr int kLines = (V * LOLA_VEC_BYTES + 63) / 64;  // of two rows, half of them
  Vec<T> acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[r][j] = Vec<T>{};
  }
  for (int64_t f = 0; f < F2; ++f, H += H_ld) {
    if (f % 2 == 1) prefetcher->prefetch<kLines>();
    Vec<T> x[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) x[j] = load(H + j * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> w = splat(phi[r * ld + f]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) acc[r][j] = fma(w, x[j], acc[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) store<T>(y + r * dp + j * kLanes<T>, acc[r][j]);
  }
}

template <typename T, int R>
void recall_heads(const T* phi, int64_t ld, const T* H, int64_t H_ld, int64_t F2, T* y, int64_t dp,
                  Prefetcher* prefetcher) {
  int64_t j = 0;
  for (; j + 4 * kLanes<T> <= dp; j += 4 * kLanes<T>) {
    recall_tile<T, R, 4>(phi, ld, H + j, H_ld, F2, y + j, dp, prefetcher);
  }
  for (; j < dp; j += kLanes<T>) {
    recall_tile<T, R, 1>(phi, ld, H + j, H_ld, F2, y + j, dp, prefetcher);
  }
}

// Rows that are copied at once where a row is not whole vectors of a dtype that is loaded directly.
constexpr int64_t kCopiedRows = 16;

template <typename T, DType D, int G>
void dot_heads(const T* q, int64_t d, const char* k, int64_t row_bytes, int64_t count, T* z,
               int64_t ld, T* copies, Prefetcher* prefetcher) {
  constexpr DType own = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const int64_t dp = round_up<T>(d);
  if (d == dp) return dot_rows<T, D, G>(q, dp, k, row_bytes, count, z, ld, prefetcher);
  for (int64_t first = 0; first < count; first += kCopiedRows) {
    const int64_t left = count - first, size = left < kCopiedRows ? left : kCopiedRows;
    for (int64_t i = 0; i < size; ++i) {
      load_row(copies + i * dp, k + (first + i) * row_bytes, D, d, dp);
    }
    dot_rows<T, own, G>(q, dp, reinterpret_cast<const char*>(copies), dp * sizeof(T), size,
                        z + first, ld, nullptr);
  }
}

template <typename T, DType D, int G>
void add_heads(const T* p, int64_t ld, const char* v, int64_t row_bytes, int64_t count, T* y,
               int64_t d, T* copies, Prefetcher* prefetcher) {
  constexpr DType own = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const int64_t dp = round_up<T>(d);
  if (d == dp) {
    int64_t j = 0;
    for (; j + 4 * kLanes<T> <= dp; j += 4 * kLanes<T>) {
      add_rows<T, D, G, 4>(p, ld, v + j * size_of(D), row_bytes, count, y + j, dp, prefetcher);
    }
    for (; j < dp; j += kLanes<T>) {
      add_rows<T, D, G, 1>(p, ld, v + j * size_of(D), row_bytes, count, y + j, dp, prefetcher);
    }
    return;
  }
  for (int64_t first = 0; first < count; first += kCopiedRows) {
    const int64_t left = count - first, size = left < kCopiedRows ? left : kCopiedRows;
    for (int64_t i = 0; i < size; ++i) {
      load_row(copies + i * dp, v + (first + i) * row_bytes, D, d, dp);
    }
    for (int64_t j = 0; j < dp; j += kLanes<T>) {
      add_rows<T, own, G, 1>(p + first, ld, reinterpret_cast<const char*>(copies + j),
                             dp * sizeof(T), size, y + j, dp, nullptr);
    }
  }
}

// Logits of query heads with the keys of a segment: z[h * z_stride + i] = q_h . k_i. Of int8 rows
// k_i are the numbers, without their scale, and so are v_i below.
template <typename T, DType D>
struct SegmentLogits {
  const T* q;  // [heads, d padded]
  int64_t d;
  const Segment& segment;
  T* z;
  int64_t z_stride;
  T* copies;  // [kCopiedRows, d padded]
  Prefetcher* prefetcher;

  template <int G>
  LOLA_INLINE void run(int64_t h) const {  // the first heads prefetch for all
    dot_heads<T, D, G>(q + h * round_up<T>(d), d, segment.k, segment.row_bytes, segment.count,
                       z + h * z_stride, z_stride, copies, h == 0 ? prefetcher : nullptr);
  }
};

// Adds a segment's values to the heads' sums: y_h += sum_i weights[h * stride + i] v_i.
template <typename T, DType D>
struct SegmentValues {
  const T* weights;
  int64_t stride;
  int64_t d;
  const Segment& segment;
  T* y;       // [heads, d padded]
  T* copies;  // [kCopiedRows, d padded]
  Prefetcher* prefetcher;

  template <int G>
  LOLA_INLINE void run(int64_t h) const {
    add_heads<T, D, G>(weights + h * stride, stride, segment.v, segment.row_bytes, segment.count,
                       y + h * round_up<T>(d), d, copies, h == 0 ? prefetcher : nullptr);
  }
};

// phi^T H of query heads that share a hidden state.
template <typename T>
struct StateProduct {
  const T* phi;
  int64_t phi_stride;
  const T* H;  // [F2, dp]
  int64_t F2, dp;
  T* y;  // [heads, dp]
  Prefetcher* prefetcher;

  template <int G>
  LOLA_INLINE void run(int64_t h) const {
    recall_heads<T, G>(phi + h * phi_stride, phi_stride, H, dp, F2, y + h * dp, dp, prefetcher);
  }
};

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
