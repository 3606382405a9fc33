// Numeric constants of the algorithm and of its bounds; docs/bounds.md says why.
// Their Python form is lola_vllm/core/ops/constants.py; a test compares the two. Free of torch: CPU
// and CUDA kernels include it. A template parameter T is the type that a kernel computes in.
#pragma once

#include <cstdint>

namespace lola {

// Least entry of a feature map, as in LoLCATs' code.
template <typename T>
constexpr T kFeatureFloor = T(1e-12);

// Added to phi . s in the self-recall error; also the least ||v|| that divides it.
template <typename T>
constexpr T kRecallEps = T(1e-6);

// Largest size of the logarithm of a pair's importance.
template <typename T>
constexpr T kMaxLogImportance = T(20.0);

// Rounding errors that bounds on recall errors allow for (Lemma 1): a share of the lengths in a
// recall error, when a bound is set;
template <typename T>
constexpr T kBoundSlack = T(2e-5);

// a factor on a product of norms that a fold takes from a bound;
template <typename T>
constexpr T kBoundFactor = T(1.0001);

// a share of the lengths in ||v - p||, at each fold that carries p;
template <typename T>
constexpr T kDistanceSlack = T(1e-6);

// a share of ||phi||^2, in the difference ||phi||^2 - (phi . s)^2 / ||s||^2.
template <typename T>
constexpr T kCancellationSlack = T(1e-5);

// Largest entry of a sparse pair that is kept as int8.
constexpr int kPairMax = 127;

// The dither of folds (Lemma 3). Row f of H, and s[f], add place * kDitherUnit of their power of
// two in update number m, with place = kDitherUpdate * m + kDitherRow * f modulo 2^32 as a signed
// number: 2^32 over the golden and over the plastic ratio.
constexpr uint32_t kDitherUpdate = 0x9E3779B9u;
constexpr uint32_t kDitherRow = 0xC13FA9A9u;

// 2^-32 of the last place of a float32 1, which is 2^-23.
constexpr float kDitherUnit = 0x1p-55f;

// The bits of a float32 that say its power of two.
constexpr uint32_t kExponentBits = 0x7F800000u;

// Longest chunk of a prompt that is attended at once: bounds the logits of a chunk.
constexpr int64_t kMaxChunk = 256;

}  // namespace lola
