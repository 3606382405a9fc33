// Products with runs of rows that lie one after the other in a page: logits with keys, weighted
// sums of values. The rows come from memory once, for all the vectors they are multiplied with.
// Included by for_each_isa.h through lola_kernel.h, once per instruction set.

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

// Bytes ahead of the loads that memory is asked for: runs are shorter than the hardware's own
// prefetcher needs to get going, and it stops at every 4 KiB.
constexpr int64_t kAhead = 1024;

LOLA_INLINE void prefetch_row(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
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
// vectors. Asks for the rows of `next`, the values, on the way: they are wanted right after.
template <typename T, DType D, int G>
LOLA_INLINE void dot_rows(const T* q, int64_t dp, const char* k, int64_t row_bytes,
                          const char* next, int64_t count, T* z, int64_t ld) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    prefetch_row(k + i * row_bytes + kAhead, 4 * row_bytes);
    if (next != nullptr) prefetch_row(next + i * row_bytes, 4 * row_bytes);
    dot_tile<T, D, G, 4>(q, dp, k + i * row_bytes, row_bytes, z + i, ld);
  }
  if (next != nullptr && i < count) prefetch_row(next + i * row_bytes, (count - i) * row_bytes);
  for (; i < count; ++i) dot_tile<T, D, G, 1>(q, dp, k + i * row_bytes, row_bytes, z + i, ld);
}

// y_h[0 .. V vectors) += sum_i p[h * ld + i] v_i for G heads: the sum runs over i in order.
template <typename T, DType D, int G, int V>
LOLA_INLINE void add_rows(const T* p, int64_t ld, const char* v, int64_t row_bytes, int64_t count,
                          T* y, int64_t dp) {
  Vec<T> acc[G][V];
#pragma GCC unroll 8
  for (int h = 0; h < G; ++h) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[h][j] = load(y + h * dp + j * kLanes<T>);
  }
  for (int64_t i = 0; i < count; ++i, v += row_bytes) {
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

// Chunks of `count` rows through `scratch` where a row is not whole vectors of a direct dtype.
constexpr int64_t kRowChunk = 16;

template <typename T, DType D, int G>
void dot_heads(const T* q, int64_t d, const char* k, int64_t row_bytes, const char* next,
               int64_t count, T* z, int64_t ld, T* scratch) {
  constexpr DType own = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const int64_t dp = round_up<T>(d);
  if (d == dp) return dot_rows<T, D, G>(q, dp, k, row_bytes, next, count, z, ld);
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
               int64_t d, T* scratch) {
  constexpr DType own = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const int64_t dp = round_up<T>(d);
  if (d == dp) {
    int64_t j = 0;
    for (; j + 4 * kLanes<T> <= dp; j += 4 * kLanes<T>) {
      add_rows<T, D, G, 4>(p, ld, v + j * size_of(D), row_bytes, count, y + j, dp);
    }
    for (; j < dp; j += kLanes<T>) {
      add_rows<T, D, G, 1>(p, ld, v + j * size_of(D), row_bytes, count, y + j, dp);
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
                             dp * sizeof(T), size, y + j, dp);
    }
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
