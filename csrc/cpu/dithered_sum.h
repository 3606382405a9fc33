// Rounding of the sums H and s (Lemma 3 of docs/bounds.md): what a fold adds to a
// large float32 sum is rounded with a dither, up or down by turns, so that it arrives on average,
// where rounding to nearest would lose it or round it the same way each time.
#pragma once

#include "constants.h"
#include "cpu/simd.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// The dither of row f of H and of s[f] in update number `update`, for sums from 1 to below 2. An
// update that is added in several parts gives each part rows of its own.
template <typename T>
LOLA_INLINE T dither(int64_t update, int64_t f) {
  const uint32_t place =
      static_cast<uint32_t>(update) * kDitherUpdate + static_cast<uint32_t>(f) * kDitherRow;
  return static_cast<T>(static_cast<int32_t>(place)) * static_cast<T>(kDitherUnit);
}

// sum + added, rounded with a dither. Sums of float64 need none.
template <typename T>
LOLA_INLINE Vec<T> add_dithered(Vec<T> sum, Vec<T> added, Vec<T> dither) {
  if constexpr (sizeof(T) == 8) {
    return sum + added;
  } else {
    const Vec<float> power = bits<Vec<float>>(bits<Words>(sum) & kExponentBits);
    return sum + fma(power, dither, added);
  }
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
