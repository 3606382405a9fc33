// What is known of the recall errors of cached pairs between computations of them, for updates of
// interval 1.
//
// A fold of phi_l and v_l moves the prediction p = n / z of another pair towards v_l:
//   p' = p + t (v_l - p),  t = c / (z + c),  c = phi . phi_l <= ||phi|| ||phi_l||.
// Its recall error ||v - p'|| is at least u . (v - p') for any unit vector u. With u the direction
// of v - p when that was computed last, this bound starts as the error itself, and a fold takes no
// more from it than t u . (v_l - p), and nothing where that is negative. A page keeps u of each
// pair in 8-bit numbers: a coarse direction is a direction too, so the bound holds for what is
// stored.
#pragma once

#include "bounds.h"
#include "cpu/attend.h"
#include "cpu/update_exact.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// A pair's share of its set's score: its recall error, or that over ||v||. Of a bound: a bound.
template <typename T, typename V>
LOLA_INLINE V score_of(V error, V value, bool relative) {
  return relative ? error / max(value, V{} + T(1e-6)) : error;
}

// Number 0 of the first pair of a head.
template <typename T>
LOLA_INLINE T* bounds_of(const LolaArgs& a, int64_t page, int64_t head) {
  return reinterpret_cast<T*>(a.bounds.at(page, head, 0));
}

// Stores the direction of v - p in `to` [d] and returns u . (v - p); `along` gets u . v and `scale`
// 1 / length of what was stored. `inverse` times `n` is p. `x` is scratch for whole vectors.
template <typename T>
T keep_direction(const T* v, const T* n, T inverse, int64_t d, T* x, int8_t* to, T* along,
                 T* scale) {
  const int64_t dp = round_up<T>(d);
  Vec<T> largest{};
  for (int64_t i = 0; i < dp; i += kLanes<T>) {
    const Vec<T> rest = fma(load(n + i), splat(-inverse), load(v + i));
    store<T>(x + i, rest);
    largest = max(max(rest, -rest), largest);
  }
  const T top = reduce<Max>(largest);
  const Vec<T> steps = splat(top > 0 ? T(127) / top : T(0));
  const Vec<T> magic = splat(sizeof(T) == 8 ? T(6755399441055744.0) : T(12582912));
  Vec<T> with_rest{}, with_v{}, square{};
  for (int64_t i = 0; i < dp; i += kLanes<T>) {
    const Vec<T> rest = load(x + i);
    // Rounded to integers; a NaN or an overflow leaves something in range.
    const Vec<T> u = max(min(rest * steps + magic - magic, splat(T(127))), splat(T(-127)));
    store<T>(x + i, u);
    with_rest = fma(u, rest, with_rest);
    with_v = fma(u, load(v + i), with_v);
    square = fma(u, u, square);
  }
  for (int64_t i = 0; i < d; ++i) to[i] = static_cast<int8_t>(x[i]);
  const T length = __builtin_sqrt(reduce<Sum>(square));
  *scale = length > 0 ? T(1) / length : T(0);
  *along = reduce<Sum>(with_v) * *scale;
  return reduce<Sum>(with_rest) * *scale;
}

// The products of R stored directions, one after the other, with v [dp].
template <typename T, int R>
LOLA_INLINE void along_directions(const int8_t* u, int64_t d, const T* v, Vec<T>* lanes) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) lanes[r] = Vec<T>{};
  int64_t i = 0;
  for (; i + kLanes<T> <= d; i += kLanes<T>) {
    const Vec<T> y = load(v + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) lanes[r] = fma(load_bytes<T>(u + r * d + i), y, lanes[r]);
  }
  for (; i < d; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) lanes[r][0] += static_cast<T>(u[r * d + i]) * v[i];
  }
}

// The bound of a pair after another was folded. c is at least the product of their features,
// `there` is u . v_l, and along - low is at least u . p.
template <typename T, typename V>
LOLA_INLINE V lower(V low, V sum, V c, V along, V there) {
  const V ahead = there - (along - low);
  return low - (ahead > 0 ? c / (sum + c) * T(1.0001) * ahead : V{});
}

// Takes note of a folded pair in the numbers of a head's pairs. x.scores is scratch for one number
// per pair.
template <typename T>
void drift_apart(const LolaArgs& a, int64_t page, int64_t head, const T* phi_l, const T* v_l,
                 UpdateScratch<T>& x, Ahead* ahead) {
  const int64_t lam = a.lam, d = a.d;
  const int8_t* const u = a.direction_rows(page, head);
  T* const along = x.scores;
  Vec<T> lanes[4];
  int64_t i = 0;
  for (; i + 4 <= lam; i += 4) {
    ahead->template ask<3>();
    along_directions<T, 4>(u + i * d, d, v_l, lanes);
    sum_lanes(lanes, along + i, 1);
  }
  for (; i < lam; ++i) {
    along_directions<T, 1>(u + i * d, d, v_l, lanes);
    along[i] = reduce<Sum>(lanes[0]);
  }
  const T length = norm(phi_l, round_up<T>(2 * a.F));
  T* const b = bounds_of<T>(a, page, head);
  i = 0;
  for (; i + kLanes<T> <= lam; i += kLanes<T>) {
    const Vec<T> low = lower<T, Vec<T>>(
        load(b + kLow * lam + i), load(b + kSum * lam + i), load(b + kFeatures * lam + i) * length,
        load(b + kAlong * lam + i), load(b + kScale * lam + i) * load(along + i));
    store<T>(b + kLow * lam + i, low);
  }
  for (; i < lam; ++i) {
    b[kLow * lam + i] =
        lower<T, T>(b[kLow * lam + i], b[kSum * lam + i], b[kFeatures * lam + i] * length,
                    b[kAlong * lam + i], b[kScale * lam + i] * along[i]);
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
