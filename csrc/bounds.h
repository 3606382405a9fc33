// What a page keeps of each sparse pair and state head where the update interval is 1, so that an
// update computes few recall errors anew (Lemma 1, docs/bounds.md). Free of torch: kernels
// include it.
#pragma once

#include "constants.h"

namespace lola {

// The rows of `bounds`, as in `BOUND_ROWS` of lola_vllm/core/state.py. kLow bounds the recall error
// from below. The others are of when the error was computed last, with u the stored direction:
enum BoundsRow {
  kLow,       // low: at most u . (v - p)
  kSum,       // z = phi . s + kRecallEps; it only grows
  kValue,     // ||v||
  kFeatures,  // ||phi||
  kAlong,     // u . v
  kScale,     // 1 / length of u as it is stored
  kBounds     // number of rows
};

}  // namespace lola
