// How quantized weights lie in memory, and their making.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../isa.h"

namespace vllm_ms {

constexpr int64_t kQuantRows = 16;    // weight rows of a tile: side by side, so that a vector's lanes are rows
constexpr int64_t kQuantGroup = 128;  // values of k with one scale: of an int4 row, and of a token's activations
constexpr int64_t kQuantDepth = 8;    // k is padded to multiples of this

VLLM_MS_INLINE int64_t quant_units(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// W [n, k] ~ (stored value - zero) * scale, in tiles of 16 rows, zeros beyond n and k:
//   int8: values [tiles][padded k / 4][16 rows][4 of k] bytes; zero 128; scales [tiles][1][16 rows]
//   int4: values [tiles][padded k / 8][16 rows][4 of k] bytes, the low half k ... k + 3, the high half k + 4 ... k + 7;
//         zero 8; scales [tiles][groups of k][16 rows]
struct QuantizedWeight {
  const uint8_t *values;
  const float *scales;
  int bits;  // 8 or 4
};

VLLM_MS_INLINE int64_t quant_tiles(int64_t n) { return quant_units(n, kQuantRows); }
VLLM_MS_INLINE int64_t quant_depth(int64_t k) { return quant_units(k, kQuantDepth) * kQuantDepth; }
VLLM_MS_INLINE int64_t quant_scales(int64_t k, int bits) { return bits == 4 ? quant_units(k, kQuantGroup) : 1; }
VLLM_MS_INLINE int64_t quant_tile_bytes(int64_t k, int bits) { return quant_depth(k) * kQuantRows * bits / 8; }

// Quantizes weight [n, k] into `values` and `scales`. Symmetric and rounded to nearest; int8: the scale of a row takes
// its largest value to 127; int4: that of a group is, of several near its largest value / 8, the one with the least
// squared error. A row that is not finite gets a scale that is not a number.
struct QuantizeArgs {
  Weight weight;
  int64_t n, k;
  int bits;
  uint8_t *values;
  float *scales;
};

VLLM_MS_DECLARE_KERNEL(quantize_weight, QuantizeArgs)

}  // namespace vllm_ms
