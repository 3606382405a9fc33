// Prefill where the machine multiplies bfloat16: softmax attention of a block of queries with
// bfloat16 keys and values, by dot products of pairs of elements.
//
// Logits are keys by columns of queries, as in cpu/prefill.h. A pair of a key's elements is
// broadcast from where it lies, so keys are never copied; of values two rows are interleaved.
// Products of bfloat16 are exact in float32, where all sums run. A softmax weight is taken as the
// sum of two bfloat16 numbers, its rounded value and the rounded remainder, which keeps 16 bits of
// it: with 8 the answers of quantized models, whose activations enlarge every error, moved away
// from those of a full cache. Weights below 2^-10 of their column's sum do without the remainder:
// it would be smaller than that of the sum.
//
// Numbers of int8 are exact in bfloat16 as well. So int8 pairs are multiplied as such, and their
// scales multiply logits and weights, in float32.
#pragma once

#include "cpu/attend.h"
#include "cpu/bf16/pairs.h"
#include "cpu/call.h"
#include "cpu/query_block.h"
#include "cpu/rows.h"
#include "cpu/workspace.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

constexpr int64_t kPanelVecs = 4;   // vectors of query columns that share a pass over the keys
constexpr int64_t kDotKeys = 6;     // keys, or columns, of a tile: with 4 vectors 24 accumulators
constexpr int64_t kPairBlock = 64;  // pairs of keys whose weights and values lie in L1
constexpr float kSmallWeight = 1.0f / 1024;  // of a column's sum
// Of the weights of a block of pairs of keys, where those of all its columns' remainders begin.
constexpr int64_t kRemainders = kPairBlock * kPanelVecs * kLanes<float>;

struct PairWorkspace {
  const char **k, **v;  // [keys]: rows of the keys and values
  uint32_t* q_pairs;    // [d / 2, columns]: pairs along d
  uint32_t* v_pairs;    // [keys / 2, d]: pairs of rows
  uint32_t* p;          // [2, kPairBlock, columns of a panel]: pairs of weights, and of remainders
  float* z;             // [keys, columns of a panel]: logits
  uint16_t* numbers;    // [int8 keys, d]: their numbers as bfloat16
  const float *k_scale, *v_scale;  // [int8 keys]
  int64_t keys, columns;
  int64_t int8_keys = 0;  // so many come first

  PairWorkspace() = default;
  PairWorkspace(const PageLayout& layout, int64_t max_columns, Workspace& memory) {
    const int64_t d = layout.head_dim;
    const int64_t max_keys = layout.sparse_cache_size + layout.exact_size() + kDotKeys;
    k = memory.take<const char*>(max_keys);
    v = memory.take<const char*>(max_keys);
    q_pairs = memory.take<uint32_t>(d / 2 * max_columns);
    v_pairs = memory.take<uint32_t>((max_keys + 1) / 2 * d);
    p = memory.take<uint32_t>(2 * kRemainders);
    z = memory.take<float>(max_keys * kPanelVecs * kLanes<float>);
    numbers = memory.take<uint16_t>(layout.int8_pairs() ? layout.sparse_cache_size * d : 0);
  }
};

// What is read and written per column: as in PrefillWorkspace.
struct PairColumns {
  float *y, *limit, *sum, *largest;
};

// 2^x with a relative error below 4e-6, as little as weights of 16 bits are rounded by; 0 far
// below.
LOLA_INLINE Vec<float> exp2_short(Vec<float> x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec<float> r = x - n;
  Vec<float> y = splat(0.009570101f);
  y = fma(y, r, splat(0.055917863f));
  y = fma(y, r, splat(0.24024744f));
  y = fma(y, r, splat(0.69312179f));
  y = fma(y, r, splat(0.99999928f));
  return _mm512_scalef_ps(y, n);
}

