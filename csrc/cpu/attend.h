// Products with runs of rows that lie one after the other in a page: logits with keys, weighted
// sums of values. The rows come from memory once, for all the vectors they are multiplied with.
#pragma once

#include "cpu/simd.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

constexpr int kHeads = 4;  // query heads whose accumulators fit the registers

// Element i of a row as T: whole vectors of it.
template <typename T, DType D>
LOLA_INLINE Vec<T> load_as(const char* row, int64_t i) {
  if constexpr (D == DType::bf16) {
    return load_bf16(reinterpret_cast<const uint16_t*>(row) + i);
  } else {
    return load(reinterpret_cast<const T*>(row) + i);
  }
}

// What will be read after what is being read now, in that order, across the borders of runs and
// pages: the rest of an item and the next one. Memory is to work while the arithmetic does, without
// a pause, so every loop asks for about as much as comes in the time that it takes: those over keys
// and values for what they read, that over H, whose rows are wider, for half of it, and for the
// rest those that read nothing of a page, or what has been read before, as an update does.
struct Ahead {
  static constexpr uint32_t kRanges = 32;
  // Bytes to be ahead of the loads at the beginning of an item: a small part of the L2 cache, for
  // which they are asked. To L1 a core has only a few dozen lines on their way at a time, and waits
  // for more than half of what the bus could bring.
  static constexpr int64_t kLead = 32768;
  static constexpr int kL2 = 2;  // as __builtin_prefetch names it
  const char *at, *end;          // the rest of the current range
  const char *from[kRanges], *to[kRanges];
  uint32_t first, last;  // ranges to come, modulo their number

  void clear() {
    at = end = nullptr;
    first = last = 0;
  }

  // Asks for what is missing to the lead, where `bytes` have been announced that are not read yet.
  void keep_lead(int64_t bytes) {
    int64_t waiting = end - at;
    for (uint32_t i = first; i != last; ++i) waiting += to[i % kRanges] - from[i % kRanges];
    const int64_t missing = kLead - (bytes - waiting);
    if (missing > 0) ask_slowly(missing / 64);
  }

  // Appends a range. Returns its bytes.
  int64_t push(const char* p, int64_t bytes) {
    if (bytes <= 0) return 0;
    if (last - first == kRanges) ++first;
    from[last % kRanges] = p;
    to[last++ % kRanges] = p + bytes;
    return bytes;
  }

  __attribute__((noinline)) void ask_slowly(int64_t lines) {
    for (; lines > 0; --lines, at += 64) {
      if (at >= end) {
        if (first == last) return;
        at = from[first % kRanges];
        end = to[first++ % kRanges];
      }
      __builtin_prefetch(at, 0, kL2);
    }
  }

  template <int N>
  LOLA_INLINE void ask() {
    if (end - at < N * 64) {
      if (at < end || first != last) ask_slowly(N);  // a run of new tokens announces nothing
      return;
    }
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) __builtin_prefetch(at + i * 64, 0, kL2);
    at += N * 64;
  }
};

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
LOLA_INLINE void dot_rows(const T* q, int64_t dp, const char* k, int64_t row_bytes, Ahead* ahead,
                          int64_t count, T* z, int64_t ld) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    if (ahead != nullptr) {
      for (int64_t j = 0; j < row_bytes; j += 64) ahead->template ask<4>();
    }
    dot_tile<T, D, G, 4>(q, dp, k + i * row_bytes, row_bytes, z + i, ld);
  }
  for (; i < count; ++i) dot_tile<T, D, G, 1>(q, dp, k + i * row_bytes, row_bytes, z + i, ld);
}

