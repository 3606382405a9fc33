// Joins the partial answers of the splits.
#include "cuda/answer.cuh"
#include "cuda/launch.cuh"

namespace lola {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// Grid: rows x query heads.
__global__ void __launch_bounds__(kThreads) merge_kernel(const Params p) {
  const int64_t row = blockIdx.x / p.num_heads(), head = blockIdx.x % p.num_heads();
  const bool live = p.live(row), folded = live && p.any_folded(p.seq_lens[row] - 1);
  for (int at = threadIdx.x; at < p.head_dim(); at += kThreads) {
    if (!live) {
      answer(p, row, head, at, p.answer_of_padding(row));
      continue;
    }
    Answer sum;
    for (int split = 0; split < p.splits; ++split) {
      const float* const part = partial_row(p, row, head, split);
      sum.add(part, part[4 + at], folded, folded ? part[4 + p.head_dim() + at] : 0.0f);
    }
    answer(p, row, head, at, sum.value(p, head, folded));
  }
}

}  // namespace

void launch_merge(const Params& p, cudaStream_t stream) {
  launch("decode: merge", merge_kernel, dim3(static_cast<unsigned>(p.num_rows * p.num_heads())),
         kThreads, 0, stream, p);
}

}  // namespace cuda
}  // namespace lola
