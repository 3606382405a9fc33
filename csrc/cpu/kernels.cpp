#include "cpu/kernels.h"

#include "cpu/isa.h"

namespace lola {

// kernels_baseline.cpp and its like define these.
namespace baseline {
const Kernels& kernels(DType kv_dtype);
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels(DType kv_dtype);
}
namespace avx512 {
const Kernels& kernels(DType kv_dtype);
}
namespace avx512_bf16 {
const Kernels& kernels(DType kv_dtype);
}
#endif

const Kernels& kernels(DType kv_dtype) {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::avx512_bf16:
      return avx512_bf16::kernels(kv_dtype);
    case Isa::avx512:
      return avx512::kernels(kv_dtype);
    case Isa::avx2:
      return avx2::kernels(kv_dtype);
    case Isa::baseline:
      break;
  }
#endif
  return baseline::kernels(kv_dtype);
}

}  // namespace lola
