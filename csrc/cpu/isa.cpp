#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "checks.h"

namespace lola {
namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const char* wish = std::getenv("LOLA_VLLM_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return detect();
  const std::string_view name(wish);
  LOLA_CHECK(name == "baseline" || name == "avx2" || name == "avx512", "LOLA_VLLM_CPU_ISA = '",
             wish, "': must be baseline, avx2 or avx512");
  const Isa limit = name == "avx512" ? Isa::avx512 : name == "avx2" ? Isa::avx2 : Isa::baseline;
  return std::min(limit, detect());
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace lola
