// Self-recall errors on the CPU; `csrc/ops.h` states the contract.
#pragma once

#include "cpu/types.h"

namespace lola {

struct SreArgs {
  Strided<4> k, v;             // [B, Hg, E, d]
  Strided<3> feature_map_k;    // [Hs, d, F]
  Strided<4> H;                // [N, Hs, 2F, d]
  Strided<3> s;                // [N, Hs, 2F]
  const char* slots;           // [B]
  bool wide_slots;             // int64 rather than int32
  int64_t slots_stride;        // elements
  const unsigned char* empty;  // [B]
  int64_t empty_stride;
  char* out;  // [B, Hg, E], contiguous; f64 where k is, else f32
  int64_t B, Hg, Hs, E, d, F;

  int64_t slot(int64_t row) const {
    const char* p = slots + row * slots_stride * (wide_slots ? 8 : 4);
    return wide_slots ? *reinterpret_cast<const int64_t*>(p) : *reinterpret_cast<const int32_t*>(p);
  }
};

// Fills `out`. Rows with a negative slot count as empty.
void sre_scores_cpu(const SreArgs& args);

}  // namespace lola
