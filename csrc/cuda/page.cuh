// A layer's state pages on the GPU: where the parts are, and what a token count says of them.
// The layout and the counts are those of lola_vllm/state.py; csrc/ops.h states the contract.
#pragma once

#include "cuda/device.cuh"
#include "dither.h"
#include "layout.h"

namespace lola {
namespace cuda {

// A strided tensor whose last dimension is contiguous; strides in elements, offsets of 64 bits.
template <int R>
struct View {
  char* data;
  int64_t stride[R];

  template <typename T, typename... I>
  LOLA_DEVICE T* at(I... index) const {
    int64_t offset = 0;
    int i = 0;
    ((offset += static_cast<int64_t>(index) * stride[i++]), ...);
    return reinterpret_cast<T*>(data) + offset;
  }
};

// A vector of slots or lengths, int32 or int64.
struct Indices {
  const char* data;
  int64_t stride;
  bool wide;

  LOLA_DEVICE int64_t operator[](int64_t i) const {
    return wide ? reinterpret_cast<const int64_t*>(data)[i * stride]
                : reinterpret_cast<const int32_t*>(data)[i * stride];
  }
};

// The argument of every kernel, passed by value: a captured graph holds all of it.
struct Params {
  View<2> q, k, v, out;        // [rows, heads, d]
  DType q_type, out_type;      // k and v are of the pages' type
  const float* feature_map_q;  // [Hq, d, F], contiguous
  const float* feature_map_k;  // [Hs, d, F], contiguous
  const float* log_gate;       // [Hq]
  View<3> H;                   // float32 [N, Hs, 2F, d]
  View<2> s;                   // float32 [N, Hs, 2F]
  View<2> positions;           // int32 [N, Hg, lam]
  View<3> sparse_k, sparse_v;  // [N, Hg, lam, d]
  View<3> exact_k, exact_v;    // [N, Hkv, sink + ring, d]
  View<3> bounds;              // float32 [N, Hs, kBounds, lam], only if incremental
  View<3> directions;          // int8 [N, Hs, lam, d], only if incremental
  Indices slots, seq_lens;     // [rows]
  float* phi;                  // [rows, Hq, 2F], scratch
  float* partial;              // [rows, Hg, splits, Hq / Hg, partial_size()], scratch
  int* lists;  // [rows, Hg, list_size()], scratch of updates that shared memory is too small for
  int64_t pages, rows;
  int64_t window, interval, sink;
  int Hq, Hkv, Hs, Hg, d, F, lam, splits;
  bool subtract_max;     // "lolcats" mixing
  bool incremental;      // interval 1: scores are bounded, few computed anew
  bool direction_words;  // directions start at multiples of 4 bytes

  __host__ __device__ int heads() const { return Hq / Hg; }
  __host__ __device__ int partial_size() const { return 4 + 2 * d; }
  // Score, position and mark of each candidate of an update; those to fold and those that arrive.
  __host__ __device__ int64_t list_size() const { return 3 * (lam + interval) + 2 * interval; }

  LOLA_DEVICE int64_t ring() const { return window + interval; }
  LOLA_DEVICE int64_t exact_row(int64_t position) const {
    return position < sink ? position : sink + position % ring();
  }
  // First position of the window after n tokens, sinks aside.
  LOLA_DEVICE int64_t window_start(int64_t n) const {
    const int64_t start = n / interval * interval - window;
    return start < sink ? sink : start;
  }
  LOLA_DEVICE int num_sparse(int64_t n) const {
    const int64_t evicted = window_start(n) - sink;
    return evicted < lam ? static_cast<int>(evicted) : lam;
  }
  LOLA_DEVICE bool any_folded(int64_t n) const { return window_start(n) - sink > lam; }
  // Whether the n-th token is followed by an update that evicts anything.
  LOLA_DEVICE bool update_due(int64_t n) const {
    return n % interval == 0 && window_start(n) > window_start(n - interval);
  }
  // Whether a row has a page. A slot beyond the pool cannot be refused without waiting for the
  // device: its page is not touched and its answer is NaN.
  LOLA_DEVICE bool live(int64_t row) const {
    const int64_t page = slots[row];
    return page > 0 && page < pages && seq_lens[row] > 0;
  }
  LOLA_DEVICE float answer_of_padding(int64_t row) const {
    return slots[row] < pages ? 0.0f : __uint_as_float(0x7fc00000u);
  }
};

// sum + added, rounded with the dither of row f of H, or of s[f], in update number `update`
// (docs/algorithm.md, section 3). An update that is added in several parts gives each part rows of
// its own.
LOLA_DEVICE float add_dithered(float sum, float added, int64_t update, int f) {
  const unsigned place =
      static_cast<unsigned>(update) * kDitherUpdate + static_cast<unsigned>(f) * kDitherRow;
  const float dither = static_cast<float>(static_cast<int>(place)) * kDitherUnit;
  return sum + (added + __uint_as_float(__float_as_uint(sum) & kExponentBits) * dither);
}

}  // namespace cuda
}  // namespace lola
