// Selection of the pairs that stay exact. In a file of its own, compiled for every machine: library
// templates must not be instantiated inside the per-instruction-set regions (for_each_isa.h).
#include <algorithm>
#include <limits>

#include "cpu/page.h"

namespace lola {
namespace {

template <typename T>
void select(const T* scores, const int32_t* positions, int64_t count, int64_t lam, int32_t* order,
            unsigned char* keep) {
  for (int64_t i = 0; i < count; ++i) {
    order[i] = static_cast<int32_t>(i);
    keep[i] = count <= lam;
  }
  if (count <= lam || lam == 0) return;
  std::nth_element(order, order + lam, order + count, [&](int32_t a, int32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : positions[a] < positions[b];
  });
  for (int64_t i = 0; i < lam; ++i) keep[order[i]] = 1;
}

template <typename T>
T kth(T* values, int64_t count, int64_t k) {
  for (int64_t i = 0; i < count; ++i) {
    if (!(values[i] <= std::numeric_limits<T>::max()))
      values[i] = std::numeric_limits<T>::infinity();
  }
  std::nth_element(values, values + (k - 1), values + count);
  return values[k - 1];
}

}  // namespace

float kth_smallest(float* values, int64_t count, int64_t k) { return kth(values, count, k); }

double kth_smallest(double* values, int64_t count, int64_t k) { return kth(values, count, k); }

void select_largest(const float* scores, const int32_t* positions, int64_t count, int64_t lam,
                    int32_t* order, unsigned char* keep) {
  select(scores, positions, count, lam, order, keep);
}

void select_largest(const double* scores, const int32_t* positions, int64_t count, int64_t lam,
                    int32_t* order, unsigned char* keep) {
  select(scores, positions, count, lam, order, keep);
}

}  // namespace lola
