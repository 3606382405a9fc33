// The kernels for AVX2 with fused multiply-add.
#if defined(__x86_64__)

#define LOLA_ISA avx2
#define LOLA_VEC_BYTES 32
#define LOLA_TARGET "avx2,fma"
#include "cpu/kernels_impl.h"

#endif
