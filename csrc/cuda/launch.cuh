// The host side of the kernels: one function per launch, instantiated in the .cu files.
#pragma once

#include "cuda/page.cuh"

namespace lola {
namespace cuda {

// Writes phi(q) of every row whose page has folded pairs to `phi`, and clears `arrivals`.
void launch_features(const Params& p, cudaStream_t stream);

// Writes the new pairs and the answers, or partial answers where `splits` > 1. T: the type of keys
// and values. `vectors`: rows of the pages, k and v start at multiples of 16 bytes.
template <typename T>
void launch_decode(const Params& p, bool vectors, cudaStream_t stream);

// Candidates whose scores a block computes at once.
constexpr int kScoreBatch = 32;

// The update of every row whose token count is due for one; `merging` blocks join the partial
// answers. T as above.
template <typename T>
void launch_update(const Params& p, cudaStream_t stream);

}  // namespace cuda
}  // namespace lola
