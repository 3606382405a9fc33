// Decode, prefill and update for one instruction set: see cpu/lola_kernels.h.
#include "cpu/lola_kernels.h"

#define LOLA_ONLY_ISA LOLA_AVX512
#define LOLA_KERNEL_BODY "cpu/lola_kernel.h"
#include "cpu/for_each_isa.h"
