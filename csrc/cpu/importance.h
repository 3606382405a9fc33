// What weighs the score of a pair (docs/algorithm.md, section 6): computed once, when the pair
// leaves the window, and kept in the page.
#pragma once

#include "constants.h"
#include "cpu/call.h"
#include "cpu/rows.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// exp(clamp(a . rho(k) + b . v + c, -20, 20)) of a pair k, v [d] of a KV head, where rho are the
// lengths of the key's rotary pairs. NaN where k or v is.
template <typename T>
T pair_importance(const Call& call, int64_t kv_head, const T* k, const T* v) {
  const int64_t d = call.layout.head_dim, half = d / 2;
  const T *const a = call.importance_weights<T>(kv_head), *const b = a + half;
  Vec<T> sum{};
  T rest = b[d];  // c, and what fills no vector
  int64_t i = 0;
  for (; i + kLanes<T> <= half; i += kLanes<T>) {
    const Vec<T> x = load(k + i), y = load(k + half + i);
    Vec<T> length = fma(x, x, y * y);
    for (int64_t j = 0; j < kLanes<T>; ++j) length[j] = __builtin_sqrt(length[j]);
    sum = fma(load(a + i), length, sum);
  }
  for (; i < half; ++i) rest += a[i] * __builtin_sqrt(k[i] * k[i] + k[half + i] * k[half + i]);
  for (i = 0; i + kLanes<T> <= d; i += kLanes<T>) sum = fma(load(b + i), load(v + i), sum);
  for (; i < d; ++i) rest += b[i] * v[i];
  T log = reduce<Sum>(sum) + rest;
  if (log > kMaxLogImportance<T>) log = kMaxLogImportance<T>;
  if (log < -kMaxLogImportance<T>) log = -kMaxLogImportance<T>;  // NaN stays
  return exp(splat(log))[0];
}

// scores[i] *= weights[i].
template <typename T>
void weigh(const T* weights, int64_t count, T* scores) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    store<T>(scores + i, load(scores + i) * load(weights + i));
  }
  for (; i < count; ++i) scores[i] *= weights[i];
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
