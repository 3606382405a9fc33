// Kernel body of the self-recall error (LoLA, arXiv 2505.23666, section 3.2):
//   SRE = || v - phi(k)^T H / (phi(k)^T s + 1e-6) ||.
// Included by for_each_isa.h, once per instruction set.
//
// A work item is a block of candidates of one row and sparse set. Per state head the block is one
// small matrix product y = k W, two softmaxes, and one product phi H: H comes from cache once per
// tile of candidates and not once per candidate, which is what bounds a naive loop.

namespace lola {
namespace LOLA_ISA {
namespace {

template <typename T>
struct SreScratch {
  T *k, *v, *y, *phi, *predicted, *W, *H, *s, *sum;
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
}

// SRE of `count` candidates in scratch (k rows of d, v rows of whole vectors) for one state head;
// writes squares' roots to `errors`, strided by 1.
template <typename T>
void head_errors(const SreArgs& a, const SreScratch<T>& x, int64_t page, int64_t head,
                 int64_t count, T* errors) {
  const int64_t F2 = 2 * a.F, Fp = round_up<T>(a.F), dp = round_up<T>(a.d);
  const int64_t phi_ld = round_up<T>(F2) + kLanes<T>;
  int64_t W_ld, H_ld;
  const T* W = padded_matrix<T>(a.feature_map_k.at(head), a.feature_map_k.dtype,
                                a.feature_map_k.stride[1], a.d, a.F, x.W, &W_ld);
  const T* H = padded_matrix<T>(a.H.at(page, head), a.H.dtype, a.H.stride[2], F2, a.d, x.H, &H_ld);
  load_row(x.s, a.s.at(page, head), a.s.dtype, F2, round_up<T>(F2));

  gemm<T>(x.k, a.d, W, W_ld, x.y, Fp, count, Fp, a.d);
  for (int64_t e = 0; e < count; ++e) feature_map(x.y + e * Fp, a.F, x.phi + e * phi_ld);
  gemm<T>(x.phi, phi_ld, H, H_ld, x.predicted, dp, count, dp, F2);

  for (int64_t e = 0; e < count; ++e) {
    const T* phi = x.phi + e * phi_ld;
    Vec<T> z{};
    for (int64_t i = 0; i < round_up<T>(F2); i += kLanes<T>)
      z = fma(load(phi + i), load(x.s + i), z);
    const Vec<T> scale = splat(T(1) / (reduce<Sum>(z) + T(1e-6)));
    Vec<T> sum{};
    for (int64_t i = 0; i < dp; i += kLanes<T>) {
      const Vec<T> diff = fma(-load(x.predicted + e * dp + i), scale, load(x.v + e * dp + i));
      sum = fma(diff, diff, sum);
    }
    errors[e] = __builtin_sqrt(reduce<Sum>(sum));
  }
}

// Divides one block of memory into the buffers; returns the elements needed (with null: only that).
template <typename T>
int64_t carve(const SreArgs& a, int64_t block, T* base, SreScratch<T>* x) {
  const int64_t F2 = 2 * a.F, Fp = round_up<T>(a.F), dp = round_up<T>(a.d);
  const int64_t sizes[] = {
      block * a.d, block * dp, block * Fp, block * (round_up<T>(F2) + kLanes<T>),
      block * dp,  a.d * Fp,   F2 * dp,    round_up<T>(F2),
      2 * block};
  T** const parts[] = {&x->k, &x->v, &x->y, &x->phi, &x->predicted, &x->W, &x->H, &x->s, &x->sum};
  int64_t used = 0;
  for (int i = 0; i < 9; ++i) {
    if (base != nullptr) *parts[i] = base + used;
    used += (sizes[i] + 15) / 16 * 16;  // cache lines (of floats): aligned vectors
  }
  return used;
}

template <typename T>
void sre_items(const SreArgs& a, int64_t block, int64_t begin, int64_t end, T* memory) {
  SreScratch<T> x;
  carve<T>(a, block, memory, &x);
  const int64_t blocks = (a.E + block - 1) / block, dp = round_up<T>(a.d), share = a.Hs / a.Hg;
  T* out = reinterpret_cast<T*>(a.out);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % blocks * block, set = item / blocks % a.Hg;
    const int64_t row = item / blocks / a.Hg;
    const int64_t count = block < a.E - first ? block : a.E - first;
    const int64_t page = a.slot(row);
    const bool empty = a.empty[row * a.empty_stride] != 0 || page < 0;
    T* const scores = out + (row * a.Hg + set) * a.E + first;

    for (int64_t e = 0; e < count; ++e) {
      load_row(x.v + e * dp, a.v.at(row, set, first + e), a.v.dtype, a.d, dp);
      if (!empty) load_row(x.k + e * a.d, a.k.at(row, set, first + e), a.k.dtype, a.d, a.d);
    }
    if (share == 1 && !empty) {
      head_errors<T>(a, x, page, set, count, scores);
      continue;
    }
    T *const sum = x.sum, *const errors = x.sum + block;
    for (int64_t e = 0; e < count; ++e) {
      sum[e] = 0;
      errors[e] = norm(x.v + e * dp, dp);  // the prediction of an empty state is zero
    }
    if (share == 1) {
      for (int64_t e = 0; e < count; ++e) scores[e] = errors[e];
      continue;
    }
    for (int64_t i = 0; i < share; ++i) {
      if (!empty) head_errors<T>(a, x, page, set * share + i, count, errors);
      for (int64_t e = 0; e < count; ++e) sum[e] += errors[e];
    }
    for (int64_t e = 0; e < count; ++e) {
      const T size = norm(x.v + e * dp, dp);
      scores[e] = sum[e] / static_cast<T>(share) / (size > T(1e-6) ? size : T(1e-6));
    }
  }
}

}  // namespace

// Elements of scratch that sre_run needs.
int64_t sre_scratch(const SreArgs& a, int64_t block) {
  SreScratch<float> x;
  SreScratch<double> y;
  return a.k.dtype == DType::f64 ? carve<double>(a, block, nullptr, &y)
                                 : carve<float>(a, block, nullptr, &x);
}

// Items begin .. end of B * Hg * ceil(E / block); `memory` is aligned scratch, zero at first use.
void sre_run(const SreArgs& a, int64_t block, int64_t begin, int64_t end, void* memory) {
  if (a.k.dtype == DType::f64) {
    sre_items<double>(a, block, begin, end, static_cast<double*>(memory));
  } else {
    sre_items<float>(a, block, begin, end, static_cast<float*>(memory));
  }
}

}  // namespace LOLA_ISA
}  // namespace lola
