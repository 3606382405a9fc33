// Products of bfloat16 with int8 weights, by dot products of pairs of elements: whole numbers of
// int8 are exact in bfloat16. Scales multiply the sums.
//
// For few rows weights are widened where they are multiplied. For more they are widened once for
// all rows of a block, in pieces that stay in L1. An element is the same sum either way.
#pragma once

#include "cpu/bf16/pairs.h"
#include "cpu/kernels.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

constexpr int kPairVecs = static_cast<int>(kPanel / kLanes<float>);
constexpr int kPairRows = 12;        // of a tile: with kPairVecs vectors 24 accumulators
constexpr int64_t kWidePairs = 128;  // pairs of a panel's rows that are widened at a time

// The columns of rows 2p and 2p + 1 of a panel, in pairs.
LOLA_INLINE void load_pair_vectors(Words* b, const int8_t* w) {
#pragma GCC unroll 8
  for (int j = 0; j < kPairVecs; ++j) {
    const int8_t* const at = w + j * kLanes<float>;
    b[j] = (load_int8_words(at) >> 16) | load_int8_words(at + kPanel);
  }
}

LOLA_INLINE void load_pair_vectors(Words* b, const uint32_t* w) {
#pragma GCC unroll 8
  for (int j = 0; j < kPairVecs; ++j) b[j] = load_words(w + j * kLanes<float>);
}

// sums[R rows][kPanel] += pairs of x, whose rows are `ld` bytes apart, times pairs of w.
template <int R, typename W>
LOLA_INLINE void pair_tile(const char* x, int64_t ld, const W* w, int64_t pairs, float* sums) {
  constexpr int64_t step = sizeof(W) == 1 ? 2 * kPanel : kPanel;
  Vec<float> acc[R][kPairVecs];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kPairVecs; ++j) acc[i][j] = load(sums + i * kPanel + j * kLanes<float>);
  }
  for (int64_t p = 0; p < pairs; ++p, w += step, x += 4) {
    Words b[kPairVecs];
    load_pair_vectors(b, w);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Words a = broadcast_pair(x + i * ld);
#pragma GCC unroll 8
      for (int j = 0; j < kPairVecs; ++j) acc[i][j] = dot_pairs(a, b[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kPairVecs; ++j) {
      store<float>(sums + i * kPanel + j * kLanes<float>, acc[i][j]);
    }
  }
}

// pair_tile() for `rows`, at most R.
template <int R, typename W>
void last_rows(const char* x, int64_t ld, int64_t rows, const W* w, int64_t pairs, float* sums) {
  if constexpr (R > 0) {
    if (rows < R) return last_rows<R - 1>(x, ld, rows, w, pairs, sums);
    pair_tile<R>(x, ld, w, pairs, sums);
  }
}

// Rows [row, row + rows) of x, at most kRowBlock, with one panel.
inline void multiply_pairs(const Linear& call, int64_t panel, int64_t row, int64_t rows) {
  const int64_t ld = 2 * call.K, pairs = call.K / 2;
  const char* const x = static_cast<const char*>(call.x) + row * ld;
  const int8_t* const w = static_cast<const int8_t*>(call.panels) + panel * call.K * kPanel;
  alignas(64) float sums[kRowBlock * kPanel];
  for (int64_t i = 0; i < rows * kPanel; i += kLanes<float>) store<float>(sums + i, Vec<float>{});
  if (rows <= kPairRows) {
    last_rows<kPairRows>(x, ld, rows, w, pairs, sums);
  } else {
    alignas(64) uint32_t wide[kWidePairs * kPanel];
    for (int64_t p = 0; p < pairs; p += kWidePairs) {
      const int64_t left = pairs - p, count = left < kWidePairs ? left : kWidePairs;
      for (int64_t i = 0; i < count; ++i) {
        Words b[kPairVecs];
        load_pair_vectors(b, w + 2 * (p + i) * kPanel);
        __builtin_memcpy(wide + i * kPanel, b, sizeof b);
      }
      for (int64_t i = 0; i < rows; i += kPairRows) {
        const int64_t tile = rows - i < kPairRows ? rows - i : kPairRows;
        last_rows<kPairRows>(x + i * ld + 4 * p, ld, tile, wide, count, sums + i * kPanel);
      }
    }
  }
  uint16_t* const y = static_cast<uint16_t*>(call.y) + row * call.N + panel * kPanel;
  for (int64_t j = 0; j < kPanel; j += kLanes<float>) {
    const int64_t column = panel * kPanel + j;
    const Vec<float> scale = load(call.scale + column);
    const Vec<float> bias = call.bias == nullptr ? Vec<float>{} : load(call.bias + column);
    for (int64_t i = 0; i < rows; ++i) {
      store_bf16(y + i * call.N + j, load(sums + i * kPanel + j) * scale + bias);
    }
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
