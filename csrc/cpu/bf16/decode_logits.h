// Logits of decode where the machine multiplies bfloat16: queries and keys are bfloat16 already, so
// nothing is rounded that was not before, and half the instructions do.
#pragma once

#include "cpu/attend.h"
#include "cpu/call.h"
#include "cpu/prefetch.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

constexpr int kDotRows = 8;  // keys of a tile: with three heads 24 accumulators

// The sums of eight vectors, in one fixed order.
LOLA_INLINE __m256 sum_eight(const __m512* x) {
  __m512 pairs[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    pairs[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xee));
  }
  __m512 fours[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(pairs[2 * i], pairs[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(pairs[2 * i], pairs[2 * i + 1], 0xdd));
  }
  // Block b now holds four parts of sum b, and of sum 4 + b.
  __m512 sums =
      _mm512_add_ps(_mm512_unpacklo_ps(fours[0], fours[1]), _mm512_unpackhi_ps(fours[0], fours[1]));
  sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0x4e));
  const __m512i order = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 13, 9, 5, 1, 12, 8, 4, 0);
  return _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sums));
}

LOLA_INLINE __m512bh load_pairs(const char* p) { return bits<__m512bh>(_mm512_loadu_si512(p)); }

// Scaled logits of `rows` neighbouring keys for G heads. A tile that is not full repeats its last
// key, so that a key's logit does not depend on where it lies.
template <int G>
LOLA_INLINE void pair_logits_tile(const char* q, int64_t q_bytes, const char* k, int64_t row_bytes,
                                  int64_t rows, float scale, float* z, int64_t ld) {
  __m512 acc[G][kDotRows];
#pragma GCC unroll 8
  for (int h = 0; h < G; ++h) {
#pragma GCC unroll 8
    for (int i = 0; i < kDotRows; ++i) acc[h][i] = _mm512_setzero_ps();
  }
  const bool full = rows == kDotRows;
  for (int64_t j = 0; j < row_bytes; j += 64) {
    __m512bh y[G];
#pragma GCC unroll 8
    for (int h = 0; h < G; ++h) y[h] = load_pairs(q + h * q_bytes + j);
#pragma GCC unroll 8
    for (int i = 0; i < kDotRows; ++i) {
      const int64_t row = full || i < rows ? i : rows - 1;
      const __m512bh x = load_pairs(k + row * row_bytes + j);
#pragma GCC unroll 8
      for (int h = 0; h < G; ++h) acc[h][i] = _mm512_dpbf16_ps(acc[h][i], y[h], x);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < G; ++h) {
    const __m256 sums = _mm256_mul_ps(sum_eight(acc[h]), _mm256_set1_ps(scale));
    if (full) {
      _mm256_storeu_ps(z + h * ld, sums);
    } else {
      _mm256_mask_storeu_ps(z + h * ld, static_cast<__mmask8>((1 << rows) - 1), sums);
    }
  }
}

template <int G>
void pair_logits(const char* q, int64_t q_bytes, const char* k, int64_t row_bytes, int64_t count,
                 float scale, float* z, int64_t ld, Prefetcher* prefetcher) {
  int64_t i = 0;
  for (; i + kDotRows <= count; i += kDotRows, k += kDotRows * row_bytes) {
    if (prefetcher != nullptr) {
      for (int64_t j = 0; j < row_bytes; j += 64) prefetcher->prefetch<kDotRows>();
    }
    pair_logits_tile<G>(q, q_bytes, k, row_bytes, kDotRows, scale, z + i, ld);
  }
  if (i < count) pair_logits_tile<G>(q, q_bytes, k, row_bytes, count - i, scale, z + i, ld);
}

// Whether a call's logits can be computed so: rows are whole vectors of pairs.
inline bool multiplies_pairs(const Call& call) {
  return call.q.dtype == DType::bf16 && call.layout.kv_dtype == DType::bf16 &&
         call.layout.head_dim % 32 == 0;
}

// Logits of query heads, q_bytes apart, with the keys of a segment: as SegmentLogits, for groups of
// up to three heads.
struct PairLogits {
  const char* q;
  int64_t q_bytes;
  const Segment& segment;
  float scale;
  float* z;
  int64_t z_stride;
  Prefetcher* prefetcher;

  template <int G>
  LOLA_INLINE void run(int64_t h) const {
    pair_logits<G>(q + h * q_bytes, q_bytes, segment.k, segment.row_bytes, segment.count, scale,
                   z + h * z_stride, z_stride, h == 0 ? prefetcher : nullptr);
  }
};

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