// Logits in units of ln 2 of a tile of keys from `first` on, for V vectors of columns at `m`.
template <int V>
LOLA_INLINE void logit_tile(const PairWorkspace& x, const float* limit, int64_t m, int64_t first,
                            int64_t d, float scale, int64_t all, Vec<float>* high) {
  Vec<float> acc[kDotKeys][V];
#pragma GCC unroll 8
  for (int i = 0; i < kDotKeys; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[i][j] = Vec<float>{};
  }
  const char* const* k = x.k + first;
  const char *k0 = k[0], *k1 = k[1], *k2 = k[2], *k3 = k[3], *k4 = k[4], *k5 = k[5];
  const uint32_t* q = x.q_pairs + m;
  for (int64_t p = 0; p < d * 2; p += 4, q += x.columns) {
    Words b[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) b[j] = load_words(q + j * kLanes<float>);
    const char* const rows[kDotKeys] = {k0, k1, k2, k3, k4, k5};
#pragma GCC unroll 8
    for (int i = 0; i < kDotKeys; ++i) {
      const Words y = broadcast_pair(rows[i] + p);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) acc[i][j] = dot_pairs(y, b[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kDotKeys; ++i) {
    float* const z = x.z + (first + i) * kPanelVecs * kLanes<float>;
    const float factor = first + i < x.int8_keys ? scale * x.k_scale[first + i] : scale;
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      const Vec<float> logit = acc[i][j] * factor;
      store<float>(z + j * kLanes<float>, logit);
      const Vec<float> more = max(logit, high[j]);
      if (first + i < all) {
        high[j] = more;
      } else {
        const Vec<float> visible = load(limit + m + j * kLanes<float>);
        high[j] = splat(static_cast<float>(first + i)) < visible ? more : high[j];
      }
    }
  }
}

// Stores the pairs of `even` and `odd` rounded to bfloat16, and turns both into what is left of
// them.
LOLA_INLINE void store_rounded(uint32_t* p, Vec<float>* even, Vec<float>* odd) {
  const __m512i halves = bits<__m512i>(_mm512_cvtne2ps_pbh(*odd, *even));
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
  const __m512i wide_low = _mm512_slli_epi32(low, 16), wide_high = _mm512_slli_epi32(high, 16);
  _mm512_storeu_si512(p, _mm512_or_si512(low, wide_high));
  *even = *even - bits<Vec<float>>(wide_low);
  *odd = *odd - bits<Vec<float>>(wide_high);
}

// The weights of a pair of keys from their logits for one vector of columns, times the scales of
// their values: rounded at p, and the remainders of those above `least` at p + kRemainders. Returns
// a bit for each column that has a remainder.
LOLA_INLINE uint64_t weigh_pair(const PairWorkspace& x, const float* z, int64_t ld, Vec<float> high,
                                int64_t key, int64_t all, Vec<float> visible, Vec<float> least,
                                Vec<float>* total, uint32_t* p) {
  Vec<float> even = exp2_short(load(z) - high), odd = exp2_short(load(z + ld) - high);
  if (key + 1 >= all) {
    even = splat(static_cast<float>(key)) < visible ? even : Vec<float>{};
    odd = splat(static_cast<float>(key + 1)) < visible ? odd : Vec<float>{};
  }
  *total += even;
  *total += odd;
  const __mmask16 evens = _mm512_cmp_ps_mask(even, least, _CMP_GT_OQ);
  const __mmask16 odds = _mm512_cmp_ps_mask(odd, least, _CMP_GT_OQ);
  if (key < x.int8_keys) {
    even *= x.v_scale[key];
    if (key + 1 < x.int8_keys) odd *= x.v_scale[key + 1];
  }
  store_rounded(p, &even, &odd);
  even = _mm512_maskz_mov_ps(evens, even);
  odd = _mm512_maskz_mov_ps(odds, odd);
  store_rounded(p + kRemainders, &even, &odd);
  return static_cast<uint64_t>(evens | odds);
}

// Of a block's pairs, a bit for each that has a remainder in one of the columns in `tile`.
LOLA_INLINE uint64_t pairs_with_remainders(const uint64_t* remainders, uint64_t tile) {
  const __m512i columns = _mm512_set1_epi64(static_cast<int64_t>(tile));
  uint64_t pairs = 0;
#pragma GCC unroll 8
  for (int i = 0; i < kPairBlock; i += 8) {
    const uint64_t some = _mm512_test_epi64_mask(_mm512_loadu_si512(remainders + i), columns);
    pairs |= some << i;
  }
  return pairs;
}

// A bit for each of `width` columns from m on.
LOLA_INLINE uint64_t tile_columns(int64_t m, int width) {
  return ((uint64_t(1) << width) - 1) << m;
}

// acc += the weights of R columns for one pair of keys times V vectors of the values.
template <int R, int V>
LOLA_INLINE void add_values(const uint32_t* p, const uint32_t* v, Vec<float> (&acc)[R][V]) {
  Words b[V];
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) b[j] = load_words(v + j * kLanes<float>);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    const Words w = broadcast_pair(p + i);
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[i][j] = dot_pairs(w, b[j], acc[i][j]);
  }
}