// y_h[0 .. V vectors) += sum_i p[h * ld + i] v_i for G heads: the sum runs over i in order.
template <typename T, DType D, int G, int V>
LOLA_INLINE void add_rows(const T* p, int64_t ld, const char* v, int64_t row_bytes, int64_t count,
                          T* y, int64_t dp, Ahead* ahead) {
  constexpr int kLines = (4 * V * kLanes<T> * size_of(D) + 63) / 64;  // of four rows
  Vec<T> acc[G][V];
#pragma GCC unroll 8
  for (int h = 0; h < G; ++h) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[h][j] = load(y + h * dp + j * kLanes<T>);
  }
  for (int64_t i = 0; i < count; ++i, v += row_bytes) {
    if (ahead != nullptr && i % 4 == 3) ahead->template ask<kLines>();
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
// same order, that asks for memory on its way.
template <typename T, int R, int V>
LOLA_INLINE void recall_tile(const T* phi, int64_t ld, const T* H, int64_t H_ld, int64_t F2, T* y,
                             int64_t dp, Ahead* ahead) {
  constexpr int kLines = (V * LOLA_VEC_BYTES + 63) / 64;  // of two rows, half of them
  Vec<T> acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[r][j] = Vec<T>{};
  }
  for (int64_t f = 0; f < F2; ++f, H += H_ld) {
    if (f % 2 == 1) ahead->template ask<kLines>();
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
                  Ahead* ahead) {
  int64_t j = 0;
  for (; j + 4 * kLanes<T> <= dp; j += 4 * kLanes<T>) {
    recall_tile<T, R, 4>(phi, ld, H + j, H_ld, F2, y + j, dp, ahead);
  }
  for (; j < dp; j += kLanes<T>) {
    recall_tile<T, R, 1>(phi, ld, H + j, H_ld, F2, y + j, dp, ahead);
  }
}

// Chunks of `count` rows through `scratch` where a row is not whole vectors of a direct dtype.
constexpr int64_t kRowChunk = 16;

template <typename T, DType D, int G>
void dot_heads(const T* q, int64_t d, const char* k, int64_t row_bytes, Ahead* ahead, int64_t count,
               T* z, int64_t ld, T* scratch) {
  constexpr DType own = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const int64_t dp = round_up<T>(d);
  if (d == dp) return dot_rows<T, D, G>(q, dp, k, row_bytes, ahead, count, z, ld);
  for (int64_t first = 0; first < count; first += kRowChunk) {
    const int64_t left = count - first, size = left < kRowChunk ? left : kRowChunk;
    for (int64_t i = 0; i < size; ++i) {
      load_row(scratch + i * dp, k + (first + i) * row_bytes, D, d, dp);
    }
    dot_rows<T, own, G>(q, dp, reinterpret_cast<const char*>(scratch), dp * sizeof(T), nullptr,
                        size, z + first, ld);
  }
}

template <typename T, DType D, int G>
void add_heads(const T* p, int64_t ld, const char* v, int64_t row_bytes, int64_t count, T* y,
               int64_t d, T* scratch, Ahead* ahead) {
  constexpr DType own = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const int64_t dp = round_up<T>(d);
  if (d == dp) {
    int64_t j = 0;
    for (; j + 4 * kLanes<T> <= dp; j += 4 * kLanes<T>) {
      add_rows<T, D, G, 4>(p, ld, v + j * size_of(D), row_bytes, count, y + j, dp, ahead);
    }
    for (; j < dp; j += kLanes<T>) {
      add_rows<T, D, G, 1>(p, ld, v + j * size_of(D), row_bytes, count, y + j, dp, ahead);
    }
    return;
  }
  for (int64_t first = 0; first < count; first += kRowChunk) {
    const int64_t left = count - first, size = left < kRowChunk ? left : kRowChunk;
    for (int64_t i = 0; i < size; ++i) {
      load_row(scratch + i * dp, v + (first + i) * row_bytes, D, d, dp);
    }
    for (int64_t j = 0; j < dp; j += kLanes<T>) {
      add_rows<T, own, G, 1>(p + first, ld, reinterpret_cast<const char*>(scratch + j),
                             dp * sizeof(T), size, y + j, dp, nullptr);
    }
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
