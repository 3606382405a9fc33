// Pairs of bfloat16 elements in words, and their dot products.
#pragma once

#include "cpu/simd.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// c + the products of the pairs in a and b.
LOLA_INLINE Vec<float> dot_pairs(Words a, Words b, Vec<float> c) {
  return _mm512_dpbf16_ps(c, bits<__m512bh>(a), bits<__m512bh>(b));
}

LOLA_INLINE Words load_words(const void* p) {
  Words x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

// Whole numbers of int8 as bfloat16 in the upper halves of words; the lower ones are zeros, as no
// bit of a small number is there.
LOLA_INLINE Words load_int8_words(const int8_t* p) { return bits<Words>(load_bytes<float>(p)); }

// In a register of its own: folded into its uses it would be loaded once for each.
LOLA_INLINE Words broadcast_pair(const void* p) {
  uint32_t x;
  __builtin_memcpy(&x, p, sizeof x);
  Words y = bits<Words>(_mm512_set1_epi32(static_cast<int>(x)));
  __asm__("" : "+v"(y));
  return y;
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
