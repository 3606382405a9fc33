// How the parts of an answer are joined: exact pairs and hidden state, warps, and splits.
#pragma once

#include "cuda/page.cuh"

namespace lola {
namespace cuda {

// Weight that brings sums relative to 2^from to 2^to; a part without pairs has from = -inf.
LOLA_DEVICE float weight_of(float from, float to) {
  return from == kMinusInf ? 0.0f : exp2f(from - to);
}

// One element of one head's answer, summed over parts. A part's stats are its largest logit (of
// base 2), the sum of its softmax weights, and its phi^T s.
struct Answer {
  float largest = kMinusInf, total = 0, normal = 0, soft = 0, linear = 0;

  LOLA_DEVICE void add(const float* stats, float part_soft, bool folded, float part_linear) {
    const float high = fmaxf(largest, stats[0]);
    const float mine = weight_of(largest, high), its = weight_of(stats[0], high);
    soft = soft * mine + part_soft * its;
    total = total * mine + stats[1] * its;
    largest = high;
    if (folded) {  // else they were never written
      linear += part_linear;
      normal += stats[2];
    }
  }

  LOLA_DEVICE void store_stats(float* stats, bool folded) const {
    stats[0] = largest;
    stats[1] = total;
    if (folded) stats[2] = normal;
  }

  // The joint mixture, section 4 of docs/algorithm.md.
  LOLA_DEVICE float value(const Group& p, int64_t head, bool folded) const {
    const float sum = total + exp2f(p.gates[2 * head + 1] / kLn2 - largest);  // and a learned sink
    const float exact = soft / sum;
    if (!folded) return exact;
    const float lse = logf(sum) + (p.layout.subtract_max != 0 ? 0.0f : largest * kLn2);
    const float weight = 1.0f / (1.0f + expf(logf(normal) - lse - p.gates[2 * head]));
    return weight * exact + (1.0f - weight) * (linear / normal);
  }
};

LOLA_DEVICE void answer(const Group& p, int64_t row, int64_t head, int at, float x) {
  store_any(p.out.data, p.out_type, p.out.offset(row, head) + at, x);
}

}  // namespace cuda
}  // namespace lola
