// Small matrix products of rows padded to whole vectors.
#pragma once

#include "cpu/simd.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// Accumulators of a tile: rows x vectors, as many as the registers hold beside their operands.
#if LOLA_VEC_BYTES == 64
constexpr int kTileRows = 6, kTileVecs = 4;
#elif LOLA_VEC_BYTES == 32
constexpr int kTileRows = 6, kTileVecs = 2;
#else
constexpr int kTileRows = 4, kTileVecs = 2;
#endif

template <int V, typename T>
LOLA_INLINE void load_vectors(Vec<T>* x, const T* p) {
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) x[j] = load(p + j * kLanes<T>);
}

// Of bfloat16 the numbers of two vectors lie in turn (`kPanel` in cpu/kernels.h): each is widened
// by one operation, and none moves to another lane.
template <int V, typename T>
LOLA_INLINE void load_vectors(Vec<T>* x, const uint16_t* p) {
#pragma GCC unroll 8
  for (int j = 0; j < V; j += 2) {
    Words pairs;
    __builtin_memcpy(&pairs, p + j * kLanes<T>, sizeof pairs);
    x[j] = bits<Vec<T>>(pairs << 16);
    x[j + 1] = bits<Vec<T>>(pairs & 0xffff0000u);
  }
}

template <int V, typename T>
LOLA_INLINE void load_vectors(Vec<T>* x, const int8_t* p) {
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) x[j] = load_bytes<T>(p + j * kLanes<T>);
}

// a(i, p) lies at a[i * row + p * col]. B: T, int8_t, or uint16_t for bfloat16, of which V is
// even.
template <typename T, int R, int V, typename B>
LOLA_INLINE void gemm_tile(const T* a, int64_t row, int64_t col, const B* b, int64_t ldb, int64_t K,
                           T* c, int64_t ldc) {
  Vec<T> acc[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[i][j] = Vec<T>{};
  }
  for (int64_t p = 0; p < K; ++p, b += ldb) {
    Vec<T> x[V];
    load_vectors<V, T>(x, b);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vec<T> y = splat(a[i * row + p * col]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) acc[i][j] = fma(y, x[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) store<T>(c + i * ldc + j * kLanes<T>, acc[i][j]);
  }
}

template <typename T, int V, typename B>
LOLA_INLINE void gemm_columns(const T* a, int64_t row, int64_t col, const B* b, int64_t ldb, T* c,
                              int64_t ldc, int64_t M, int64_t K) {
  int64_t i = 0;
  for (; i + kTileRows <= M; i += kTileRows) {
    gemm_tile<T, kTileRows, V>(a + i * row, row, col, b, ldb, K, c + i * ldc, ldc);
  }
  // What is left in at most two tiles: b streams from memory where M is the heads of a group.
  if (M - i == 4) {
    gemm_tile<T, 4, V>(a + i * row, row, col, b, ldb, K, c + i * ldc, ldc);
    i += 4;
  } else if (M - i >= 3) {
    gemm_tile<T, 3, V>(a + i * row, row, col, b, ldb, K, c + i * ldc, ldc);
    i += 3;
  }
  if (M - i == 2) {
    gemm_tile<T, 2, V>(a + i * row, row, col, b, ldb, K, c + i * ldc, ldc);
  } else if (M - i == 1) {
    gemm_tile<T, 1, V>(a + i * row, row, col, b, ldb, K, c + i * ldc, ldc);
  }
}

template <typename T>
void gemm_strided(const T* a, int64_t row, int64_t col, const T* b, int64_t ldb, T* c, int64_t ldc,
                  int64_t M, int64_t N, int64_t K) {
  int64_t j = 0;
  for (; j + kTileVecs * kLanes<T> <= N; j += kTileVecs * kLanes<T>) {
    gemm_columns<T, kTileVecs>(a, row, col, b + j, ldb, c + j, ldc, M, K);
  }
  for (; j < N; j += kLanes<T>) gemm_columns<T, 1>(a, row, col, b + j, ldb, c + j, ldc, M, K);
}

// c[M, N] = a[M, K] @ b[K, N], row-major; N a multiple of the lanes. Each element is one sum in the
// order of K, whatever M and N. Columns are the outer loop, so that a panel of b stays in L1 while
// all rows of a pass over it.
template <typename T>
void gemm(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t M, int64_t N,
          int64_t K) {
  gemm_strided<T>(a, lda, 1, b, ldb, c, ldc, M, N, K);
}

// c[M, N] = a[K, M]^T @ b[K, N], likewise.
template <typename T>
void gemm_transposed(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t M,
                     int64_t N, int64_t K) {
  gemm_strided<T>(a, 1, lda, b, ldb, c, ldc, M, N, K);
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
