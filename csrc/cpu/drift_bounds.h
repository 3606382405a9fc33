// Bounds on the recall errors of cached pairs between two computations of them (Lemma 1 of
// docs/bounds.md): updates of interval 1. A page keeps them.
//
// With u the direction of v - p when that was computed last, the error is at least
// low = u . (v - p), which starts as the error itself. A fold of phi_l and v_l lowers it to
//   low - t max(0, u . v_l - (u . v - low)),  t = c / (z + c),  c = ||phi|| ||phi_l||.
// The page holds u as 8-bit numbers: a coarse direction is a direction too, so the bound holds for
// what is stored.
#pragma once

#include "bounds.h"
#include "cpu/call.h"
#include "cpu/prefetch.h"
#include "cpu/rows.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// What a pair of one state head adds to its score: its recall error, or that over ||v||. Of a
// bound: a bound.
template <typename T, typename V>
LOLA_INLINE V score_of(V error, V value, bool relative) {
  return relative ? error / max(value, V{} + kRecallEps<T>) : error;
}

// Stores the direction of v - p in `to` [d] and returns u . (v - p); `along` gets u . v and `scale`
// 1 / length of what was stored. `inverse` times `n` is p. `x` is room for a padded row.
template <typename T>
T store_direction(const T* v, const T* n, T inverse, int64_t d, T* x, int8_t* to, T* along,
                  T* scale) {
  const int64_t dp = round_up<T>(d);
  Vec<T> largest{};
  for (int64_t i = 0; i < dp; i += kLanes<T>) {
    const Vec<T> error = fma(load(n + i), splat(-inverse), load(v + i));
    store<T>(x + i, error);
    largest = max(max(error, -error), largest);
  }
  const T top = reduce<Max>(largest);
  const Vec<T> steps = splat(top > 0 ? T(kDirectionMax) / top : T(0));
  const Vec<T> magic = splat(sizeof(T) == 8 ? T(6755399441055744.0) : T(12582912));
  Vec<T> with_error{}, with_v{}, square{};
  for (int64_t i = 0; i < dp; i += kLanes<T>) {
    const Vec<T> error = load(x + i);
    // Rounded to integers; a NaN or an overflow leaves something in range.
    const Vec<T> u =
        max(min(error * steps + magic - magic, splat(T(kDirectionMax))), splat(T(-kDirectionMax)));
    store<T>(x + i, u);
    with_error = fma(u, error, with_error);
    with_v = fma(u, load(v + i), with_v);
    square = fma(u, u, square);
  }
  for (int64_t i = 0; i < d; ++i) to[i] = static_cast<int8_t>(x[i]);
  const T length = __builtin_sqrt(reduce<Sum>(square));
  *scale = length > 0 ? T(1) / length : T(0);
  *along = reduce<Sum>(with_v) * *scale;
  return reduce<Sum>(with_error) * *scale;
}

// The products of R neighbouring directions with v [d padded], lane by lane.
template <typename T, int R>
LOLA_INLINE void dot_directions(const int8_t* u, int64_t d, const T* v, Vec<T>* products) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) products[r] = Vec<T>{};
  int64_t i = 0;
  for (; i + kLanes<T> <= d; i += kLanes<T>) {
    const Vec<T> y = load(v + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) products[r] = fma(load_bytes<T>(u + r * d + i), y, products[r]);
  }
  for (; i < d; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) products[r][0] += static_cast<T>(u[r * d + i]) * v[i];
  }
}

// The bound of a pair after another was folded, as Lemma 1 has it: `sum` is z, `along` u . v and
// `along_fold` u . v_l.
template <typename T, typename V>
LOLA_INLINE V lower(V low, V sum, V c, V along, V along_fold) {
  const V nearer = along_fold - (along - low);
  return low - (nearer > 0 ? c / (sum + c) * kBoundFactor<T> * nearer : V{});
}

// Lowers the bounds of the `count` pairs of one state head for the fold of features phi_l
// [2F padded] and a value v_l [d padded]. `products` is room for a number per pair.
template <typename T>
void lower_bounds(const ErrorBounds<T>& b, int64_t count, int64_t d, const T* phi_l,
                  int64_t phi_padded, const T* v_l, T* products, Prefetcher* prefetcher) {
  Vec<T> lanes[4];
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    prefetcher->prefetch<3>();
    dot_directions<T, 4>(b.directions + i * d, d, v_l, lanes);
    sum_lanes(lanes, products + i, 1);
  }
  for (; i < count; ++i) {
    dot_directions<T, 1>(b.directions + i * d, d, v_l, lanes);
    products[i] = reduce<Sum>(lanes[0]);
  }
  const T length = norm(phi_l, phi_padded);
  T *const low = b.row(kLow), *const sum = b.row(kSum), *const features = b.row(kFeatures);
  T *const along = b.row(kAlong), *const scale = b.row(kScale);
  i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    store<T>(low + i, lower<T, Vec<T>>(load(low + i), load(sum + i), load(features + i) * length,
                                       load(along + i), load(scale + i) * load(products + i)));
  }
  for (; i < count; ++i) {
    low[i] = lower<T, T>(low[i], sum[i], features[i] * length, along[i], scale[i] * products[i]);
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
