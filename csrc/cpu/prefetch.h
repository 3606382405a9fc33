// Prefetching across the borders of what a kernel reads.
#pragma once

#include "cpu/target.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// A queue of the memory that will be read after what is being read now: the rest of an item and
// the next one. Memory is to work while the arithmetic does, without a pause, so every loop
// prefetches about as much as comes in the time that it takes: those over keys and values what they
// read, that over H, whose rows are wider, half of it, and the rest is left to those that read
// nothing of a page, or what has been read before, as an update does.
struct Prefetcher {
  static constexpr uint32_t kRanges = 32;
  // Bytes to be ahead of the loads at the beginning of an item: a small part of the L2 cache, into
  // which they are prefetched. To L1 a core has only a few dozen lines on their way at a time, and
  // waits for more than half of what the bus could bring.
  static constexpr int64_t kDistance = 32768;
  static constexpr int kL2 = 2;  // as __builtin_prefetch names it
  const char *at, *end;          // the rest of the current range
  const char *from[kRanges], *to[kRanges];
  uint32_t first, last;  // ranges to come, modulo their number

  void clear() {
    at = end = nullptr;
    first = last = 0;
  }

  // Prefetches what is missing to the distance, where `bytes` have been pushed that are not read
  // yet.
  void keep_distance(int64_t bytes) {
    int64_t waiting = end - at;
    for (uint32_t i = first; i != last; ++i) waiting += to[i % kRanges] - from[i % kRanges];
    const int64_t missing = kDistance - (bytes - waiting);
    if (missing > 0) prefetch_across(missing / 64);
  }

  // Appends a range. Returns its bytes.
  int64_t push(const void* p, int64_t bytes) {
    if (bytes <= 0) return 0;
    if (last - first == kRanges) ++first;
    from[last % kRanges] = static_cast<const char*>(p);
    to[last++ % kRanges] = static_cast<const char*>(p) + bytes;
    return bytes;
  }

  // The next `lines` cache lines, across the borders of ranges.
  __attribute__((noinline)) void prefetch_across(int64_t lines) {
    for (; lines > 0; --lines, at += 64) {
      if (at >= end) {
        if (first == last) return;
        at = from[first % kRanges];
        end = to[first++ % kRanges];
      }
      __builtin_prefetch(at, 0, kL2);
    }
  }

  // The next N cache lines.
  template <int N>
  LOLA_INLINE void prefetch() {
    if (end - at < N * 64) {
      if (at < end || first != last) prefetch_across(N);  // prefill pushes nothing
      return;
    }
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) __builtin_prefetch(at + i * 64, 0, kL2);
    at += N * 64;
  }
};

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
