// Selection of the pairs that stay exact. Compiled once, for every machine (cpu/target.h).
#pragma once

#include <cstdint>

namespace lola {

// Marks the candidates to keep: the `size` of largest score, ties to the older position. A NaN
// counts as infinite. `order` is room for `count` numbers.
void select_largest(const float* scores, const int32_t* positions, int64_t count, int64_t size,
                    int32_t* order, unsigned char* keep);
void select_largest(const double* scores, const int32_t* positions, int64_t count, int64_t size,
                    int32_t* order, unsigned char* keep);

// The k-th smallest of the values (k = 1: the smallest), a NaN counting as the largest; reorders
// them.
float kth_smallest(float* values, int64_t count, int64_t k);
double kth_smallest(double* values, int64_t count, int64_t k);

}  // namespace lola
