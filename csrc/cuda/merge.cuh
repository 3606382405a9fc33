// Joins the partial answers of the splits, in blocks of the launch of updates.
#pragma once

#include "cuda/answer.cuh"

namespace lola {
namespace cuda {

// Whether this block is one of `merging`; it then gives the answer of a row and query head.
LOLA_DEVICE bool merged(const Params& params) {
  const int block = static_cast<int>(blockIdx.x);
  if (block >= params.merging) return false;
  const int row = block / params.layer_heads(), of_layer = block % params.layer_heads();
  const Group p(params, of_layer / params.num_heads());
  const int head = of_layer % p.num_heads(), splits = p.own_splits();
  const bool live = p.live(row), folded = live && p.any_folded(p.seq_lens[row] - 1);
  for (int at = threadIdx.x; at < p.head_dim(); at += blockDim.x) {
    if (!live) {
      answer(p, row, head, at, p.answer_of_padding(row));
      continue;
    }
    Answer sum;
    for (int split = 0; split < splits; ++split) {
      const float* const part = p.partial_of(row, head, split);
      sum.add(part, part[4 + at], folded, folded ? part[4 + p.head_dim() + at] : 0.0f);
    }
    answer(p, row, head, at, sum.value(p, head, folded));
  }
  return true;
}

}  // namespace cuda
}  // namespace lola
