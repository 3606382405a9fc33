// Decode and prefill of LoLA attention in place on state pages, on torch's stable ABI. The contract
// is `lola_vllm/ops/contract.py`; the page layout is `lola_vllm/state.py`.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

// The ops' arguments as torch is told them: those of both, then each one's schema.
#define LOLA_SHARED_ARGUMENTS                                                                    \
  "Tensor q, Tensor k, Tensor v, Tensor feature_map_q, Tensor feature_map_k, Tensor log_gate, "  \
  "Tensor(a!) H, Tensor(b!) s, Tensor(c!) positions, Tensor(d!) sparse_k, Tensor(e!) sparse_v, " \
  "Tensor(f!) exact_k, Tensor(g!) exact_v, Tensor(i!) bounds, Tensor(j!) directions, "           \
  "Tensor slots, "
#define LOLA_OPTIONS "Tensor(h!) out, bool subtract_max, int window, int interval, int sink) -> ()"
#define LOLA_DECODE_SCHEMA "decode(" LOLA_SHARED_ARGUMENTS "Tensor seq_lens, " LOLA_OPTIONS
#define LOLA_PREFILL_SCHEMA \
  "prefill(" LOLA_SHARED_ARGUMENTS "Tensor query_start, Tensor context_lens, " LOLA_OPTIONS

namespace lola {

// What both ops share, in this order.
//
//   q, out          [T, Hq, d]     float32, bfloat16 or float64
//   k, v            [T, Hkv, d]    dtype of the pages' keys and values
//   feature_map_q   [Hq, d, F]; feature_map_k [Hs, d, F]; log_gate [Hq]
//   H [N, Hs, 2F, d], s [N, Hs, 2F] (float32, or float64 where k is), positions int32 [N, Hg, lam],
//   sparse_k, sparse_v [N, Hg, lam, d], exact_k, exact_v [N, Hkv, sink + window + interval, d], and
//   for interval 1 bounds [N, Hs, 6, lam] and int8 directions [N, Hs, lam, d] (else lam is 0
//   there): views of the pages slots           [rows]         int32 or int64, page per row; <= 0 is
//   padding: zeros are
//                                  answered and no page is touched
//
// decode: row r is token r, seq_lens [rows] counts it. prefill: row r has the tokens
// query_start[r] .. query_start[r + 1], after context_lens[r] that are in its page already.
// Throws, naming the argument, on a wrong shape, dtype or slot.
void decode(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
            const torch::stable::Tensor& v, const torch::stable::Tensor& feature_map_q,
            const torch::stable::Tensor& feature_map_k, const torch::stable::Tensor& log_gate,
            const torch::stable::Tensor& H, const torch::stable::Tensor& s,
            const torch::stable::Tensor& positions, const torch::stable::Tensor& sparse_k,
            const torch::stable::Tensor& sparse_v, const torch::stable::Tensor& exact_k,
            const torch::stable::Tensor& exact_v, const torch::stable::Tensor& bounds,
            const torch::stable::Tensor& directions, const torch::stable::Tensor& slots,
            const torch::stable::Tensor& seq_lens, const torch::stable::Tensor& out,
            bool subtract_max, int64_t window, int64_t interval, int64_t sink);

void prefill(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
             const torch::stable::Tensor& v, const torch::stable::Tensor& feature_map_q,
             const torch::stable::Tensor& feature_map_k, const torch::stable::Tensor& log_gate,
             const torch::stable::Tensor& H, const torch::stable::Tensor& s,
             const torch::stable::Tensor& positions, const torch::stable::Tensor& sparse_k,
             const torch::stable::Tensor& sparse_v, const torch::stable::Tensor& exact_k,
             const torch::stable::Tensor& exact_v, const torch::stable::Tensor& bounds,
             const torch::stable::Tensor& directions, const torch::stable::Tensor& slots,
             const torch::stable::Tensor& query_start, const torch::stable::Tensor& context_lens,
             const torch::stable::Tensor& out, bool subtract_max, int64_t window, int64_t interval,
             int64_t sink);

}  // namespace lola