// y[R rows of columns][V vectors] += weights of `pairs` pairs of keys times their values;
// `remainders` has a bit for each pair that has remainders.
template <int R, int V>
LOLA_INLINE void value_tile(const uint32_t* p, const uint32_t* v, int64_t d, int64_t pairs,
                            uint64_t remainders, float* y) {
  Vec<float> acc[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[i][j] = load(y + i * d + j * kLanes<float>);
  }
  constexpr int64_t ld = kPanelVecs * kLanes<float>;
  for (int64_t k = 0; k < pairs; ++k) add_values(p + k * ld, v + k * d, acc);
  for (; remainders != 0; remainders &= remainders - 1) {
    const int64_t k = __builtin_ctzll(remainders);
    add_values(p + kRemainders + k * ld, v + k * d, acc);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) store<float>(y + i * d + j * kLanes<float>, acc[i][j]);
  }
}

// `remainders` has per pair a bit for each column with a remainder. Columns without one find zeros
// there, so no column's answer depends on those beside it.
template <int V>
LOLA_INLINE void value_columns(const uint32_t* p, const uint32_t* v, int64_t d, int64_t pairs,
                               int64_t columns, const uint64_t* remainders, float* y) {
  int64_t m = 0;
  for (; m + kDotKeys <= columns; m += kDotKeys) {
    const uint64_t some = pairs_with_remainders(remainders, tile_columns(m, kDotKeys));
    value_tile<kDotKeys, V>(p + m, v, d, pairs, some, y + m * d);
  }
  // Columns are whole vectors: what is left is a multiple of two.
  if (columns - m == 4) {
    const uint64_t some = pairs_with_remainders(remainders, tile_columns(m, 4));
    value_tile<4, V>(p + m, v, d, pairs, some, y + m * d);
  } else if (columns - m == 2) {
    const uint64_t some = pairs_with_remainders(remainders, tile_columns(m, 2));
    value_tile<2, V>(p + m, v, d, pairs, some, y + m * d);
  }
}

// Attention of V vectors of columns from m on: unnormalized sums of values into y.
template <int V>
void attend_panel(const PairWorkspace& x, const PairColumns& c, int64_t m, int64_t d, float scale) {
  constexpr int64_t ld = kPanelVecs * kLanes<float>;
  Vec<float> high[V], total[V], fewest = load(c.limit + m);
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) {
    high[j] = splat(-__builtin_inff());
    total[j] = Vec<float>{};
    fewest = min(load(c.limit + m + j * kLanes<float>), fewest);
  }
  const int64_t all = static_cast<int64_t>(reduce<Min>(fewest));
  for (int64_t first = 0; first < x.keys; first += kDotKeys) {
    logit_tile<V>(x, c.limit, m, first, d, scale, all, high);
  }
  float* const y = c.y + m * d;
  for (int64_t i = 0; i < V * kLanes<float> * d; i += kLanes<float>) {
    store<float>(y + i, Vec<float>{});
  }
  const int64_t pairs = (x.keys + 1) / 2;
  uint64_t remainders[kPairBlock] = {};
  // The window comes last and weighs most: beginning there, small weights are soon known as such.
  // Blocks lie alike however a prompt was split, so that no answer depends on that.
  for (int64_t block = (pairs - 1) / kPairBlock * kPairBlock; block >= 0; block -= kPairBlock) {
    const int64_t left = pairs - block, count = left < kPairBlock ? left : kPairBlock;
    Vec<float> least[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) least[j] = total[j] * kSmallWeight;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t key = 2 * (block + i);
      uint64_t some = 0;
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) {
        const int64_t at = j * kLanes<float>;
        some |= weigh_pair(x, x.z + key * ld + at, ld, high[j], key, all, load(c.limit + m + at),
                           least[j], &total[j], x.p + i * ld + at)
                << at;
      }
      remainders[i] = some;
    }
    const uint32_t* const v = x.v_pairs + block * d;
    int64_t e = 0;
    for (; e + 4 * kLanes<float> <= d; e += 4 * kLanes<float>) {
      value_columns<4>(x.p, v + e, d, count, V * kLanes<float>, remainders, y + e);
    }
    for (; e < d; e += kLanes<float>) {
      value_columns<1>(x.p, v + e, d, count, V * kLanes<float>, remainders, y + e);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) {
    store<float>(c.sum + m + j * kLanes<float>, total[j]);
    store<float>(c.largest + m + j * kLanes<float>, high[j] * 0.69314718056f);
  }
}

