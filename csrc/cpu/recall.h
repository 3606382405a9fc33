// The self-recall error (LoLA, arXiv 2505.23666, section 3.2) of a block of candidates:
//   SRE = || v - phi(k)^T H / (phi(k)^T s + 1e-6) ||.
// Per state head a block is one small matrix product y = k W, two softmaxes, and one product phi H:
// H comes from cache once per tile of candidates and not once per candidate, which is what bounds a
// naive loop.
#pragma once

#include "cpu/call.h"
#include "cpu/simd.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

template <typename T>
struct RecallScratch {
  T *k, *v, *y, *phi, *predicted, *W, *H, *s, *errors;
};

template <typename T>
LOLA_INLINE T norm(const T* x, int64_t padded) {
  Vec<T> sum{};
  for (int64_t i = 0; i < padded; i += kLanes<T>) {
    const Vec<T> a = load(x + i);
    sum = fma(a, a, sum);
  }
  return __builtin_sqrt(reduce<Sum>(sum));
}

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
    const Vec<T> scale = splat(T(1) / reduce<Sum>(sum)), floor = splat(T(1e-12));
    for (int64_t i = 0; i < padded; i += kLanes<T>) {
      Vec<T> e = load(half + i) * scale;
      e = e < floor ? floor : e;  // NaN stays
      if (i == whole) e = in_tail ? e : Vec<T>{};
      store<T>(half + i, e);
    }
  }
  for (int64_t f = F + padded; f < round_up<T>(2 * F); ++f) phi[f] = 0;
}

// Features of `count` keys in x.k, rows of d, under one head's map, into rows of `phi`.
template <typename T>
void map_keys(const RecallArgs& a, const RecallScratch<T>& x, int64_t head, int64_t count, T* phi) {
  const int64_t Fp = round_up<T>(a.F), phi_ld = round_up<T>(2 * a.F) + kLanes<T>;
  int64_t W_ld;
  const T* W = padded_matrix<T>(a.feature_map_k.at(head), a.feature_map_k.dtype,
                                a.feature_map_k.stride[1], a.d, a.F, x.W, &W_ld);
  gemm<T>(x.k, a.d, W, W_ld, x.y, Fp, count, Fp, a.d);
  for (int64_t e = 0; e < count; ++e) feature_map(x.y + e * Fp, a.F, phi + e * phi_ld);
}

// SRE of `count` candidates of one state head from their features and, in scratch, their values as
// rows of whole vectors. `phi` has the stride of x.phi. Leaves
// phi^T H in x.predicted, and phi^T s + 1e-6 in `sums` unless that is null.
template <typename T>
void recall_errors(const RecallArgs& a, const RecallScratch<T>& x, const T* phi, int64_t page,
                   int64_t head, int64_t count, T* errors, T* sums) {
  const int64_t F2 = 2 * a.F, dp = round_up<T>(a.d), phi_ld = round_up<T>(F2) + kLanes<T>;
  int64_t H_ld;
  const T* H = padded_matrix<T>(a.H.at(page, head), a.H.dtype, a.H.stride[2], F2, a.d, x.H, &H_ld);
  load_row(x.s, a.s.at(page, head), a.s.dtype, F2, round_up<T>(F2));
  gemm<T>(phi, phi_ld, H, H_ld, x.predicted, dp, count, dp, F2);

  for (int64_t e = 0; e < count; ++e, phi += phi_ld) {
    Vec<T> z{};
    for (int64_t i = 0; i < round_up<T>(F2); i += kLanes<T>)
      z = fma(load(phi + i), load(x.s + i), z);
    const T denominator = reduce<Sum>(z) + T(1e-6);
    const Vec<T> scale = splat(T(1) / denominator);
    Vec<T> sum{};
    for (int64_t i = 0; i < dp; i += kLanes<T>) {
      const Vec<T> diff = fma(-load(x.predicted + e * dp + i), scale, load(x.v + e * dp + i));
      sum = fma(diff, diff, sum);
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
    const T ratio = errors[i] / (length > T(1e-6) ? length : T(1e-6));
    sums[i] = first ? ratio : sums[i] + ratio;
  }
}

// Divides one block of memory into the buffers; returns the elements needed (with null: only that).
template <typename T>
int64_t carve(const RecallArgs& a, int64_t block, T* base, RecallScratch<T>* x) {
  const int64_t F2 = 2 * a.F, Fp = round_up<T>(a.F), dp = round_up<T>(a.d);
  const int64_t sizes[] = {
      block * a.d, block * dp, block * Fp, block * (round_up<T>(F2) + kLanes<T>),
      block * dp,  a.d * Fp,   F2 * dp,    round_up<T>(F2),
      block};
  T** const parts[] = {&x->k, &x->v, &x->y, &x->phi,   &x->predicted,
                       &x->W, &x->H, &x->s, &x->errors};
  int64_t used = 0;
  for (int i = 0; i < 9; ++i) {
    if (base != nullptr) *parts[i] = base + used;
    used += (sizes[i] + 15) / 16 * 16;  // cache lines (of floats): aligned vectors
  }
  return used;
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
