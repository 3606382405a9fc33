// Decode on pages of f16 keys and values; a file of its own, so that the three build at once.
#include "cuda/decode_kernel.cuh"

namespace lola {
namespace cuda {

template void launch_decode<F16>(const Params&, bool, cudaStream_t);

}  // namespace cuda
}  // namespace lola
