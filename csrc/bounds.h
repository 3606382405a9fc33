// What a page keeps of each sparse pair and state head where the interval is 1, so that an update
// computes few scores anew (docs/algorithm.md, section 3). Free of torch: kernels include it.
#pragma once

namespace lola {

// The rows of `bounds`. kLow bounds the recall error from below. The others are of when the error
// was computed last: phi . s + 1e-6, which only grows; ||v||; ||phi||; u . v; and 1 / length of the
// direction u that is stored as 8-bit numbers.
enum BoundsRow { kLow, kSum, kValue, kFeatures, kAlong, kScale, kBounds };

}  // namespace lola
