// A layer's state pages on the CPU: where the parts are, and what a token count says of them.
// The layout and the counts are those of lola_vllm/state.py; `csrc/ops.h` states the contract.
#pragma once

#include "bounds.h"
#include "cpu/types.h"
#include "dither.h"

namespace lola {

// A vector of slots or lengths, int32 or int64.
struct Indices {
  const char* data = nullptr;
  bool wide = false;
  int64_t stride = 1;  // elements

  int64_t operator[](int64_t i) const {
    const char* p = data + i * stride * (wide ? 8 : 4);
    return wide ? *reinterpret_cast<const int64_t*>(p) : *reinterpret_cast<const int32_t*>(p);
  }
};

// What scoring needs of a layer.
struct RecallArgs {
  Strided<3> feature_map_k;  // [Hs, d, F]
  Strided<4> H;              // [N, Hs, 2F, d]
  Strided<3> s;              // [N, Hs, 2F]
  int64_t d, F;
};

struct LolaArgs {
  RecallArgs recall;
  Strided<4> sparse_k, sparse_v;  // [N, Hg, lam, d]
  Strided<4> exact_k, exact_v;    // [N, Hkv, sink + ring, d]
  Strided<4> bounds;              // [N, Hs, 6, lam], T; only if incremental
  int8_t* directions;             // [N, Hs, lam, d]; only if incremental
  int64_t directions_stride[2];   // of pages and state heads, elements
  bool incremental;               // interval 1: scores are bounded, few computed anew
  int32_t* positions;             // [N, Hg, lam]
  int64_t positions_stride[2];    // of pages and sparse sets, elements
  Strided<3> feature_map_q;       // [Hq, d, F]
  Strided<1> log_gate;            // [Hq]
  Strided<3> q, k, v, out;        // [tokens, heads, d]
  Indices slots;                  // [rows]
  bool subtract_max;              // "lolcats" mixing
  int64_t window, lam, interval, sink;
  int64_t Hq, Hkv, Hs, Hg, d, F;
  int64_t columns = 96;  // queries times heads of a block of prefill, so that logits stay in L2

  int64_t ring() const { return window + interval; }
  int64_t exact_row(int64_t position) const {
    return position < sink ? position : sink + position % ring();
  }
  // First position of the window after n tokens, sinks aside.
  int64_t window_start(int64_t n) const {
    const int64_t start = n / interval * interval - window;
    return start < sink ? sink : start;
  }
  int64_t num_sparse(int64_t n) const {
    const int64_t evicted = window_start(n) - sink;
    return evicted < lam ? evicted : lam;
  }
  int64_t num_folded(int64_t n) const {
    const int64_t folded = window_start(n) - sink - lam;
    return folded > 0 ? folded : 0;
  }
  // Whether the n-th token is followed by an update that evicts anything.
  bool update_due(int64_t n) const {
    return n % interval == 0 && window_start(n) > window_start(n - interval);
  }
  int8_t* direction_rows(int64_t page, int64_t head) const {
    return directions + page * directions_stride[0] + head * directions_stride[1];
  }
  int32_t* position_row(int64_t page, int64_t set) const {
    return positions + page * positions_stride[0] + set * positions_stride[1];
  }
};

// A run of new tokens of one page: `token` is the first one's row in q, k, v and out.
struct Sequence {
  int64_t page, token, position, count;
};

// A block of queries of a run, and the sparse set whose heads ask: tokens first .. first + count of
// a piece that starts at `position`; `token` is the row of the block's first query.
struct AttendItem {
  int64_t page, set, token, position, first, count;
};

// Work that threads take turn by turn, so that one which wakes late or is interrupted holds nobody
// up. A turn is up to `items` items in a row.
struct Turns {
  int64_t count, items;
  int64_t next = 0, done = 0;

  // The next turn; none is left where that is `count` or more.
  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
  void finish() { __atomic_fetch_add(&done, 1, __ATOMIC_RELEASE); }
  bool finished() const { return __atomic_load_n(&done, __ATOMIC_ACQUIRE) >= count; }
};

// Longest turn of decode: the last one keeps the other threads waiting.
constexpr int64_t kTurnItems = 6;

enum class Phase { decode, attend, lane };

// Queries per block.
inline int64_t query_block(const LolaArgs& a) {
  const int64_t heads = a.Hq / a.Hg;
  return heads < a.columns ? a.columns / heads : 1;
}

// Copies a row of d elements of the same dtype.
inline void copy_row(char* to, const char* from, int64_t bytes) {
  __builtin_memcpy(to, from, static_cast<unsigned long>(bytes));
}

// Longest piece of a prompt handled at once: bounds the scratch where the interval is very long.
constexpr int64_t kMaxPiece = 256;

// The piece of a run that follows its first `done` tokens: up to the next update point.
inline Sequence next_piece(const LolaArgs& a, const Sequence& run, int64_t done) {
  const int64_t position = run.position + done;
  int64_t count = run.count - done;
  if (count > a.interval - position % a.interval) count = a.interval - position % a.interval;
  if (count > kMaxPiece) count = kMaxPiece;
  return {run.page, run.token + done, position, count};
}

// Queries first .. first + block of a piece, or what there is of them.
inline AttendItem attend_item(const Sequence& piece, int64_t set, int64_t first, int64_t block) {
  const int64_t left = piece.count - first;
  return {piece.page, set, piece.token + first, piece.position, first, left < block ? left : block};
}

// Puts a piece's new pairs of one KV head in their rows of the exact store.
inline void write_pairs(const LolaArgs& a, const Sequence& piece, int64_t kv) {
  const int64_t bytes = a.d * size_of(a.exact_k.dtype);
  for (int64_t t = 0; t < piece.count; ++t) {
    const int64_t row = a.exact_row(piece.position + t);
    copy_row(a.exact_k.at(piece.page, kv, row), a.k.at(piece.token + t, kv), bytes);
    copy_row(a.exact_v.at(piece.page, kv, row), a.v.at(piece.token + t, kv), bytes);
  }
}

// Marks the candidates to keep: the lam of largest score, ties to the older position. A NaN counts
// as infinite.
void select_largest(const float* scores, const int32_t* positions, int64_t count, int64_t lam,
                    int32_t* order, unsigned char* keep);
void select_largest(const double* scores, const int32_t* positions, int64_t count, int64_t lam,
                    int32_t* order, unsigned char* keep);

// The k-th smallest of the values (k = 1: the smallest), a NaN counting as the largest; reorders
// them.
float kth_smallest(float* values, int64_t count, int64_t k);
double kth_smallest(double* values, int64_t count, int64_t k);

// Decode: one token per row, `seq_lens` counts it.
void decode_cpu(const LolaArgs& args, int64_t rows, const Indices& seq_lens);

// Prefill: row r holds the tokens query_start[r] .. query_start[r + 1], after context_lens[r].
void prefill_cpu(const LolaArgs& args, int64_t rows, const Indices& query_start,
                 const Indices& context_lens);

}  // namespace lola
