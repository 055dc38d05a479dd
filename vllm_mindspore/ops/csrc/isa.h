// Kernel variants by instruction set, and the choice between them at run time.
//
// Every file in kernels/ is compiled once per instruction set with -DVLLM_MS_ISA=<portable|avx2|avx512|amx> and puts its
// code into `namespace vllm_ms { namespace VLLM_MS_ISA {`. Its header declares each entry point once with
// VLLM_MS_DECLARE_KERNEL, which declares all variants and a dispatching function of the same name in vllm_ms.
//
// One rule keeps this sound: a kernel file must not instantiate inline functions or templates that are shared between
// variants (std::vector, std::function, ...): the linker would keep one copy, perhaps the AVX-512 one, for all. Helpers
// in vec.h and dtype.h live in the variant's namespace or are forced inline. tests/ops/test_build.py checks the objects.
#pragma once

namespace vllm_ms {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The variant in use: the best one of this CPU, or the one named by VLLM_MS_CPU_ISA. Throws std::runtime_error when
// that name is unknown or the CPU or the build lacks it.
Isa isa();
const char *isa_name(Isa isa);
bool isa_supported(Isa isa);  // by this CPU and this build

// For tests: use `isa` from now on.
void set_isa(Isa isa);

}  // namespace vllm_ms

#define VLLM_MS_INLINE static inline __attribute__((always_inline))

#ifdef VLLM_MS_HAVE_AVX2
#define VLLM_MS_AVX2_DECLARE(name, Args) \
  namespace avx2 {                       \
  void name(const Args &args);           \
  }
#define VLLM_MS_AVX2_CASE(name) \
  case Isa::avx2:               \
    return avx2::name(args);
#else
#define VLLM_MS_AVX2_DECLARE(name, Args)
#define VLLM_MS_AVX2_CASE(name)
#endif

#ifdef VLLM_MS_HAVE_AVX512
#define VLLM_MS_AVX512_DECLARE(name, Args) \
  namespace avx512 {                       \
  void name(const Args &args);             \
  }
#define VLLM_MS_AVX512_CASE(name) \
  case Isa::avx512:               \
    return avx512::name(args);
#else
#define VLLM_MS_AVX512_DECLARE(name, Args)
#define VLLM_MS_AVX512_CASE(name)
#endif

#ifdef VLLM_MS_HAVE_AMX
#define VLLM_MS_AMX_DECLARE(name, Args) \
  namespace amx {                       \
  void name(const Args &args);          \
  }
#define VLLM_MS_AMX_CASE(name) \
  case Isa::amx:               \
    return amx::name(args);
#else
#define VLLM_MS_AMX_DECLARE(name, Args)
#define VLLM_MS_AMX_CASE(name)
#endif

// Inside namespace vllm_ms: declares `void name(const Args &)` for every variant built, and the dispatcher.
#define VLLM_MS_DECLARE_KERNEL(name, Args)             \
  namespace portable {                                 \
  void name(const Args &args);                         \
  }                                                    \
  VLLM_MS_AVX2_DECLARE(name, Args)                     \
  VLLM_MS_AVX512_DECLARE(name, Args)                   \
  VLLM_MS_AMX_DECLARE(name, Args)                      \
  VLLM_MS_INLINE void name(const Args &args) {         \
    switch (isa()) {                                   \
      VLLM_MS_AMX_CASE(name)                           \
      VLLM_MS_AVX512_CASE(name)                        \
      VLLM_MS_AVX2_CASE(name)                          \
      default:                                         \
        return portable::name(args);                   \
    }                                                  \
  }