// Whether rows of a call can be taken in pairs of elements as they lie.
inline bool attends_pairs(const Call& call) {
  return call.layout.kv_dtype == DType::bf16 && call.q.dtype == DType::bf16 &&
         call.layout.head_dim % kLanes<float> == 0;
}

// A vector of elements of a row from i on, bfloat16 or int8, as bfloat16 in the low halves of
// words.
LOLA_INLINE __m512i load_halves(const char* row, int64_t i, bool int8) {
  if (!int8) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * i)));
  }
  return bits<__m512i>(load_int8_words(reinterpret_cast<const int8_t*>(row) + i) >> 16);
}

// Rows of keys and values in the order sparse cache, sinks, window. Returns their number; the rows
// up to a whole tile repeat the last one, which no query sees.
inline int64_t list_keys(const QueryBlock& block, PairWorkspace& x) {
  const PageLayout& layout = *block.page.layout;
  const int64_t kv = layout.kv_head_of(block.set), cached = block.cached(), sinks = block.sinks();
  const int64_t start = block.window_start(), end = block.end();
  int64_t n = 0;
  x.int8_keys = layout.int8_pairs() ? cached : 0;
  x.k_scale = block.page.sparse_k_scale(block.set);
  x.v_scale = block.page.sparse_v_scale(block.set);
  for (; n < cached; ++n) {
    x.k[n] = block.page.sparse_k(block.set, n);
    x.v[n] = block.page.sparse_v(block.set, n);
    if (n < x.int8_keys) {
      uint16_t* const numbers = x.numbers + n * layout.head_dim;
      for (int64_t i = 0; i < layout.head_dim; i += kLanes<float>) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(numbers + i),
                            _mm512_cvtepi32_epi16(load_halves(x.k[n], i, true)));
      }
      x.k[n] = reinterpret_cast<const char*>(numbers);
    }
  }
  for (int64_t i = 0; i < sinks + (end > start ? end - start : 0); ++i, ++n) {
    const int64_t row = i < sinks ? i : layout.exact_row(start + i - sinks);
    x.k[n] = block.page.exact_k(kv, row);
    x.v[n] = block.page.exact_v(kv, row);
  }
  for (int64_t i = n; i % kDotKeys != 0; ++i) x.k[i] = x.k[n - 1];
  return n;
}

// Values of two keys from `key` on, element by element; zeros for a second one that is not there.
inline void interleave_values(const PairWorkspace& x, int64_t key, int64_t d, uint32_t* out) {
  const bool both = key + 1 < x.keys;
  for (int64_t i = 0; i < d; i += kLanes<float>) {
    const __m512i low = load_halves(x.v[key], i, key < x.int8_keys);
    __m512i top = _mm512_setzero_si512();
    if (both) top = load_halves(x.v[key + 1], i, key + 1 < x.int8_keys);
    _mm512_storeu_si512(out + i, _mm512_or_si512(low, _mm512_slli_epi32(top, 16)));
  }
}

// attend_panel() for V vectors of columns, from vector h on.
struct Panels {
  const PairWorkspace& x;
  const PairColumns& columns;
  int64_t d;
  float scale;

  template <int V>
  LOLA_INLINE void run(int64_t h) const {
    attend_panel<V>(x, columns, h * kLanes<float>, d, scale);
  }
};

// Fills y, sum and largest of a block's columns; y is not divided by the sums yet.
inline void attend_pairs(const Call& call, const QueryBlock& block, PairWorkspace& x,
                         const PairColumns& columns) {
  const int64_t d = call.layout.head_dim, heads = call.layout.heads_per_set();
  const int64_t L = block.count, M = heads * L;
  x.columns = round_up<float>(M);
  for (int64_t m = 0; m < x.columns; ++m) {
    const char* const q =
        m < M ? call.q.row(block.token + m % L, block.set * heads + m / L) : nullptr;
    for (int64_t p = 0; p < d / 2; ++p) {
      uint32_t pair = 0;
      if (q != nullptr) __builtin_memcpy(&pair, q + 4 * p, sizeof pair);
      x.q_pairs[p * x.columns + m] = pair;
    }
  }
  x.keys = list_keys(block, x);
  for (int64_t i = 0; i < x.keys; i += 2) {
    interleave_values(x, i, d, x.v_pairs + i / 2 * d);
  }
  const float scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(d));
  for_head_groups<kPanelVecs>(x.columns / kLanes<float>, Panels{x, columns, d, scale});
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
