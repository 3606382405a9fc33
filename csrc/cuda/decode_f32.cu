// Decode on pages of f32 keys and values; a file of its own, so that the three build at once.
#include "cuda/decode_kernel.cuh"

namespace lola {
namespace cuda {

template void launch_decode<float>(const Params&, bool, cudaStream_t);

}  // namespace cuda
}  // namespace lola
