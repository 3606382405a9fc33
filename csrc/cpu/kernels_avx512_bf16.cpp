// The kernels for AVX-512 with products of bfloat16.
#if defined(__x86_64__)

#define LOLA_ISA avx512_bf16
#define LOLA_VEC_BYTES 64
#define LOLA_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#define LOLA_BF16_DOTS 1
#include "cpu/kernels_impl.h"

#endif
