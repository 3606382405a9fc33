// Rows of int8 numbers with a scale each, as sparse pairs are kept where the layout has
// int8_pairs() (docs/algorithm.md, section 6). All of it in float32, operation by operation as in
// lola_vllm/core/ops/int8.py, so that every back end stores the same numbers and the same scale.
#pragma once

#include "constants.h"
#include "cpu/call.h"
#include "cpu/rows.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

constexpr float kScaleStep = static_cast<float>(1.0 / kPairMax);

// The scale of a row; NaN where an entry is not finite.
template <typename T>
float int8_scale(const T* x, int64_t n) {
  float largest = 0, odd = 0;  // `odd` adds x - x, which is 0 or NaN
  int64_t i = 0;
  if constexpr (sizeof(T) == 4) {
    Vec<float> high{}, sum{};
    for (; i + kLanes<float> <= n; i += kLanes<float>) {
      const Vec<float> y = load(x + i);
      high = max(y < 0.0f ? -y : y, high);
      sum += y - y;
    }
    largest = reduce<Max>(high);
    odd = reduce<Sum>(sum);
  }
  for (; i < n; ++i) {
    const float y = static_cast<float>(x[i]), size = __builtin_fabsf(y);
    largest = size > largest ? size : largest;
    odd += y - y;
  }
  return largest * kScaleStep + odd;
}

// The number that x is rounded to at a scale above 0: to nearest, ties to even.
template <typename T>
LOLA_INLINE float int8_number(T x, float scale) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: a sum with it is a whole number
  const float y = (static_cast<float>(x) / scale + magic) - magic;
  const float low = y < -kPairMax ? -kPairMax : y;
  return low > kPairMax ? kPairMax : low;
}

// x[0 .. n) becomes what it stands for once it is rounded.
template <typename T>
void round_row(T* x, int64_t n) {
  const float scale = int8_scale(x, n);
  const T wide = static_cast<T>(scale);
  if (!(scale > 0)) {  // zeros, or not all finite
    for (int64_t i = 0; i < n; ++i) x[i] = wide;
    return;
  }
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<T>(int8_number(x[i], scale)) * wide;
}

// Stores x[0 .. n), which is not rounded yet.
template <typename T>
void store_int8_row(const T* x, int64_t n, char* to, float* scale) {
  int8_t* const numbers = reinterpret_cast<int8_t*>(to);
  *scale = int8_scale(x, n);
  const float s = *scale;
  if (!(s > 0)) {
    for (int64_t i = 0; i < n; ++i) numbers[i] = 0;
    return;
  }
  for (int64_t i = 0; i < n; ++i) numbers[i] = static_cast<int8_t>(int8_number(x[i], s));
}

// A key or value of the sparse cache as T, then zeros up to `padded`. `scales` are those of its
// set, which are read where the layout has them.
template <typename T>
LOLA_INLINE void load_sparse_row(const PageLayout& layout, const char* row, const float* scales,
                                 int64_t entry, T* to, int64_t padded) {
  const int64_t d = layout.head_dim;
  load_row(to, row, layout.sparse_dtype, d, padded);
  if (!layout.int8_pairs()) return;
  const T scale = static_cast<T>(scales[entry]);
  for (int64_t i = 0; i < d; ++i) to[i] *= scale;
}

template <typename T>
LOLA_INLINE void load_sparse_k(const Page& page, int64_t set, int64_t entry, T* to,
                               int64_t padded) {
  load_sparse_row(*page.layout, page.sparse_k(set, entry), page.sparse_k_scale(set), entry, to,
                  padded);
}

template <typename T>
LOLA_INLINE void load_sparse_v(const Page& page, int64_t set, int64_t entry, T* to,
                               int64_t padded) {
  load_sparse_row(*page.layout, page.sparse_v(set, entry), page.sparse_v_scale(set), entry, to,
                  padded);
}

// x[i] *= scales[i].
template <typename T>
void multiply(const float* scales, int64_t count, T* x) {
  for (int64_t i = 0; i < count; ++i) x[i] *= static_cast<T>(scales[i]);
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
