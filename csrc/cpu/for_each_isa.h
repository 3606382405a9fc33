// Compiles the kernel body named by LOLA_KERNEL_BODY once per instruction set, in the namespaces
// lola::baseline, lola::avx2, lola::avx512 and lola::avx512_bf16 (which also defines
// LOLA_BF16_DOTS). No include guard: every kernel includes it once. A source that defines
// LOLA_ONLY_ISA compiles one of them, and others of its kind the rest at the same time.
//
// The compiler is told the instruction set by pragma rather than by a flag, so one wheel holds all
// of them and no build system needs per-file flags. Nothing from the standard library may be
// included or instantiated inside the regions: the linker keeps one copy of an inline function and
// could pick one that this machine cannot execute. For the same reason bodies use no lambdas,
// which do not take the pragma's target on GCC.
#include <cstdint>

#include "cpu/types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LOLA_INLINE inline __attribute__((always_inline))

#define LOLA_BASELINE 1
#define LOLA_AVX2 2
#define LOLA_AVX512 3
#define LOLA_AVX512_BF16 4
#ifndef LOLA_ONLY_ISA
#define LOLA_ONLY_ISA 0  // all of them
#endif
#define LOLA_WANTED(isa) (LOLA_ONLY_ISA == 0 || LOLA_ONLY_ISA == (isa))

#if LOLA_WANTED(LOLA_BASELINE)
#define LOLA_ISA baseline
#define LOLA_VEC_BYTES 16
#include "cpu/vec.h"
#include LOLA_KERNEL_BODY
#undef LOLA_ISA
#undef LOLA_VEC_BYTES
#endif

#if defined(__x86_64__)

#if LOLA_WANTED(LOLA_AVX2)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LOLA_ISA avx2
#define LOLA_VEC_BYTES 32
#include "cpu/vec.h"
#include LOLA_KERNEL_BODY
#undef LOLA_ISA
#undef LOLA_VEC_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if LOLA_WANTED(LOLA_AVX512)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define LOLA_ISA avx512
#define LOLA_VEC_BYTES 64
#include "cpu/vec.h"
#include LOLA_KERNEL_BODY
#undef LOLA_ISA
#undef LOLA_VEC_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if LOLA_WANTED(LOLA_AVX512_BF16)
#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
#define LOLA_ISA avx512_bf16
#define LOLA_BF16_DOTS 1
#define LOLA_VEC_BYTES 64
#include "cpu/vec.h"
#include LOLA_KERNEL_BODY
#undef LOLA_ISA
#undef LOLA_VEC_BYTES
#undef LOLA_BF16_DOTS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#else  // one set only: let callers name all
namespace lola {
namespace avx2 = baseline;
namespace avx512 = baseline;
namespace avx512_bf16 = baseline;
}  // namespace lola
#endif

#undef LOLA_KERNEL_BODY
