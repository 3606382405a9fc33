// Feature maps, and the self-recall error of a block of pairs (docs/algorithm.md, section 3):
//   SRE = || v - phi(k)^T H / (phi(k)^T s + 1e-6) ||.
// Per state head a block is one small matrix product y = k W, two softmaxes, and one product phi H:
// H comes from cache once per tile of pairs and not once per pair, which is what bounds a naive
// loop.
#pragma once

#include "constants.h"
#include "cpu/call.h"
#include "cpu/gemm.h"
#include "cpu/rows.h"
#include "cpu/workspace.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// Distance between two rows of features: 2F numbers padded to whole vectors, and room for the
// vector that feature_map() writes beyond.
template <typename T>
LOLA_INLINE int64_t feature_stride(const PageLayout& layout) {
  return round_up<T>(2 * layout.feature_dim) + kLanes<T>;
}

// For blocks of up to `pairs` pairs.
template <typename T>
struct RecallWorkspace {
  T* k;          // [pairs, d]
  T* v;          // [pairs, d padded]
  T* y;          // [pairs, F padded]: k W
  T* phi;        // [pairs, feature_stride()]
  T* predicted;  // [pairs, d padded]: phi^T H
  T* errors;     // [pairs]
  T* W;          // [d, F padded], where a map is copied
  T* H;          // [2F, d padded], where H is copied
  T* s;          // [2F padded]

  RecallWorkspace() = default;
  RecallWorkspace(const PageLayout& layout, int64_t pairs, Workspace& memory) {
    const int64_t d = layout.head_dim, dp = round_up<T>(d), F = layout.feature_dim;
    k = memory.take<T>(pairs * d);
    v = memory.take<T>(pairs * dp);
    y = memory.take<T>(pairs * round_up<T>(F));
    phi = memory.take<T>(pairs * feature_stride<T>(layout));
    predicted = memory.take<T>(pairs * dp);
    errors = memory.take<T>(pairs);
    W = memory.take<T>(d * round_up<T>(F));
    H = memory.take<T>(2 * F * dp);
    s = memory.take<T>(round_up<T>(2 * F));
  }
};

// phi[0 .. 2F) = clamp(concat(softmax(y), softmax(-y)), min=1e-12), and zeros up to whole vectors.
// y has F entries padded to whole vectors. phi must have room for 2F + one vector.
template <typename T>
LOLA_INLINE void feature_map(T* y, int64_t F, T* phi) {
  const int64_t whole = F / kLanes<T> * kLanes<T>, padded = round_up<T>(F);
  const IntVec<T> in_tail = first_lanes<T>(F - whole);
  // Pad with the first entry, which changes no extremum.
  if (whole < F) store<T>(y + whole, in_tail ? load(y + whole) : splat(y[0]));
  Vec<T> high = load(y), low = high;
  for (int64_t i = kLanes<T>; i < padded; i += kLanes<T>) {
    high = max(load(y + i), high);
    low = min(load(y + i), low);
  }
  const Vec<T> largest = splat(reduce<Max>(high)), smallest = splat(reduce<Min>(low));
  for (int sign = 0; sign < 2; ++sign) {
    T* half = phi + sign * F;
    Vec<T> sum{};
    for (int64_t i = 0; i < padded; i += kLanes<T>) {
      const Vec<T> x = load(y + i);
      Vec<T> e = exp(sign == 0 ? x - largest : smallest - x);
      if (i == whole) e = in_tail ? e : Vec<T>{};
      store<T>(half + i, e);
      sum += e;
    }
    const Vec<T> scale = splat(T(1) / reduce<Sum>(sum)), floor = splat(kFeatureFloor<T>);
    for (int64_t i = 0; i < padded; i += kLanes<T>) {
      Vec<T> e = load(half + i) * scale;
      e = e < floor ? floor : e;  // NaN stays
      if (i == whole) e = in_tail ? e : Vec<T>{};
      store<T>(half + i, e);
    }
  }
  for (int64_t f = F + padded; f < round_up<T>(2 * F); ++f) phi[f] = 0;
}

// Features of `count` keys in x.k under the map of one state head, which takes them with the n-th
// token of its page, into rows of `phi`.
template <typename T>
void map_keys(const Call& call, int64_t state_head, int64_t n, int64_t count,
              const RecallWorkspace<T>& x, T* phi) {
  const int64_t d = call.layout.head_dim, F = call.layout.feature_dim, Fp = round_up<T>(F);
  const int64_t phi_stride = feature_stride<T>(call.layout);
  const T* const W = padded_matrix(call.key_map<T>(state_head, n), d, F, x.W);
  gemm<T>(x.k, d, W, Fp, x.y, Fp, count, Fp, d);
  for (int64_t i = 0; i < count; ++i) feature_map(x.y + i * Fp, F, phi + i * phi_stride);
}

// SRE of `count` pairs of one state head from rows of their features and their values in x.v.
// Leaves phi^T H in x.predicted, and phi^T s + 1e-6 in `sums` unless that is null.
template <typename T>
void recall_errors(const Page& page, int64_t state_head, const T* phi, int64_t count,
                   const RecallWorkspace<T>& x, T* errors, T* sums) {
  const int64_t d = page.layout->head_dim, dp = round_up<T>(d), F2 = 2 * page.layout->feature_dim;
  const int64_t phi_stride = feature_stride<T>(*page.layout);
  const T* const H = padded_matrix(page.H<T>(state_head), F2, d, x.H);
  load_padded(x.s, page.s<T>(state_head), F2, round_up<T>(F2));
  gemm<T>(phi, phi_stride, H, dp, x.predicted, dp, count, dp, F2);

  for (int64_t e = 0; e < count; ++e, phi += phi_stride) {
    Vec<T> z{};
    for (int64_t i = 0; i < round_up<T>(F2); i += kLanes<T>)
      z = fma(load(phi + i), load(x.s + i), z);
    const T denominator = reduce<Sum>(z) + kRecallEps<T>;
    const Vec<T> scale = splat(T(1) / denominator);
    Vec<T> sum{};
    for (int64_t i = 0; i < dp; i += kLanes<T>) {
      const Vec<T> difference = fma(-load(x.predicted + e * dp + i), scale, load(x.v + e * dp + i));
      sum = fma(difference, difference, sum);
    }
    errors[e] = __builtin_sqrt(reduce<Sum>(sum));
    if (sums != nullptr) sums[e] = denominator;
  }
}

// sums[i] (+)= errors[i] / ||v_i||. Each error is divided before it is summed: against an empty
// state every ratio is then exactly 1, and the tie is the older pair's.
template <typename T>
void add_relative(const T* v, int64_t dp, const T* errors, int64_t count, bool first, T* sums) {
  for (int64_t i = 0; i < count; ++i) {
    const T length = norm(v + i * dp, dp);
    const T ratio = errors[i] / (length > kRecallEps<T> ? length : kRecallEps<T>);
    sums[i] = first ? ratio : sums[i] + ratio;
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
