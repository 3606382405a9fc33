// Constants of the dither that folds are rounded with (docs/algorithm.md, section 3). Free of
// torch: kernels include it. The Python twins are in lola_vllm/ops/dither.py.
#pragma once

#include <cstdint>

namespace lola {

// What row f of H, and s[f], add in update number m before they round, in parts of 2^-32 of their
// last place, is kDitherUpdate m + kDitherRow f modulo 2^32, as a signed number: the golden ratio,
// whose multiples spread most evenly, and another irrational number, so that rows err apart.
constexpr uint32_t kDitherUpdate = 0x9E3779B9u, kDitherRow = 0xC13FA9A9u;

// 2^-32 of the last place of 1.
constexpr float kDitherUnit = 0x1p-55f;

// The bits of a float32 that say its power of two.
constexpr uint32_t kExponentBits = 0x7F800000u;

}  // namespace lola
