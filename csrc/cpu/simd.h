// SIMD on the compiler's vector extensions, at the native width of LOLA_ISA: 4, 8 or 16 floats.
//
// A vector wider than a register would live in memory on GCC, hence the native width and not one
// fixed width. Every reduction is in a fixed order, so results do not depend on the position of a
// row in a tile, on the batch or on threads.
#pragma once

#include "cpu/target.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

template <typename T>
struct Lanes;  // the vector of T, and the integer vectors that go with it

template <>
struct Lanes<float> {
  typedef float type __attribute__((vector_size(LOLA_VEC_BYTES)));
  typedef int32_t ints __attribute__((vector_size(LOLA_VEC_BYTES)));
};

template <>
struct Lanes<double> {
  typedef double type __attribute__((vector_size(LOLA_VEC_BYTES)));
  typedef int64_t ints __attribute__((vector_size(LOLA_VEC_BYTES)));
};

template <typename T>
using Vec = typename Lanes<T>::type;
template <typename T>
using IntVec = typename Lanes<T>::ints;  // also what comparisons give: all ones where true

template <typename T>
constexpr int64_t kLanes = LOLA_VEC_BYTES / sizeof(T);

template <typename T>
constexpr int64_t round_up(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename To, typename From>
LOLA_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

template <typename T>
LOLA_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x, also for -0
}

template <typename T>
LOLA_INLINE Vec<T> load(const T* p) {
  Vec<T> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <typename T>
LOLA_INLINE void store(T* p, Vec<T> x) {
  __builtin_memcpy(p, &x, sizeof x);
}

// a * b + c, fused where the set can. Explicit and not left to the compiler's contraction (which
// the build turns off): GCC fuses some chains and not others, and then the rows of a tile and those
// of its tail would differ in their last bit.
#if LOLA_VEC_BYTES == 64
LOLA_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
LOLA_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif LOLA_VEC_BYTES == 32
LOLA_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
LOLA_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
template <typename V>
LOLA_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#endif

template <typename V>
LOLA_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

template <typename V>
LOLA_INLINE V min(V a, V b) {
  return a < b ? a : b;
}

// Whether any lane of a comparison is true.
template <typename M>
LOLA_INLINE bool any(M m) {
#if LOLA_VEC_BYTES == 64
  const __m512i x = bits<__m512i>(m);
  return _mm512_test_epi32_mask(x, x) != 0;
#elif LOLA_VEC_BYTES == 32
  const __m256i x = bits<__m256i>(m);
  return !_mm256_testz_si256(x, x);
#else
  bool found = false;
  for (uint64_t i = 0; i < sizeof(m) / sizeof(m[0]); ++i) found = found || m[i] != 0;
  return found;
#endif
}

// Lanes with index < n are all ones, the others zero.
template <typename T>
LOLA_INLINE IntVec<T> first_lanes(int64_t n) {
  IntVec<T> lane;
  for (int64_t i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < (static_cast<decltype(lane[0] + 0)>(n) - IntVec<T>{});
}

// --- bfloat16 ---

typedef uint16_t HalfWords __attribute__((vector_size(LOLA_VEC_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(LOLA_VEC_BYTES)));

LOLA_INLINE Vec<float> load_bf16(const uint16_t* p) {
#if LOLA_VEC_BYTES == 64
  // GCC widens by halves and joins them again.
  const __m512i words =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return bits<Vec<float>>(_mm512_slli_epi32(words, 16));
#else
  HalfWords h;
  __builtin_memcpy(&h, p, sizeof h);
  return bits<Vec<float>>(__builtin_convertvector(h, Words) << 16);
#endif
}

// Rounds to nearest even; a NaN stays a NaN.
LOLA_INLINE void store_bf16(uint16_t* p, Vec<float> x) {
  const Words u = bits<Words>(x);
  const Words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Words quiet = (u >> 16) | 0x40;
  const HalfWords h = __builtin_convertvector(x == x ? rounded : quiet, HalfWords);
  __builtin_memcpy(p, &h, sizeof h);
}

LOLA_INLINE float bf16_to_float(uint16_t h) { return bits<float>(static_cast<uint32_t>(h) << 16); }

LOLA_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return static_cast<uint16_t>(x == x ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : (u >> 16) | 0x40);
}

// --- 8-bit integers ---

template <typename T>
LOLA_INLINE Vec<T> load_bytes(const int8_t* p) {
#if LOLA_VEC_BYTES > 16
  if constexpr (sizeof(T) == 4) {  // GCC widens in more steps than one
#if LOLA_VEC_BYTES == 64
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#else
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#endif
  }
#endif
  Vec<T> x;
  for (int64_t i = 0; i < kLanes<T>; ++i) x[i] = static_cast<T>(p[i]);
  return x;
}

// --- reductions over lanes, by halves ---

typedef float F4 __attribute__((vector_size(16)));
typedef float F8 __attribute__((vector_size(32)));
typedef double D2 __attribute__((vector_size(16)));
typedef double D4 __attribute__((vector_size(32)));

struct Sum {
  template <typename V>
  static LOLA_INLINE V of(V a, V b) {
    return a + b;
  }
};
struct Max {
  template <typename V>
  static LOLA_INLINE V of(V a, V b) {
    return a > b ? a : b;
  }
};
struct Min {
  template <typename V>
  static LOLA_INLINE V of(V a, V b) {
    return a < b ? a : b;
  }
};

template <typename Op>
LOLA_INLINE float reduce(Vec<float> x) {
  F4 q;
#if LOLA_VEC_BYTES == 16
  q = x;
#else
  F8 o;
#if LOLA_VEC_BYTES == 32
  o = x;
#else
  o = Op::of(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
             __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
#endif
  q = Op::of(__builtin_shufflevector(o, o, 0, 1, 2, 3), __builtin_shufflevector(o, o, 4, 5, 6, 7));
#endif
  q = Op::of(q, __builtin_shufflevector(q, q, 2, 3, 2, 3));
  return Op::of(q[0], q[1]);
}

template <typename Op>
LOLA_INLINE double reduce(Vec<double> x) {
  D2 q;
#if LOLA_VEC_BYTES == 16
  q = x;
#else
  D4 o;
#if LOLA_VEC_BYTES == 32
  o = x;
#else
  o = Op::of(__builtin_shufflevector(x, x, 0, 1, 2, 3), __builtin_shufflevector(x, x, 4, 5, 6, 7));
#endif
  q = Op::of(__builtin_shufflevector(o, o, 0, 1), __builtin_shufflevector(o, o, 2, 3));
#endif
  return Op::of(q[0], q[1]);
}

// The sums of four vectors, by the same halves as reduce<Sum>.
LOLA_INLINE void sum_lanes(const Vec<float>* x, float* out, int64_t stride) {
  F4 q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#if LOLA_VEC_BYTES == 16
    q[i] = x[i];
#else
    F8 o;
#if LOLA_VEC_BYTES == 32
    o = x[i];
#else
    o = __builtin_shufflevector(x[i], x[i], 0, 1, 2, 3, 4, 5, 6, 7) +
        __builtin_shufflevector(x[i], x[i], 8, 9, 10, 11, 12, 13, 14, 15);
#endif
    q[i] = __builtin_shufflevector(o, o, 0, 1, 2, 3) + __builtin_shufflevector(o, o, 4, 5, 6, 7);
#endif
  }
  const F4 ab = __builtin_shufflevector(q[0], q[1], 0, 1, 4, 5) +
                __builtin_shufflevector(q[0], q[1], 2, 3, 6, 7);
  const F4 cd = __builtin_shufflevector(q[2], q[3], 0, 1, 4, 5) +
                __builtin_shufflevector(q[2], q[3], 2, 3, 6, 7);
  const F4 sums =
      __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) out[i * stride] = sums[i];
}

LOLA_INLINE void sum_lanes(const Vec<double>* x, double* out, int64_t stride) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) out[i * stride] = reduce<Sum>(x[i]);
}

