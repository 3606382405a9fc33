// What the kernel headers are compiled for.
//
// Kernels exist once per instruction set. A source that compiles them (kernels_avx2.cpp and its
// like) defines, before it includes anything:
//
//   LOLA_ISA         namespace of the kernels within lola; default: baseline
//   LOLA_VEC_BYTES   bytes of a vector register; default: 16
//   LOLA_TARGET      compiler features as target() takes them; default: those of the build
//   LOLA_BF16_DOTS   1 where the set multiplies pairs of bfloat16
//
// A kernel header has its own includes first and its code between LOLA_BEGIN_TARGET() and
// LOLA_END_TARGET(), in the anonymous namespace of lola::LOLA_ISA. The compiler is told the
// instruction set by pragma and not by a flag, so the build needs no flags per file.
//
// Two rules keep code for a newer machine out of what an older one runs. Nothing is included
// between the two macros: the linker keeps one copy of an inline function, and could keep one that
// this machine cannot execute. And kernels use neither the standard library's templates, for the
// same reason, nor lambdas, which do not take the pragma's target on GCC.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef LOLA_ISA
#define LOLA_ISA baseline
#define LOLA_VEC_BYTES 16
#endif
#ifndef LOLA_BF16_DOTS
#define LOLA_BF16_DOTS 0
#endif

#define LOLA_INLINE inline __attribute__((always_inline))

// The macros end in a declaration, so that they are followed by a semicolon as calls are.
#define LOLA_PRAGMA_TEXT(...) _Pragma(#__VA_ARGS__)
#define LOLA_PRAGMA(...) LOLA_PRAGMA_TEXT(__VA_ARGS__)  // expands LOLA_TARGET first
#if !defined(LOLA_TARGET)
#define LOLA_BEGIN_TARGET() static_assert(true)
#define LOLA_END_TARGET() static_assert(true)
#elif defined(__clang__)
#define LOLA_BEGIN_TARGET()                                                                    \
  LOLA_PRAGMA(clang attribute push(__attribute__((target(LOLA_TARGET))), apply_to = function)) \
  static_assert(true)
#define LOLA_END_TARGET() LOLA_PRAGMA(clang attribute pop) static_assert(true)
#else
#define LOLA_BEGIN_TARGET()            \
  LOLA_PRAGMA(GCC push_options)        \
  LOLA_PRAGMA(GCC target(LOLA_TARGET)) \
  static_assert(true)
#define LOLA_END_TARGET() LOLA_PRAGMA(GCC pop_options) static_assert(true)
#endif
