// bf16 in pairs, as the dot products of AVX512-BF16 take them: what the products and both kinds of attention share.
#pragma once

#include "../vec.h"

#if defined(__AVX512BF16__)

namespace vllm_ms {
namespace VLLM_MS_ISA {

constexpr int64_t kPairs = 2 * kLanes;  // elements of a vector of bf16

VLLM_MS_INLINE __m512bh load_pairs(const void *p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }

// The two elements at `p` in all lanes.
VLLM_MS_INLINE __m512bh repeat_pair(const bf16 *p) {
  int32_t both;
  std::memcpy(&both, p, sizeof(both));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
}

// sum + a . b, lane by lane
VLLM_MS_INLINE Vec dot_pairs(__m512bh a, __m512bh b, Vec sum) {
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
}

// To bf16 by the processor's own rounding, which takes subnormal numbers for zero.
VLLM_MS_INLINE void store_rounded(bf16 *p, Vec v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  std::memcpy(p, &rounded, sizeof(rounded));
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

#endif
