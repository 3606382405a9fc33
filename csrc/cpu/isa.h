// Which instruction set the CPU kernels run on, decided once per process.
#pragma once

namespace lola {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best set that this machine has, or the lower one that the environment variable
// LOLA_VLLM_CPU_ISA ("baseline", "avx2", "avx512", "avx512_bf16") asks for. Throws on any other
// value.
Isa cpu_isa();

}  // namespace lola
