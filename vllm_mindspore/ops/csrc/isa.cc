#include "isa.h"

#if defined(VLLM_MS_HAVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace vllm_ms {
namespace {

std::atomic<int> chosen{-1};

constexpr Isa kAll[] = {Isa::amx, Isa::avx512, Isa::avx2, Isa::portable};  // best first

bool built(Isa isa) {
  switch (isa) {
#ifdef VLLM_MS_HAVE_AMX
    case Isa::amx:
      return true;
#endif
#ifdef VLLM_MS_HAVE_AVX512
    case Isa::avx512:
      return true;
#endif
#ifdef VLLM_MS_HAVE_AVX2
    case Isa::avx2:
      return true;
#endif
    case Isa::portable:
      return true;
    default:
      return false;
  }
}

#ifdef VLLM_MS_HAVE_AMX
// Linux gives a process the tiles' registers when it asks for them.
bool tiles_permitted() {
  constexpr int kArchRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchRequestPermission, kTileData) == 0;
}
#endif

bool cpu_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (isa == Isa::avx512) {
    return cpu_has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vnni");
  }
#endif
#ifdef VLLM_MS_HAVE_AMX
  if (isa == Isa::amx) {
    return cpu_has(Isa::avx512) && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           tiles_permitted();
  }
#endif
  return isa == Isa::portable;
}

Isa choose() {
  const char *wanted = std::getenv("VLLM_MS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    for (Isa isa : kAll) {
      if (isa_supported(isa)) return isa;
    }
  }
  for (Isa isa : kAll) {
    if (std::strcmp(wanted, isa_name(isa)) != 0) continue;
    if (!built(isa)) throw std::runtime_error(std::string("VLLM_MS_CPU_ISA=") + wanted + ": not in this build");
    if (!cpu_has(isa)) throw std::runtime_error(std::string("VLLM_MS_CPU_ISA=") + wanted + ": this CPU lacks it");
    return isa;
  }
  throw std::runtime_error(std::string("VLLM_MS_CPU_ISA=") + wanted + ": expected portable, avx2, avx512 or amx");
}

}  // namespace

const char *isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

bool isa_supported(Isa isa) { return built(isa) && cpu_has(isa); }

Isa isa() {
  int current = chosen.load(std::memory_order_relaxed);
  if (current < 0) {
    current = static_cast<int>(choose());
    chosen.store(current, std::memory_order_relaxed);
  }
  return static_cast<Isa>(current);
}

void set_isa(Isa isa) {
  if (!isa_supported(isa)) throw std::runtime_error(std::string(isa_name(isa)) + ": not supported here");
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
}

}  // namespace vllm_ms
