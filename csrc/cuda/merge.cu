// Joins the partial answers in a launch of its own, where no launch of scores does it.
#include "cuda/launch.cuh"
#include "cuda/merge.cuh"

namespace lola {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// Grid: rows x query heads of the layer.
__global__ void __launch_bounds__(kThreads) merge_kernel(const Params params) {
  merge(params, blockIdx.x / params.layer_heads(),
        static_cast<int>(blockIdx.x % params.layer_heads()));
}

}  // namespace

void launch_merge(const Params& p, cudaStream_t stream) {
  launch("decode: merge", merge_kernel, dim3(static_cast<unsigned>(p.num_rows * p.layer_heads())),
         kThreads, 0, stream, p);
}

}  // namespace cuda
}  // namespace lola
