// Decode and prefill of LoLA attention in place on state pages, and a product, on torch's stable
// ABI. The contract is `lola_vllm/core/ops/contract.py`; the page layout is
// `lola_vllm/core/state.py`.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

// The ops' arguments as torch is told them.
#define LOLA_LAYER_SCHEMA                                                                 \
  "Tensor(a!) pages, Tensor layout, Tensor device_layout, Tensor feature_map_q, "         \
  "Tensor feature_map_k, Tensor gates, Tensor importance, Tensor q, Tensor k, Tensor v, " \
  "Tensor state_indices, "
#define LOLA_DECODE_SCHEMA "decode(" LOLA_LAYER_SCHEMA "Tensor seq_lens, Tensor(b!) out) -> ()"
#define LOLA_PREFILL_SCHEMA                                          \
  "prefill(" LOLA_LAYER_SCHEMA                                       \
  "Tensor query_start_loc, Tensor context_lens, Tensor(b!) out) -> " \
  "()"
#define LOLA_LINEAR_SCHEMA \
  "linear(Tensor x, Tensor panels, Tensor? bias, Tensor? scale=None) -> Tensor"

namespace lola {

// What both ops take:
//
//   pages           [N, >= page_bytes]  bytes
//   layout          [groups, fields]    int64, host memory; a `PageLayout` (csrc/layout.h) for each
//                                       group of KV heads that share a page: one, or one per KV
//                                       head, with offsets from the first page's start
//   device_layout   the same on the device of the pages, where the kernels of a GPU read it: a
//   table
//                   as an argument of kernels would bound the groups of a layer
//   feature_map_q   [Hq, d, F]          float32, or float64 where keys and values are
//   feature_map_k   [1 or 2, Hs, d, F]  the same; the second is for pages with more than
//                                       `rotated_map_after` tokens
//   gates           [Hq, 2]             the same: what a head's gate adds to the log of its exact
//                                       part, and the logit of its learned sink (-inf: none)
//   importance      [Hkv, d/2 + d + 1]  the same; [0, ..] unless the layout has_score_weights
//   q, out          [T, Hq, d]          float32, bfloat16 or float64 (CUDA: or float16)
//   k, v            [T, Hkv, d]         dtype of the pages' keys and values
//   state_indices   [rows]              int32 or int64, page per row; a row with 0 or less is
//                                       padding: its answer is zero and no page is touched
//
// decode: row r is token r, and seq_lens [rows] counts it. prefill: row r has the tokens
// query_start_loc[r] .. query_start_loc[r + 1], after context_lens[r] that are in its page already.
// Throws, naming the argument, on a wrong shape, dtype or state index.
void decode(const torch::stable::Tensor& pages, const torch::stable::Tensor& layout,
            const torch::stable::Tensor& device_layout, const torch::stable::Tensor& feature_map_q,
            const torch::stable::Tensor& feature_map_k, const torch::stable::Tensor& gates,
            const torch::stable::Tensor& importance, const torch::stable::Tensor& q,
            const torch::stable::Tensor& k, const torch::stable::Tensor& v,
            const torch::stable::Tensor& state_indices, const torch::stable::Tensor& seq_lens,
            const torch::stable::Tensor& out);

void prefill(const torch::stable::Tensor& pages, const torch::stable::Tensor& layout,
             const torch::stable::Tensor& device_layout, const torch::stable::Tensor& feature_map_q,
             const torch::stable::Tensor& feature_map_k, const torch::stable::Tensor& gates,
             const torch::stable::Tensor& importance, const torch::stable::Tensor& q,
             const torch::stable::Tensor& k, const torch::stable::Tensor& v,
             const torch::stable::Tensor& state_indices,
             const torch::stable::Tensor& query_start_loc,
             const torch::stable::Tensor& context_lens, const torch::stable::Tensor& out);

// y = x W^T + b, with sums in float32: x [.., K] float32, panels [N / 32, K, 32] bfloat16, bias [N]
// float32 -> [.., N] in x's dtype. With scale [N] float32 panels are int8, a column of which is
// multiplied by its scale, and x may be bfloat16. A row's numbers do not depend on the rows beside
// it. Throws, naming the argument, on a wrong shape or dtype.
torch::stable::Tensor linear(const torch::stable::Tensor& x, const torch::stable::Tensor& panels,
                             const std::optional<torch::stable::Tensor>& bias,
                             const std::optional<torch::stable::Tensor>& scale);

}  // namespace lola
