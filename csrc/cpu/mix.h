// How the exact pairs and the hidden state share an answer (docs/algorithm.md, section 4).
#pragma once

#include "cpu/call.h"
#include "cpu/simd.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// D = phi(q) . s, of padded rows of F2 numbers.
template <typename T>
LOLA_INLINE T feature_sum(const T* phi, const T* s, int64_t F2) {
  Vec<T> products{};
  for (int64_t f = 0; f < round_up<T>(F2); f += kLanes<T>) {
    products = fma(load(phi + f), load(s + f), products);
  }
  return reduce<Sum>(products);
}

// What a head's learned sink, a pair without a value, adds to the sum of exp(logit - largest).
template <typename T>
LOLA_INLINE T sink_weight(const Call& call, int64_t head, T largest) {
  return __builtin_exp(call.sink_logit<T>(head) - largest);
}

// What the softmax over the exact pairs weighs in a head's answer: r = sigmoid(log of its weight
// over D), with the largest logit and the sum of exp(logit - largest).
template <typename T>
LOLA_INLINE T exact_weight(const Call& call, int64_t head, T largest, T sum, T D) {
  const T lse = __builtin_log(sum) + (call.layout.subtract_max != 0 ? T(0) : largest);
  return T(1) / (T(1) + __builtin_exp(-(lse + call.gate<T>(head) - __builtin_log(D))));
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
