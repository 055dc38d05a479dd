// Weights in columns (columns.h) of which a bf16 takes 12 bits instead of 16, and loses none: the weights of a group have
// few of a byte's 256 values in their upper bytes, which are the sign and most of the exponent, so that 4 bits say which
// one it is. For few tokens a product takes as long as reading its weight.
//
// A group of kColumnGroup rows keeps its place in memory, of which it uses three quarters and a little more. In it come
//   [k / 4][32][2] uint8  lower bytes: of a quad of k those of the first pair of all rows beside those of the second
//   [k / 8][32][2] uint8  codes of an octet's four pairs: in a lower half those of the second beside those of the first,
//                         in the upper half those of the fourth beside those of the third
//   [4][16]        uint8  the upper bytes of the codes, four times: two more bits of an index do not matter
//   CodedException[]      elements with another upper byte, by ascending k; the last is kNoMore
// n is in whole groups, k in octets.
#pragma once

#include <cstdint>

#include "columns.h"

namespace vllm_ms {

constexpr int64_t kOctet = 8;
constexpr int64_t kPairElements = 2 * kColumnGroup;
constexpr int64_t kUpperBytes = 64;  // of a group's table

struct CodedException {
  static constexpr uint32_t kNoMore = 0xffffffff;
  uint32_t k;      // of its pair
  uint16_t place;  // among the pair's elements: [16][2]
  uint16_t bits;
};

// Where the parts of a group are.
struct CodedGroup {
  const uint8_t *lower, *codes, *upper;
  const CodedException *exceptions;

  CodedGroup(const void *group, int64_t k)
      : lower(static_cast<const uint8_t *>(group)),
        codes(lower + kColumnGroup * k),
        upper(codes + kColumnGroup * k / 2),
        exceptions(reinterpret_cast<const CodedException *>(upper + kUpperBytes)) {}

  // Where the lower byte of an element of pair `pair` is, and the byte that has its code: shifted by code_shift(pair).
  static int64_t lower_at(int64_t pair, int64_t place) {
    return pair / 2 * 2 * kPairElements + 2 * place + pair % 2;
  }
  static int64_t code_at(int64_t pair, int64_t place) {
    return pair / 4 * 2 * kPairElements + 2 * place + 1 - pair % 2;
  }
  static int code_shift(int64_t pair) { return pair % 4 < 2 ? 0 : 4; }

  // Of an element of the pair of k, if that is no exception.
  uint16_t bits(int64_t k, int64_t place) const {
    const int64_t pair = k / 2;
    const int code = codes[code_at(pair, place)] >> code_shift(pair) & 15;
    return static_cast<uint16_t>(upper[code] << 8 | lower[lower_at(pair, place)]);
  }
};

// Bytes of a group that are read for its product, if it has no exceptions.
constexpr int64_t coded_bytes(int64_t k) { return 3 * kColumnGroup * k / 2 + kUpperBytes + sizeof(CodedException); }

// Codes `matrices` matrices [n, k] that are in columns, in place. Returns false and leaves them as they are where that
// does not fit or there are so many exceptions that it would not pay.
bool encode_columns(bf16_columns *weight, int64_t matrices, int64_t n, int64_t k);

// Back into columns.
void decode_columns(bf16_columns *weight, int64_t matrices, int64_t n, int64_t k);

}  // namespace vllm_ms
