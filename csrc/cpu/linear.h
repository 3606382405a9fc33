// y = x W^T + b, with W in bfloat16 or int8, and sums in float32.
//
// W lies in panels [N / kPanel, K, kPanel], so that it is read in one stream: a product of few rows
// takes the time of that. An element is one sum in the order of K, whatever the rows beside it.
#pragma once

#include "cpu/gemm.h"
#include "cpu/kernels.h"
#if LOLA_BF16_DOTS
#include "cpu/bf16/linear_pairs.h"
#endif

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

constexpr int kLinearVecs = static_cast<int>(kPanel / kLanes<float>);
constexpr int kPassVecs = kLinearVecs < kTileVecs ? kLinearVecs : kTileVecs;

// Rows [0, rows) of x with one panel.
template <typename W>
void multiply_panel(const Linear& call, int64_t panel, const float* x, int64_t rows, float* y) {
  const W* w = static_cast<const W*>(call.panels) + panel * call.K * kPanel;
  const int64_t lanes = kLanes<float>;
  if (rows == 1) {  // more accumulators, so that none waits for the one before
    gemm_tile<float, 1, kLinearVecs>(x, call.K, 1, w, kPanel, call.K, y, call.N);
  } else {
    for (int64_t j = 0; j < kPanel; j += kPassVecs * lanes) {
      gemm_columns<float, kPassVecs>(x, call.K, 1, w + j, kPanel, y + j, call.N, rows, call.K);
    }
  }
  if (call.scale == nullptr && call.bias == nullptr) return;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < kPanel; j += lanes) {
      float* at = y + i * call.N + j;
      Vec<float> sum = load(at);
      if (call.scale != nullptr) sum *= load(call.scale + panel * kPanel + j);
      if (call.bias != nullptr) sum += load(call.bias + panel * kPanel + j);
      store<float>(at, sum);
    }
  }
}

// Items are blocks of rows by panels; the panels of a block come one after the other, as its rows
// stay in the cache.
void multiply(const Linear& call, int64_t begin, int64_t end) {
  const int64_t panels = call.N / kPanel;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / panels * kRowBlock, panel = item % panels;
    const int64_t left = call.rows - row, rows = left < kRowBlock ? left : kRowBlock;
#if LOLA_BF16_DOTS
    if (call.dtype == DType::bf16) {
      multiply_pairs(call, panel, row, rows);
      continue;
    }
#endif
    const float* const x = static_cast<const float*>(call.x) + row * call.K;
    float* const y = static_cast<float*>(call.y) + row * call.N + panel * kPanel;
    if (call.scale != nullptr) {
      multiply_panel<int8_t>(call, panel, x, rows, y);
    } else {
      multiply_panel<uint16_t>(call, panel, x, rows, y);
    }
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
