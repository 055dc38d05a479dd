// The inner loop of column_product.h for AVX2: a group of columns is two vectors, and of a pair of bf16 each becomes a
// float32 by one shift or one mask, in the lane of its column.
#pragma once

#include "../coded.h"
#include "dot_tile.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

constexpr int kColumnTokens = 6;         // at once, with one group of columns
constexpr int64_t kTogether = 3;         // at once, with both: their sums fit into the registers,
constexpr int64_t kTogetherCoded = 1;    // of which decoding needs some itself
constexpr int64_t kColumnPanel = 1024;   // elements of k of a block; those of the tokens of a pass stay beside it
constexpr int64_t kDecodeTokens = 7;     // from which on coded weights are decoded before the passes over the tokens

using ColumnInput = float;  // of packed activations

// The upper bytes of a group's codes, in both halves.
using UpperBytes = __m256i;
VLLM_MS_INLINE UpperBytes load_upper_bytes(const uint8_t *bytes) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes)));
}

// A pair of k of all columns of a group.
struct ColumnPairs {
  __m256i bits[2];

  static ColumnPairs load(const void *p) {
    const __m256i *vectors = static_cast<const __m256i *>(p);
    return {{_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)}};
  }
  static ColumnPairs load_part(const bf16_columns *p, int64_t rows) {
    alignas(32) bf16_columns padded[kPairElements] = {};
    std::memcpy(padded, p, 2 * rows * sizeof(bf16_columns));
    return load(padded);
  }
  void store(void *p) const {
    __m256i *vectors = static_cast<__m256i *>(p);
    for (int i = 0; i < 2; ++i) _mm256_storeu_si256(vectors + i, bits[i]);
  }
  // Pair `I` of an octet. Every other byte of what is loaded belongs to another pair: it is where the upper byte goes, or
  // an index for a byte that stays.
  template <int I>
  __attribute__((always_inline)) static ColumnPairs decode(const uint8_t *lower, const uint8_t *codes,
                                                           const UpperBytes &upper) {
    const __m256i uppers = _mm256_set1_epi16(static_cast<int16_t>(0xff00)), indices = _mm256_set1_epi8(15);
    ColumnPairs pairs = load(lower), code = load(codes);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if constexpr (I >= 2) code.bits[i] = _mm256_srli_epi16(code.bits[i], 4);
      const __m256i found = _mm256_shuffle_epi8(upper, _mm256_and_si256(code.bits[i], indices));
      pairs.bits[i] = _mm256_blendv_epi8(pairs.bits[i], found, uppers);
    }
    return pairs;
  }
  // Element `Second` of the pairs, of columns [8 * i, 8 * i + 8).
  template <bool Second>
  Vec values(int i) const {
    if constexpr (Second) {
      return reinterpret_cast<Vec>(_mm256_and_si256(bits[i], _mm256_set1_epi32(static_cast<int32_t>(0xffff0000))));
    } else {
      return reinterpret_cast<Vec>(_mm256_slli_epi32(bits[i], 16));
    }
  }
};

// A pair as float32: the columns' first elements, then their second ones. They stay where they are until they are used.
struct DecodedPairs {
  using Element = float;
  const float *elements;

  static DecodedPairs load(const float *p) { return {p}; }
  static void store(const ColumnPairs &pairs, float *p) {
    for (int i = 0; i < 2; ++i) {
      VLLM_MS_ISA::store(p + i * kLanes, pairs.values<false>(i));
      VLLM_MS_ISA::store(p + kColumnGroup + i * kLanes, pairs.values<true>(i));
    }
  }
  template <bool Second>
  Vec values(int i) const {
    return VLLM_MS_ISA::load(elements + Second * kColumnGroup + i * kLanes);
  }
};

// Of a token and a group.
struct ColumnSums {
  Vec sum[2];

  void clear() { sum[0] = sum[1] = zero(); }
  void load(const float *p) {
    for (int i = 0; i < 2; ++i) sum[i] = VLLM_MS_ISA::load(p + i * kLanes);
  }
  void store(float *p) const {
    for (int i = 0; i < 2; ++i) VLLM_MS_ISA::store(p + i * kLanes, sum[i]);
  }
};

template <bool Second, int MT, class Pairs, int Count>
VLLM_MS_INLINE void add_elements(const Pairs (&weights)[Count], const float *const (&bases)[(MT + 2) / 3],
                                 int64_t stride, ColumnSums (&sums)[MT][Count]) {
  Vec values[Count][2];
#pragma GCC unroll 2
  for (int g = 0; g < Count; ++g) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) values[g][i] = weights[g].template values<Second>(i);
  }
#pragma GCC unroll 6
  for (int j = 0; j < MT; ++j) {
    const Vec x = set1(bases[j / 3][j % 3 * stride + Second]);
#pragma GCC unroll 2
    for (int g = 0; g < Count; ++g) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) sums[j][g].sum[i] = fma(values[g][i], x, sums[j][g].sum[i]);
    }
  }
}

// sums += a pair of the groups times those of `MT` tokens.
template <int MT, class Pairs, int Count>
VLLM_MS_INLINE void add_products(const Pairs (&weights)[Count], const float *const (&bases)[(MT + 2) / 3],
                                 int64_t stride, ColumnSums (&sums)[MT][Count]) {
  add_elements<false, MT>(weights, bases, stride, sums);
  add_elements<true, MT>(weights, bases, stride, sums);
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
