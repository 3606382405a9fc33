// Bounds on scores, so that an update computes anew only those that can decide it.
//
// Folding pairs changes the prediction p = n / z of a pair to p' = (n + phi^T dH) / (z + S), where
// dH and ds are what they add to H and s, and S = phi . ds. With m the mean of the folded values,
// D = dH - ds m^T and any number a
//   p' = (z p + S m + a s^T D) / (z + S) + (phi - a s)^T D / (z + S).
// The first part is cheap to compute, and the second is at most ||phi - a s|| ||D|| / (z + S) long,
// which is small: values are folded around their mean, and features lean towards their sum s (a is
// chosen so that ||phi - a s|| is least). So p is carried along with a bound on its error, and ||v
// - p|| is the score up to that error. A score that is certainly above the largest one to lose
// stays unknown. The choice is the one that all scores would give, so it does not matter when
// bounds were set.
#pragma once

#include "cpu/candidates.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// Of a sparse set's candidates, the first `known`: predictions p [dp], at most `error` from the
// right ones; ||phi||^2; z = phi . s; and bounds on their scores.
template <typename T>
struct Bounds {
  T *p, *error, *square, *z, *low, *high;
  int64_t known;
};

// Whether scores of this call can be bounded by what follows: one state head per set.
inline bool bounds_hold(const LolaArgs& a) { return !a.incremental && a.Hs == a.Hg; }

template <typename T>
int64_t carve_bounds(const LolaArgs& a, char* base, Bounds<T>* x) {
  const int64_t count = bounds_hold(a) ? a.lam + a.interval : 0;
  int64_t used = 0;
  x->p = take_as<T>(base, count * round_up<T>(a.d), &used);
  x->error = take_as<T>(base, count, &used);
  x->square = take_as<T>(base, count, &used);
  x->z = take_as<T>(base, count, &used);
  x->low = take_as<T>(base, count, &used);
  x->high = take_as<T>(base, count, &used);
  x->known = 0;
  return used;
}

// Notes the score just computed of candidate i, n = phi^T H and z. The slack is far beyond rounding
// errors.
template <typename T>
LOLA_INLINE void set_bounds(Bounds<T>& b, int64_t i, T score, const T* phi, int64_t padded,
                            const T* n, int64_t dp, T z) {
  const Vec<T> inverse = splat(T(1) / z);
  Vec<T> length{}, square{};
  for (int64_t j = 0; j < dp; j += kLanes<T>) {
    const Vec<T> p = load(n + j) * inverse;
    length = fma(p, p, length);
    store<T>(b.p + i * dp + j, p);
  }
  for (int64_t f = 0; f < padded; f += kLanes<T>)
    square = fma(load(phi + f), load(phi + f), square);
  const T slack = (score + __builtin_sqrt(reduce<Sum>(length))) * T(2e-5);
  b.error[i] = slack;
  b.square[i] = reduce<Sum>(square);
  b.z[i] = z;
  b.low[i] = score - slack;
  b.high[i] = score + slack;
}

template <typename T>
LOLA_INLINE void move_bounds(Bounds<T>& b, int64_t from, int64_t to, int64_t dp) {
  for (int64_t j = 0; j < dp; j += kLanes<T>) {
    store<T>(b.p + to * dp + j, load(b.p + from * dp + j));
  }
  b.error[to] = b.error[from];
  b.square[to] = b.square[from];
  b.z[to] = b.z[from];
  b.low[to] = b.low[from];
  b.high[to] = b.high[from];
}

// What was folded: dH becomes D. `lean` is s^T D.
template <typename T>
struct Folded {
  T *dH, *ds, *s, *m, *lean;
};

// Carries all bounds over a fold; s is the sum before it. Row i of the features is at features + i
// phi_ld.
template <typename T>
void carry_bounds(const LolaArgs& a, const Candidates& c, const T* features, int64_t phi_ld,
                  const Folded<T>& x, T* v, Bounds<T>& b) {
  const int64_t F2 = 2 * a.F, padded = round_up<T>(F2), dp = round_up<T>(a.d);
  Vec<T> squares{};
  for (int64_t j = 0; j < dp; j += kLanes<T>) {
    Vec<T> lean{};
    for (int64_t f = 0; f < F2; ++f) {
      const Vec<T> rest = fma(splat(-x.ds[f]), load(x.m + j), load(x.dH + f * dp + j));
      squares = fma(rest, rest, squares);
      lean = fma(splat(x.s[f]), rest, lean);
    }
    store<T>(x.lean + j, lean);
  }
  const T spread = __builtin_sqrt(reduce<Sum>(squares)), s_length = norm(x.s, padded);
  const T per_z = T(1) / (s_length * s_length);
  for (int64_t first = 0; first < b.known; first += 4) {
    const int64_t left = b.known - first, rows = left < 4 ? left : 4;
    Vec<T> lanes[4], far[4];
    T S[4], keep[4], z[4], away[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const T* const phi = features + (first + (r < rows ? r : 0)) * phi_ld;
      lanes[r] = Vec<T>{};
      for (int64_t f = 0; f < padded; f += kLanes<T>) {
        lanes[r] = fma(load(phi + f), load(x.ds + f), lanes[r]);
      }
    }
    sum_lanes(lanes, S, 1);
    for (int64_t r = 0; r < 4; ++r) {
      const int64_t i = first + (r < rows ? r : 0);
      z[r] = b.z[i] + S[r];
      keep[r] = T(1) / z[r];
      const Vec<T> old = splat(b.z[i] * keep[r]), mean = splat(S[r] * keep[r]);
      const Vec<T> along = splat(b.z[i] * per_z * keep[r]);
      far[r] = lanes[r] = Vec<T>{};
      load_row(v, c.v(i), a.exact_v.dtype, a.d, dp);
      for (int64_t j = 0; j < dp; j += kLanes<T>) {
        const Vec<T> p =
            fma(old, load(b.p + i * dp + j), fma(mean, load(x.m + j), along * load(x.lean + j)));
        if (r < rows) store<T>(b.p + i * dp + j, p);
        const Vec<T> diff = load(v + j) - p;
        far[r] = fma(diff, diff, far[r]);
      }
    }
    sum_lanes(far, away, 1);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = first + r;
      // Cancellation leaves an error of ||phi||^2 times some roundings.
      const T rest = b.square[i] - b.z[i] * b.z[i] * per_z, floor = b.square[i] * T(1e-5);
      const T distance = __builtin_sqrt(away[r]);
      const T error =
          (b.error[i] * b.z[i] + __builtin_sqrt((rest > 0 ? rest : T(0)) + floor) * spread) *
              keep[r] * T(1.0001) +
          (distance + b.high[i]) * T(1e-6);
      b.error[i] = error;
      b.z[i] = z[r];
      b.low[i] = distance - error;
      b.high[i] = distance + error;
    }
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
