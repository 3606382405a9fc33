// The kernels of decode, prefill and update, by instruction set and dtype.
#pragma once

#include <cstdint>

#include "cpu/call.h"
#include "cpu/query_block.h"
#include "cpu/work_queue.h"

namespace lola {

// y = x W^T + bias, see cpu/linear.h.
struct Linear {
  DType dtype;    // of x and y: float32, or bfloat16 where W is int8 and there are dot products
  const void* x;  // [rows, K]
  const void* panels;  // [N / kPanel, K, kPanel], bfloat16, or int8 where there are scales
  const float* scale;  // [N], or null
  const float* bias;   // [N], or null
  void* y;             // [rows, N]
  int64_t rows, K, N;
};

// Columns of a panel. In bfloat16 those of two vectors lie in turn: with L floats in a vector,
// column c of each 2 L is at 2 (c mod L) + c / L.
constexpr int64_t kPanel = 32;
constexpr int64_t kRowBlock = 72;  // rows of x that stay in a cache beside a panel

// Entry points for one instruction set and one dtype of keys and values; kernels_impl.h makes them.
// A workspace is memory of at least the bytes that the function beside says.
struct Kernels {
  // Decode: takes tasks from the queue, whose items are rows by sparse sets, until it is empty.
  int64_t (*decode_bytes)(const Call&);
  void (*decode)(const Call&, const Indices& seq_lens, WorkQueue&, char* workspace);
  // Prefill token by token: items [begin, end) of rows by KV heads. Workspace as for decode.
  void (*decode_tokens)(const Call&, const NewTokens* rows, int64_t begin, int64_t end,
                        char* workspace);

  // Prefill by blocks of up to `max_block` queries.
  int64_t (*max_block)(const Call&);
  int64_t (*attend_bytes)(const Call&);
  void (*attend)(const Call&, const QueryBlock&, char* workspace);

  // Updates of the sparse sets of one KV head of one page, chunk by chunk: decided set by set, each
  // by any thread, then carried out. The workspace is opened first; it keeps what is known from one
  // update to the next.
  int64_t (*update_bytes)(const Call&);
  void (*open)(const Call&, char* workspace);
  void (*decide)(const Call&, const NewTokens& chunk, int64_t set, char* workspace);
  void (*commit)(const Call&, const NewTokens& chunk, int64_t kv_head, char* workspace);

  // Items [begin, end) of blocks of rows by panels, whatever the dtype of keys and values.
  void (*multiply)(const Linear&, int64_t begin, int64_t end);
};

// For the instruction set that this process uses (cpu/isa.h).
const Kernels& kernels(DType kv_dtype);

}  // namespace lola
