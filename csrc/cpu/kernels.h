// The kernels of decode, prefill and update, once per instruction set. Each set is compiled in a
// source of its own (kernels_avx2.cpp and its like), so that a build uses several cores.
#pragma once

#include "cpu/call.h"
#include "cpu/scheduler.h"

namespace lola {

// Entry points of one instruction set; cpu/kernels_impl.h defines them.
struct Kernels {
  int64_t (*scratch)(const LolaArgs&, Phase);
  void (*decode)(const LolaArgs&, int64_t rows, const Indices& seq_lens, Turns&, char* memory);
  void (*sequence)(const LolaArgs&, const Sequence*, int64_t begin, int64_t end, char* memory);
  StreamKernels streams;
};

namespace baseline {
Kernels lola_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
Kernels lola_kernels();
}
namespace avx512 {
Kernels lola_kernels();
}
namespace avx512_bf16 {
Kernels lola_kernels();
}
#else
namespace avx2 = baseline;
namespace avx512 = baseline;
namespace avx512_bf16 = baseline;
#endif

}  // namespace lola
