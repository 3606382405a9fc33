// Which candidates of an update stay: those of the `wanted` largest scores, ties to the older
// position. A radix select in O(count): digit by digit of a key that orders the candidates as
// scores and positions do.
#pragma once

#include "cuda/device.cuh"

namespace lola {
namespace cuda {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

// Larger for a larger score, and among equal scores for an older position.
LOLA_DEVICE uint64_t rank_key(float score, int position) {
  const unsigned bits = __float_as_uint(score + 0.0f);  // + 0.0f: -0 is 0
  const unsigned ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<unsigned>(position);
}

struct SelectMemory {
  int* bins;   // [kDigits], candidates by digit
  int* found;  // [3]: the digit, candidates still to keep of it, and all of it

  static constexpr int kSize = kDigits + 4;
  explicit LOLA_DEVICE SelectMemory(int* memory) : bins(memory), found(memory + kDigits) {}
};

// Finds the digit of the `left`-th candidate from the largest digit on, by one warp.
LOLA_DEVICE void find_digit(int left, int lane, const SelectMemory& x) {
  constexpr int kOwn = kDigits / kWarp;
  const int top = kDigits - 1 - lane * kOwn;
  int own = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own += x.bins[top - i];
  int up_to = own;  // candidates of this lane's digits and of larger ones
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const int other = __shfl_up_sync(kAllLanes, up_to, by);
    if (lane >= by) up_to += other;
  }
  int before = up_to - own;
  if (before >= left || left > up_to) return;
  int digit = top;
  while (before + x.bins[digit] < left) before += x.bins[digit--];
  x.found[0] = digit;
  x.found[1] = left - before;
  x.found[2] = x.bins[digit];
}

// The key that `wanted` candidates reach, by a block of `threads`. `score` and `position` give
// those of a candidate. 0 < wanted < count.
template <typename Score, typename Position>
LOLA_DEVICE uint64_t select_threshold(int count, int wanted, int threads, Score score,
                                      Position position, const SelectMemory& x) {
  const int thread = static_cast<int>(threadIdx.x);
  uint64_t threshold = 0;  // of which the digits above `shift` are known
  int left = wanted;       // candidates to keep of those that share these digits
  for (int shift = 64 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int i = thread; i < kDigits; i += threads) x.bins[i] = 0;
    __syncthreads();
    for (int i = thread; i < count; i += threads) {
      const uint64_t key = rank_key(score(i), shift < 32 ? position(i) : 0);
      // Two shifts: one by 64 is not defined.
      if (((key ^ threshold) >> shift) >> kDigitBits == 0) {
        atomicAdd(&x.bins[key >> shift & (kDigits - 1)], 1);
      }
    }
    __syncthreads();
    if (thread < kWarp) find_digit(left, thread, x);
    __syncthreads();
    threshold |= static_cast<uint64_t>(x.found[0]) << shift;
    left = x.found[1];
    if (left == x.found[2]) break;  // all of this digit stay
  }
  return threshold;
}

}  // namespace cuda
}  // namespace lola
