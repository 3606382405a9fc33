// Bounds on scores that are carried from update to update, so that an update computes anew only
// those that can decide it (Lemmas 1 and 2 of docs/bounds.md): updates of prefill, where it goes
// chunk by chunk.
//
// A fold adds dH and ds to H and s. The estimate q of a pair's prediction p follows it with
//   q' = (z q + S m + a s^T D) / (z + S),  S = phi . ds,  D = dH - ds m^T,
// m being the mean of the folded values and a = z / ||s||^2, and the bound e on its error with
//   e' = (z e + ||phi - a s|| ||D||) / (z + S).
// The score is ||v - q|| up to e. The choice is the one that all scores would give, so it does not
// matter when bounds were set.
#pragma once

#include "constants.h"
#include "cpu/candidates.h"
#include "cpu/workspace.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// Of a sparse set's candidates, the first `known`.
template <typename T>
struct CarriedBounds {
  T* estimate;            // [candidates, d padded]: q,
  T* error;               // at most this far from p: e
  T* phi_squared;         // ||phi||^2
  T* z;                   // phi . s
  T *low, *high;          // bounds on the score
  unsigned char* is_set;  // 0: of a pair that was recent so far, and has no bounds
  int64_t known = 0;

  CarriedBounds() = default;
  CarriedBounds(const PageLayout& layout, Workspace& memory) {
    const int64_t count = max_candidates(layout);
    estimate = memory.take<T>(count * round_up<T>(layout.head_dim));
    error = memory.take<T>(count);
    phi_squared = memory.take<T>(count);
    z = memory.take<T>(count);
    low = memory.take<T>(count);
    high = memory.take<T>(count);
    is_set = memory.take<unsigned char>(count);
  }

  // Notes the score just computed of candidate i, n = phi^T H and z. The slack is far beyond
  // rounding errors.
  LOLA_INLINE void set(int64_t i, T score, const T* phi, int64_t phi_padded, const T* n, int64_t dp,
                       T phi_dot_s) {
    const Vec<T> inverse = splat(T(1) / phi_dot_s);
    Vec<T> length{}, square{};
    for (int64_t j = 0; j < dp; j += kLanes<T>) {
      const Vec<T> p = load(n + j) * inverse;
      length = fma(p, p, length);
      store<T>(estimate + i * dp + j, p);
    }
    for (int64_t f = 0; f < phi_padded; f += kLanes<T>)
      square = fma(load(phi + f), load(phi + f), square);
    const T slack = (score + __builtin_sqrt(reduce<Sum>(length))) * kBoundSlack<T>;
    error[i] = slack;
    phi_squared[i] = reduce<Sum>(square);
    z[i] = phi_dot_s;
    is_set[i] = 1;
    low[i] = score - slack;
    high[i] = score + slack;
  }

  // Candidate i has no bounds. What stands in their place stays finite.
  LOLA_INLINE void unset(int64_t i, int64_t dp) {
    for (int64_t j = 0; j < dp; j += kLanes<T>) store<T>(estimate + i * dp + j, Vec<T>{});
    error[i] = phi_squared[i] = low[i] = high[i] = 0;
    z[i] = 1;
    is_set[i] = 0;
  }

  LOLA_INLINE void move(int64_t from, int64_t to, int64_t dp) {
    for (int64_t j = 0; j < dp; j += kLanes<T>) {
      store<T>(estimate + to * dp + j, load(estimate + from * dp + j));
    }
    is_set[to] = is_set[from];
    error[to] = error[from];
    phi_squared[to] = phi_squared[from];
    z[to] = z[from];
    low[to] = low[from];
    high[to] = high[from];
  }
};

// Whether scores can be bounded so: one state head per set.
inline bool carries_bounds(const PageLayout& layout) { return layout.states_per_set() == 1; }

// What a fold adds, and what it meets.
template <typename T>
struct Folded {
  const T* dH;    // [2F, d padded]
  const T* ds;    // [2F padded]
  const T* s;     // [2F padded]: the sum before the fold
  const T* mean;  // [d padded]: m
  T* s_residual;  // [d padded]: becomes s^T D
};

// Carries all bounds over a fold. Rows of features are phi_stride apart; v is room for a value.
template <typename T>
void carry_bounds(const Candidates& c, const T* features, int64_t phi_stride, const Folded<T>& x,
                  T* v, CarriedBounds<T>& b) {
  const int64_t d = c.layout.head_dim, dp = round_up<T>(d);
  const int64_t F2 = 2 * c.layout.feature_dim, phi_padded = round_up<T>(F2);
  Vec<T> squares{};
  for (int64_t j = 0; j < dp; j += kLanes<T>) {
    Vec<T> s_residual{};
    for (int64_t f = 0; f < F2; ++f) {
      const Vec<T> residual = fma(splat(-x.ds[f]), load(x.mean + j), load(x.dH + f * dp + j));
      squares = fma(residual, residual, squares);
      s_residual = fma(splat(x.s[f]), residual, s_residual);
    }
    store<T>(x.s_residual + j, s_residual);
  }
  const T residual_length = __builtin_sqrt(reduce<Sum>(squares)), s_length = norm(x.s, phi_padded);
  const T inverse_s_squared = T(1) / (s_length * s_length);  // a = z times this
  for (int64_t first = 0; first < b.known; first += 4) {
    const int64_t left = b.known - first, rows = left < 4 ? left : 4;
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) any = any || b.is_set[first + r];
    if (!any) continue;
    Vec<T> products[4], differences[4];
    T S[4], inverse_z[4], z[4], squared_distance[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const T* const phi = features + (first + (r < rows ? r : 0)) * phi_stride;
      products[r] = Vec<T>{};
      for (int64_t f = 0; f < phi_padded; f += kLanes<T>) {
        products[r] = fma(load(phi + f), load(x.ds + f), products[r]);
      }
    }
    sum_lanes(products, S, 1);
    for (int64_t r = 0; r < 4; ++r) {
      const int64_t i = first + (r < rows ? r : 0);
      z[r] = b.z[i] + S[r];
      inverse_z[r] = T(1) / z[r];
      const Vec<T> of_q = splat(b.z[i] * inverse_z[r]), of_mean = splat(S[r] * inverse_z[r]);
      const Vec<T> of_residual = splat(b.z[i] * inverse_s_squared * inverse_z[r]);
      differences[r] = Vec<T>{};
      c.load_v(i, v, dp);
      for (int64_t j = 0; j < dp; j += kLanes<T>) {
        const Vec<T> q = fma(of_q, load(b.estimate + i * dp + j),
                             fma(of_mean, load(x.mean + j), of_residual * load(x.s_residual + j)));
        if (r < rows) store<T>(b.estimate + i * dp + j, q);
        const Vec<T> difference = load(v + j) - q;
        differences[r] = fma(difference, difference, differences[r]);
      }
    }
    sum_lanes(differences, squared_distance, 1);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = first + r;
      // ||phi - a s||^2. Cancellation leaves an error of ||phi||^2 times some roundings.
      const T square = b.phi_squared[i] - b.z[i] * b.z[i] * inverse_s_squared;
      const T rounding = b.phi_squared[i] * kCancellationSlack<T>;
      const T distance = __builtin_sqrt(squared_distance[r]);
      const T error = (b.error[i] * b.z[i] +
                       __builtin_sqrt((square > 0 ? square : T(0)) + rounding) * residual_length) *
                          inverse_z[r] * kBoundFactor<T> +
                      (distance + b.high[i]) * kDistanceSlack<T>;
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
