// The inner loop of column_product.h for AVX512-BF16: a group of columns is a vector, pairs of bf16 are multiplied as they
// are.
#pragma once

#include "../coded.h"
#include "dot_tile.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

constexpr int kColumnTokens = 12;        // at once, as many
constexpr int64_t kTogether = 12, kTogetherCoded = 12;  // with both groups: their sums fit into the registers
constexpr int64_t kColumnPanel = 4096;   // elements of k of a block, to stay in the second-level cache
constexpr int64_t kDecodeTokens = 61;    // from which on coded weights are decoded before the passes over the tokens

using ColumnInput = bf16;  // of packed activations
template <>
struct Packed<bf16_columns> {
  using Type = ColumnInput;
  static constexpr int kStep = 2 * kLanes;
};
template <>
struct Packed<bf16_coded> : Packed<bf16_columns> {};

// The upper bytes of a group's codes.
using UpperBytes = __m512i;
VLLM_MS_INLINE UpperBytes load_upper_bytes(const uint8_t *bytes) { return _mm512_loadu_si512(bytes); }

// A pair of k of all columns of a group.
struct ColumnPairs {
  __m512bh bits;

  static ColumnPairs load(const void *p) { return {load_pairs(p)}; }
  static ColumnPairs load_part(const bf16_columns *p, int64_t rows) {
    const __mmask16 lanes = static_cast<__mmask16>((1u << rows) - 1);
    return {reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi32(lanes, p))};
  }
  void store(void *p) const { _mm512_storeu_si512(p, reinterpret_cast<__m512i>(bits)); }
  // Pair `I` of an octet. Every other byte of what is loaded belongs to another pair: it is where the upper byte goes, or
  // an index for a byte that stays.
  template <int I>
  __attribute__((always_inline)) static ColumnPairs decode(const uint8_t *lower, const uint8_t *codes,
                                                           const UpperBytes &upper) {
    constexpr __mmask64 kUppers = 0xaaaaaaaaaaaaaaaa;
    __m512i code = _mm512_loadu_si512(codes);
    if constexpr (I >= 2) code = _mm512_srli_epi16(code, 4);
    const __m512i lowers = _mm512_loadu_si512(lower);
    return {reinterpret_cast<__m512bh>(_mm512_mask_permutexvar_epi8(lowers, kUppers, code, upper))};
  }
};

struct DecodedPairs : ColumnPairs {
  using Element = bf16_columns;

  static DecodedPairs load(const Element *p) { return {ColumnPairs::load(p)}; }
  static void store(const ColumnPairs &pairs, Element *p) { pairs.store(p); }
};

// Of a token and a group.
struct ColumnSums {
  Vec sum;

  void clear() { sum = zero(); }
  void load(const float *p) { sum = VLLM_MS_ISA::load(p); }
  void store(float *p) const { VLLM_MS_ISA::store(p, sum); }
};

// sums += a pair of the groups times those of `MT` tokens.
template <int MT, class Pairs, int Count>
VLLM_MS_INLINE void add_products(const Pairs (&weights)[Count], const bf16 *const (&bases)[(MT + 2) / 3],
                                 int64_t stride, ColumnSums (&sums)[MT][Count]) {
#pragma GCC unroll 12
  for (int j = 0; j < MT; ++j) {
    const __m512bh pair = repeat_pair(bases[j / 3] + j % 3 * stride);
#pragma GCC unroll 2
    for (int g = 0; g < Count; ++g) sums[j][g].sum = dot_pairs(weights[g].bits, pair, sums[j][g].sum);
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
