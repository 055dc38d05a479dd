// The inner kernel of linear_quantized.cc: products of 16 weight rows and one token's activations over one group of k,
// as integers. A token's values are 16 bits in the order that the instruction set's products want them.
#pragma once

#include "../vec.h"
#include "quantized_weight.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

constexpr int kQuantParts = kQuantRows / kLanes;  // vectors of a tile's rows
constexpr float kTokenLargest = 32512.0f;         // of a quantized activation: its upper byte, rounded, is at most 127

#if defined(__AVX512VNNI__)

constexpr int kDotTiles = 2;   // tiles of weights at once
constexpr int kDotTokens = 4;  // tokens at once; 5 and 6 were a third slower on Zen 4

// A value is 256 * high + low, both signed bytes: all high ones, then all low ones.
VLLM_MS_INLINE void store_token(uint8_t *token, int64_t depth, int64_t k, IVec values) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  const IVec high = (values + 128) >> 8, low = values - (high << 8);
  const Bytes high_bytes = __builtin_convertvector(high, Bytes), low_bytes = __builtin_convertvector(low, Bytes);
  const int64_t count = depth - k < kLanes ? depth - k : kLanes;
  std::memcpy(token + k, &high_bytes, count);
  std::memcpy(token + depth + k, &low_bytes, count);
}

// 4 values of k of 16 rows, unsigned bytes.
struct WeightStep {
  __m512i bytes;
};

template <int bits>
VLLM_MS_INLINE void load_steps(const uint8_t *tile, int64_t k, WeightStep (&steps)[2]) {
  if (bits == 4) {
    const __m512i both = _mm512_loadu_si512(tile + k * (kQuantRows / 2)), low = _mm512_set1_epi8(15);
    steps[0].bytes = _mm512_and_si512(both, low);
    steps[1].bytes = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
  } else {
    steps[0].bytes = _mm512_loadu_si512(tile + k * kQuantRows);
    steps[1].bytes = _mm512_loadu_si512(tile + k * kQuantRows + 64);
  }
}

struct TokenStep {
  __m512i high, low;
};

VLLM_MS_INLINE TokenStep load_token(const uint8_t *token, int64_t depth, int64_t k) {
  int32_t high, low;
  std::memcpy(&high, token + k, 4);
  std::memcpy(&low, token + depth + k, 4);
  return {_mm512_set1_epi32(high), _mm512_set1_epi32(low)};
}

struct DotSums {
  __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
};

VLLM_MS_INLINE void add(const WeightStep &w, const TokenStep &x, DotSums *sums) {
  sums->high = _mm512_dpbusd_epi32(sums->high, w.bytes, x.high);
  sums->low = _mm512_dpbusd_epi32(sums->low, w.bytes, x.low);
}

VLLM_MS_INLINE void total(const DotSums &sums, IVec (&rows)[kQuantParts]) {
  rows[0] = reinterpret_cast<IVec>(_mm512_add_epi32(_mm512_slli_epi32(sums.high, 8), sums.low));
}

#else

constexpr int kDotTiles = 1;
constexpr int kDotTokens = 3;

// 16-bit values, of every 4 the first and third, then the second and fourth: as bytes split into even and odd ones.
VLLM_MS_INLINE void store_token(uint8_t *token, int64_t depth, int64_t k, IVec values) {
  int16_t *out = reinterpret_cast<int16_t *>(token);
  for (int64_t i = 0; i < kLanes && k + i < depth; ++i) {
    const int64_t at = (k + i) & 3;
    out[((k + i) & ~int64_t{3}) + (at >> 1 | (at & 1) << 1)] = static_cast<int16_t>(values[i]);
  }
}

struct WeightStep {
  UVec bytes[kQuantParts];
};

template <int bits>
VLLM_MS_INLINE void load_steps(const uint8_t *tile, int64_t k, WeightStep (&steps)[2]) {
  const uint8_t *bytes = tile + k * kQuantRows * bits / 8;
#pragma GCC unroll 4
  for (int part = 0; part < kQuantParts; ++part) {
    std::memcpy(&steps[0].bytes[part], bytes + part * sizeof(UVec), sizeof(UVec));
    if (bits == 4) {
      steps[1].bytes[part] = steps[0].bytes[part] >> 4 & 0x0f0f0f0fu;
      steps[0].bytes[part] &= 0x0f0f0f0fu;
    } else {
      std::memcpy(&steps[1].bytes[part], bytes + (part + kQuantParts) * sizeof(UVec), sizeof(UVec));
    }
  }
}

struct TokenStep {
  int16_t values[4];
};

VLLM_MS_INLINE TokenStep load_token(const uint8_t *token, int64_t, int64_t k) {
  TokenStep x;
  std::memcpy(x.values, token + 2 * k, sizeof(x.values));
  return x;
}

struct DotSums {
  IVec rows[kQuantParts] = {};
};

#if defined(__AVX2__)

VLLM_MS_INLINE IVec pair_products(UVec w, const int16_t *x) {
  int32_t pair;
  std::memcpy(&pair, x, 4);
  return reinterpret_cast<IVec>(_mm256_madd_epi16(reinterpret_cast<__m256i>(w), _mm256_set1_epi32(pair)));
}

#else

VLLM_MS_INLINE IVec pair_products(UVec w, const int16_t *x) {
  return reinterpret_cast<IVec>(w & 0xffffu) * x[0] + reinterpret_cast<IVec>(w >> 16) * x[1];
}

#endif

VLLM_MS_INLINE void add(const WeightStep &w, const TokenStep &x, DotSums *sums) {
#pragma GCC unroll 4
  for (int part = 0; part < kQuantParts; ++part) {
    const UVec even = w.bytes[part] & 0x00ff00ffu, odd = w.bytes[part] >> 8 & 0x00ff00ffu;
    sums->rows[part] += pair_products(even, x.values) + pair_products(odd, x.values + 2);
  }
}

VLLM_MS_INLINE void total(const DotSums &sums, IVec (&rows)[kQuantParts]) {
#pragma GCC unroll 4
  for (int part = 0; part < kQuantParts; ++part) rows[part] = sums.rows[part];
}

#endif

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