// --- exp ---

// Relative error below 1.5e-7. exp(-inf) and anything under -87.3 is 0, anything over 88.3 is inf,
// NaN is NaN. x = n ln 2 + r with |r| <= ln(2) / 2; adding 1.5 * 2^23 rounds to an integer and
// leaves n in the low bits of the sum.
LOLA_INLINE Vec<float> exp(Vec<float> x) {
  const float magic = 12582912.0f;
  const Vec<float> shifted = fma(x, splat(1.44269504f), splat(magic));
  const Vec<float> n = shifted - magic;
  const Vec<float> r = fma(n, splat(-1.42860682e-6f), fma(n, splat(-0.693145752f), x));
  Vec<float> y = splat(1.0f / 5040);
  y = fma(y, r, splat(1.0f / 720));
  y = fma(y, r, splat(1.0f / 120));
  y = fma(y, r, splat(1.0f / 24));
  y = fma(y, r, splat(1.0f / 6));
  y = fma(y, r, splat(0.5f));
  y = fma(y, r, splat(1.0f));
  y = fma(y, r, splat(1.0f));
  y *= bits<Vec<float>>((bits<Words>(shifted) << 23) + (127u << 23));
  y = x < -87.3f ? Vec<float>{} : y;
  return x > 88.3f ? splat(__builtin_inff()) : y;
}

// Relative error below 5e-16; 0 under -708.3, inf over 709.0.
LOLA_INLINE Vec<double> exp(Vec<double> x) {
  typedef uint64_t Longs __attribute__((vector_size(LOLA_VEC_BYTES)));
  const double magic = 6755399441055744.0;
  const Vec<double> shifted = fma(x, splat(1.4426950408889634), splat(magic));
  const Vec<double> n = shifted - magic;
  const Vec<double> r =
      fma(n, splat(-1.9082149292705877e-10), fma(n, splat(-0.6931471803691238), x));
  double factorial = 6227020800.0;  // 13!, and down to 0!
  Vec<double> y = splat(1.0 / factorial);
#pragma GCC unroll 16
  for (int i = 13; i > 0; --i) {
    factorial /= i;
    y = fma(y, r, splat(1.0 / factorial));
  }
  y *= bits<Vec<double>>((bits<Longs>(shifted) << 52) + (uint64_t{1023} << 52));
  y = x < -708.3 ? Vec<double>{} : y;
  return x > 709.0 ? splat(__builtin_inf()) : y;
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
