// Kernel body of the scoring op. A work item is a block of candidates of one row and sparse set.
// Included by for_each_isa.h, once per instruction set.
#include "cpu/recall_kernel.h"

namespace lola {
namespace LOLA_ISA {
namespace {

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
    T* const errors = x.errors;
    // The prediction of an empty state is zero.
    for (int64_t e = 0; e < count; ++e) errors[e] = norm(x.v + e * dp, dp);
    if (share == 1) {
      for (int64_t e = 0; e < count; ++e) scores[e] = errors[e];
      continue;
    }
    for (int64_t i = 0; i < share; ++i) {
      if (!empty) head_errors<T>(a, x, page, set * share + i, count, errors);
      add_relative(x.v, dp, errors, count, i == 0, scores);
    }
    for (int64_t e = 0; e < count; ++e) scores[e] /= static_cast<T>(share);
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
