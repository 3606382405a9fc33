#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
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
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const char* wish = std::getenv("LOLA_VLLM_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return detect();
  const std::string_view name(wish);
  constexpr std::string_view names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  const auto* const found = std::find(std::begin(names), std::end(names), name);
  LOLA_CHECK(found != std::end(names), "LOLA_VLLM_CPU_ISA = '", wish,
             "': must be baseline, avx2, avx512 or avx512_bf16");
  const Isa limit = static_cast<Isa>(found - std::begin(names));
  return std::min(limit, detect());
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace lola
