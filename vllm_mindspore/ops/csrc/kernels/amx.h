// AMX tiles: 16 rows of 64 bytes. A product is C[i][j] += sum over k of A[i][k] B[k][j] for 16 rows i, 32 bf16 k and 16
// columns j, where B holds pairs of k next to each other. Only for files of the amx variant.
#pragma once

#include "pairs.h"

#if defined(__AMX_BF16__)

namespace vllm_ms {
namespace VLLM_MS_ISA {

constexpr int kAmxRows = 16;                      // of a tile; also its columns of 4 bytes
constexpr int kAmxDepth = 32;                     // bf16 of a row
constexpr int kAmxTile = kAmxRows * kAmxDepth;    // bf16 of a tile: 1 KB
constexpr int kAmxSums = kAmxRows * kAmxRows;     // floats of a tile

// GCC does not know that tile instructions read memory: between ordinary stores and a tile that loads what they stored.
VLLM_MS_INLINE void amx_fence() { asm volatile("" ::: "memory"); }

// Shapes of the 8 tiles for the present thread, in force until it goes out of scope.
//   0..3  sums: (first, first), (first, second), (second, first), (second, second)
//   4, 5  first and second 16 weight rows
//   6, 7  first and second 16 tokens
class AmxTiles {
 public:
  AmxTiles(int64_t first_rows, int64_t second_rows, int64_t first_tokens, int64_t second_tokens) {
    set(first_rows, second_rows, first_tokens, second_tokens);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles &) = delete;
  AmxTiles &operator=(const AmxTiles &) = delete;

  // Forgets what the tiles hold. All counts are 1 to 16.
  void set(int64_t first_rows, int64_t second_rows, int64_t first_tokens, int64_t second_tokens) {
    amx_fence();
    const int64_t wanted[4] = {first_rows, second_rows, first_tokens, second_tokens};
    if (std::memcmp(wanted, present_, sizeof(wanted)) == 0) return;
    std::memcpy(present_, wanted, sizeof(wanted));
    alignas(64) Config config;
    std::memset(&config, 0, sizeof(config));
    config.palette = 1;
    for (int tile = 0; tile < 4; ++tile) {
      config.rows[tile] = tile < 2 ? first_rows : second_rows;
      config.row_bytes[tile] = 4 * (tile % 2 == 0 ? first_tokens : second_tokens);
    }
    for (int i = 0; i < 2; ++i) {
      config.rows[4 + i] = wanted[i];
      config.row_bytes[4 + i] = 64;
      config.rows[6 + i] = kAmxRows;
      config.row_bytes[6 + i] = 4 * wanted[2 + i];
    }
    amx_fence();
    _tile_loadconfig(&config);
  }

 private:
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64, "layout of LDTILECFG");
  int64_t present_[4] = {};
};

// Rows [count][steps * 32], count up to 16, as B tiles: [steps][16 pairs of k][count][2].
VLLM_MS_INLINE void tile_rows(const bf16 *rows, int64_t steps, int64_t count, bf16 *tiles) {
  const __mmask16 columns = static_cast<__mmask16>((1u << count) - 1);
  for (int64_t step = 0; step < steps; ++step) {
    __m512i pairs[16];
    for (int64_t t = 0; t < kAmxRows; ++t) {
      pairs[t] = t < count ? _mm512_loadu_si512(rows + (t * steps + step) * kAmxDepth) : _mm512_setzero_si512();
    }
    transpose16(pairs);
    bf16 *tile = tiles + step * kAmxDepth * count;
    for (int64_t pair = 0; pair < 16; ++pair) _mm512_mask_storeu_epi32(tile + 2 * pair * count, columns, pairs[pair]);
  }
}

// v rounded to bf16 at p[0 .. n - 1].
VLLM_MS_INLINE void store_bf16(bf16 *p, Vec v, int64_t n = kLanes) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), rounded);
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

#endif
