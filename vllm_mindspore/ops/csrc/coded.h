// Weights in columns (columns.h) of which a bf16 takes 12 bits instead of 16, and loses none: of its exponent's 256
// values the weights of a group use few, so that 4 bits say which one it is. For few tokens a product takes as long as
// reading its weight.
//
// A group of kColumnGroup rows keeps its place in memory, of which it uses three quarters and a little more. In it come
//   [k / 4][2][16][2] uint8   sign and mantissa, in the order of the columns: of a quad of k two pairs of all rows
//   [k / 4][16][2]    uint8   codes, the lower half of the quad's first pair, the upper half of its second
//   [32]              uint16  the exponents of the codes, in their place in a bf16; twice, so that a fifth bit of an
//                             index does not matter
//   CodedException[]          elements with another exponent, by ascending k; the last is kNoMore
// n is in whole groups, k in quads.
#pragma once

#include <cstdint>

#include "columns.h"

namespace vllm_ms {

constexpr int64_t kQuad = 4;
constexpr int64_t kPairElements = 2 * kColumnGroup;
constexpr int64_t kQuadElements = 2 * kPairElements;

struct CodedException {
  static constexpr uint32_t kNoMore = 0xffffffff;
  uint32_t k;      // of its pair
  uint16_t place;  // among the pair's elements: [16][2]
  uint16_t bits;
};

// Where the parts of a group are.
struct CodedGroup {
  const uint8_t *mantissas, *codes;
  const uint16_t *exponents;
  const CodedException *exceptions;

  CodedGroup(const void *group, int64_t k)
      : mantissas(static_cast<const uint8_t *>(group)),
        codes(mantissas + kColumnGroup * k),
        exponents(reinterpret_cast<const uint16_t *>(codes + kColumnGroup * k / 2)),
        exceptions(reinterpret_cast<const CodedException *>(exponents + 32)) {}

  // Of an element of the pair of k, if that is no exception.
  uint16_t bits(int64_t k, int64_t place) const {
    const uint8_t mantissa = mantissas[k / 2 * kPairElements + place];
    const uint8_t both = codes[k / kQuad * kPairElements + place];
    const uint8_t code = k % kQuad < 2 ? both & 15 : both >> 4;
    return static_cast<uint16_t>((mantissa & 0x80) << 8 | (mantissa & 0x7f) | exponents[code]);
  }
};

// Bytes of a group that are read for its product, if it has no exceptions.
constexpr int64_t coded_bytes(int64_t k) { return 3 * kColumnGroup * k / 2 + 32 * sizeof(uint16_t) + sizeof(CodedException); }

// Codes `matrices` matrices [n, k] that are in columns, in place. Returns false and leaves them as they are where that
// does not fit or there are so many exceptions that it would not pay.
bool encode_columns(bf16_columns *weight, int64_t matrices, int64_t n, int64_t k);

// Back into columns.
void decode_columns(bf16_columns *weight, int64_t matrices, int64_t n, int64_t k);

}  // namespace vllm_ms
