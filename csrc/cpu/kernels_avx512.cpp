// The kernels for AVX-512.
#if defined(__x86_64__)

#define LOLA_ISA avx512
#define LOLA_VEC_BYTES 64
#define LOLA_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#include "cpu/kernels_impl.h"

#endif
