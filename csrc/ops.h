// The ops of the `lola` namespace, on torch's stable ABI: schemas and checks are in ops.cpp, the
// kernels under cpu/. Shapes: B rows, N pages, Hg sparse sets, Hs state heads, E candidates, d head
// size, F feature size.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace lola {

// Self-recall errors of candidates against their pages' hidden states (arXiv 2505.23666, 3.2).
//
//   k, v            [B, Hg, E, d]  float32, bfloat16 or float64, k after RoPE
//   feature_map_k   [Hs, d, F]     Hg divides Hs; state head h belongs to set h / (Hs / Hg)
//   H               [N, Hs, 2F, d] float32, or float64 where k is
//   s               [N, Hs, 2F]    dtype of H
//   slots           [B]            int32 or int64, the row's page; a negative one counts as empty
//   empty           [B]            bool: the state counts as zero and its bytes are not read
//
// Returns [B, Hg, E], float64 where k is and float32 otherwise: the SRE where Hg = Hs, else the
// mean over the set's state heads of SRE / max(||v||, 1e-6). Strides are free, except that the last
// dimension is contiguous. A score depends only on its own candidate and state: not on B, the order
// of candidates or the number of threads. Throws, naming the argument, on a wrong shape or dtype,
// and on a slot that is not a page.
torch::stable::Tensor sre_scores(const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                                 const torch::stable::Tensor& feature_map_k,
                                 const torch::stable::Tensor& H, const torch::stable::Tensor& s,
                                 const torch::stable::Tensor& slots,
                                 const torch::stable::Tensor& empty);

// The instruction set the CPU kernels use: 0 baseline, 1 AVX2, 2 AVX-512.
int64_t cpu_isa_level();

}  // namespace lola
