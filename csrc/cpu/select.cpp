#include "cpu/select.h"

#include <algorithm>
#include <limits>

namespace lola {
namespace {

// A score as it is compared: a NaN counts as infinite.
template <typename T>
T comparable(T score) {
  return score == score ? score : std::numeric_limits<T>::infinity();
}

template <typename T>
void select(const T* scores, const int32_t* positions, int64_t count, int64_t size, int32_t* order,
            unsigned char* keep) {
  for (int64_t i = 0; i < count; ++i) keep[i] = size > 0;
  if (count <= size || size == 0) return;
  // Infinity stands for pairs that are known to stay, most of them after a number of updates: the
  // rest is sorted alone while they have room.
  int64_t undecided = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (scores[i] <= std::numeric_limits<T>::max()) order[undecided++] = static_cast<int32_t>(i);
  }
  if (undecided < count - size) {
    undecided = count;
    for (int64_t i = 0; i < count; ++i) order[i] = static_cast<int32_t>(i);
  }
  const int64_t kept = size - (count - undecided);
  std::nth_element(order, order + kept, order + undecided, [&](int32_t a, int32_t b) {
    const T x = comparable(scores[a]), y = comparable(scores[b]);
    return x != y ? x > y : positions[a] < positions[b];
  });
  for (int64_t i = kept; i < undecided; ++i) keep[order[i]] = 0;
}

template <typename T>
T kth(T* values, int64_t count, int64_t k) {
  for (int64_t i = 0; i < count; ++i) values[i] = comparable(values[i]);
  std::nth_element(values, values + (k - 1), values + count);
  return values[k - 1];
}

}  // namespace

float kth_smallest(float* values, int64_t count, int64_t k) { return kth(values, count, k); }

double kth_smallest(double* values, int64_t count, int64_t k) { return kth(values, count, k); }

void select_largest(const float* scores, const int32_t* positions, int64_t count, int64_t size,
                    int32_t* order, unsigned char* keep) {
  select(scores, positions, count, size, order, keep);
}

void select_largest(const double* scores, const int32_t* positions, int64_t count, int64_t size,
                    int32_t* order, unsigned char* keep) {
  select(scores, positions, count, size, order, keep);
}

}  // namespace lola
