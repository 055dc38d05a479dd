// linear.cc's products of bf16 weights on AMX tiles: C = W X, 16 weight rows by 16 tokens, weights read in place.
//
// The sum of a row and a token is always taken in the same order, k ascending by steps of 32, however many tokens there
// are: the column of a tile does not depend on the others.
#pragma once

#include "../parallel.h"
#include "amx.h"
#include "linear_finish.h"
#include "norm_row.h"

#if defined(__AMX_BF16__)

namespace vllm_ms {
namespace VLLM_MS_ISA {

constexpr int64_t kAmxStreamTokens = 160;  // up to here weights go from memory straight to the tiles
constexpr int64_t kAmxMaxTokens = 768;     // packed at once
constexpr int64_t kAmxPanel = 16;          // steps of k of a block of weights that fit into the first-level cache
constexpr int64_t kAmxChunkBlocks = 8;     // blocks whose sums wait between panels, in the second-level cache
constexpr int64_t kAmxPairSums = 4 * kAmxSums;

VLLM_MS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Activations as B tiles: blocks of 16 tokens, the last of fewer, each [steps of k][16 pairs of k][tokens][2].
struct AmxTokens {
  bf16 *data;
  int64_t tokens, steps;

  int64_t blocks() const { return ceil_div(tokens, kAmxRows); }
  int64_t count(int64_t block) const { return min64(kAmxRows, tokens - block * kAmxRows); }
  bf16 *tiles(int64_t block) const { return data + block * steps * kAmxTile; }
  int64_t row_bytes(int64_t block) const { return 4 * count(block); }
  int64_t tile_elements(int64_t block) const { return kAmxDepth * count(block); }
};

VLLM_MS_INLINE void pack_amx_tokens(const LinearArgs &args, int64_t first, const AmxTokens &packed) {
  const NormArgs norm{nullptr,        nullptr,   0,        args.k,          args.norm_weight,
                      args.norm_bias, args.norm, args.eps, args.norm_offset};
  const int64_t width = packed.steps * kAmxDepth;
  constexpr int64_t kElementsPerChunk = 16384;
  parallel_for(packed.blocks(), max64(1, kElementsPerChunk / (kAmxRows * width)), [&](int64_t begin, int64_t end) {
    const Scratch scratch(kAmxRows * width * sizeof(bf16));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t tokens = packed.count(block);
      bf16 *rows = tokens == 1 ? packed.tiles(block) : scratch.as<bf16>();  // a single token's tiles are its row
      for (int64_t t = 0; t < tokens; ++t) {
        bf16 *row = rows + t * width;
        normalise_row(norm, args.x + (first + block * kAmxRows + t) * args.k, [row](int64_t i, Vec v, int64_t n) {
          store_bf16(row + i, v, n);
        });
        std::memset(row + args.k, 0, (width - args.k) * sizeof(bf16));
      }
      if (tokens > 1) tile_rows(rows, packed.steps, tokens, packed.tiles(block));
    }
  });
}

// 32 weight rows as two tiles; where there are 16 or fewer, both are the same.
struct AmxWeights {
  const bf16 *rows[2];
  int64_t counts[2];

  AmxWeights(const LinearArgs &args, const BlockLayout &layout, int64_t block) {
    const bf16 *weight = static_cast<const bf16 *>(args.weight.data);
    const int64_t column = layout.column(block), count = layout.count(block);
    rows[0] = rows[1] = weight + column * args.k;
    counts[0] = counts[1] = min64(count, kAmxRows);
    if (args.activation.gated) {
      rows[1] = weight + (layout.width + column) * args.k;
    } else if (count > kAmxRows) {
      rows[1] += kAmxRows * args.k;
      counts[1] = count - kAmxRows;
    }
  }
};

// Sums of a pair of token blocks, 4 tiles in the order of AmxTiles, as finish_block reads them.
VLLM_MS_INLINE void finish_amx(const LinearArgs &args, const BlockLayout &layout, int64_t block, int64_t first_token,
                               int64_t tokens, const float *tiles) {
  alignas(64) float sums[2 * kAmxRows * kBlock];
  for (int half = 0; half < 2; ++half) {
    for (int64_t from = 0; from < tokens; from += kAmxRows) {
      const float *tile = tiles + (2 * half + from / kAmxRows) * kAmxSums;
      __m512i rows[16];
      for (int i = 0; i < kAmxRows; ++i) rows[i] = _mm512_load_si512(tile + i * kAmxRows);
      transpose16(rows);
      for (int64_t t = 0; t < min64(kAmxRows, tokens - from); ++t) {
        _mm512_store_si512(sums + (from + t) * kBlock + half * kUp, rows[t]);
      }
    }
  }
  finish_block(args, first_token, tokens, layout.column(block), layout.count(block), sums);
}

template <bool second_tokens>
VLLM_MS_INLINE void zero_sums() {
  amx_fence();
  _tile_zero(0);
  _tile_zero(2);
  if (second_tokens) {
    _tile_zero(1);
    _tile_zero(3);
  }
}

template <bool second_tokens>
VLLM_MS_INLINE void load_sums(const float *tiles) {
  amx_fence();
  _tile_loadd(0, tiles, 64);
  _tile_loadd(2, tiles + 2 * kAmxSums, 64);
  if (second_tokens) {
    _tile_loadd(1, tiles + kAmxSums, 64);
    _tile_loadd(3, tiles + 3 * kAmxSums, 64);
  }
}

template <bool second_tokens>
VLLM_MS_INLINE void store_sums(float *tiles) {
  _tile_stored(0, tiles, 64);
  _tile_stored(2, tiles + 2 * kAmxSums, 64);
  if (second_tokens) {
    _tile_stored(1, tiles + kAmxSums, 64);
    _tile_stored(3, tiles + 3 * kAmxSums, 64);
  }
}

// One step of k.
template <bool second_tokens>
VLLM_MS_INLINE void multiply_step(const void *weights0, const void *weights1, int64_t weight_bytes, const void *tokens0,
                                  int64_t bytes0, const void *tokens1, int64_t bytes1) {
  _tile_loadd(6, tokens0, bytes0);
  _tile_loadd(4, weights0, weight_bytes);
  _tile_dpbf16ps(0, 4, 6);
  if (second_tokens) {
    _tile_loadd(7, tokens1, bytes1);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_loadd(5, weights1, weight_bytes);
  _tile_dpbf16ps(2, 5, 6);
  if (second_tokens) _tile_dpbf16ps(3, 5, 7);
}

// Few tokens: each weight is used once, so all that counts is to keep the memory busy. While a block is multiplied the
// next one is brought into the second-level cache, in the order of its addresses.
template <bool second_tokens, class Fetch>
VLLM_MS_INLINE void stream_pair(const AmxWeights &w, int64_t k, const bf16 (&tails)[2][kAmxTile], const AmxTokens &x,
                                int64_t first, Fetch fetch) {
  const int64_t whole = k / kAmxDepth, second = first + (second_tokens ? 1 : 0);
  const int64_t bytes0 = x.row_bytes(first), bytes1 = x.row_bytes(second);
  const bf16 *tokens0 = x.tiles(first), *tokens1 = x.tiles(second);
  zero_sums<second_tokens>();
  for (int64_t step = 0; step < whole; ++step) {
    fetch(step);
    multiply_step<second_tokens>(w.rows[0] + step * kAmxDepth, w.rows[1] + step * kAmxDepth, 2 * k, tokens0, bytes0,
                                 tokens1, bytes1);
    tokens0 += x.tile_elements(first);
    tokens1 += x.tile_elements(second);
  }
  if (whole < x.steps) multiply_step<second_tokens>(tails[0], tails[1], 64, tokens0, bytes0, tokens1, bytes1);
}

VLLM_MS_INLINE void stream_blocks(const LinearArgs &args, const BlockLayout &layout, int64_t first_token,
                                  const AmxTokens &x, int64_t begin, int64_t end) {
  const int64_t whole = args.k / kAmxDepth, rest = args.k % kAmxDepth;
  AmxTiles tiles(kAmxRows, kAmxRows, x.count(0), x.count(x.blocks() > 1 ? 1 : 0));
  alignas(64) float sums[kAmxPairSums];
  alignas(64) bf16 tails[2][kAmxTile];
  const auto fetch = [](const AmxWeights &w, int64_t step) {
    for (int half = 0; half < 2; ++half) {
      const char *from = reinterpret_cast<const char *>(w.rows[half] + step * kAmxTile);
#pragma GCC unroll 16
      for (int line = 0; line < kAmxRows; ++line) __builtin_prefetch(from + 64 * line, 0, 2);
    }
  };
  const AmxWeights head(args, layout, begin);
  for (int64_t step = 0; step < whole; ++step) fetch(head, step);
  for (int64_t block = begin; block < end; ++block) {
    const AmxWeights w(args, layout, block), next(args, layout, block + 1 < end ? block + 1 : block);
    if (rest != 0) {
      std::memset(tails, 0, sizeof(tails));
      for (int half = 0; half < 2; ++half) {
        for (int64_t i = 0; i < w.counts[half]; ++i) {
          std::memcpy(tails[half] + i * kAmxDepth, w.rows[half] + i * args.k + whole * kAmxDepth, 2 * rest);
        }
      }
    }
    for (int64_t first = 0; first < x.blocks(); first += 2) {
      const bool two = first + 1 < x.blocks();
      tiles.set(w.counts[0], w.counts[1], x.count(first), x.count(two ? first + 1 : first));
      const int64_t out_tokens = min64(2 * kAmxRows, x.tokens - first * kAmxRows);
      float *out = args.out + (first_token + first * kAmxRows) * layout.width + layout.column(block);
      const auto fetch_next = [&](int64_t step) {
        if (first == 0) fetch(next, step);
        if (step < out_tokens) {
          __builtin_prefetch(out + step * layout.width, 1, 3);
          __builtin_prefetch(out + step * layout.width + 16, 1, 3);
        }
      };
      if (two) {
        stream_pair<true>(w, args.k, tails, x, first, fetch_next);
        store_sums<true>(sums);
      } else {
        stream_pair<false>(w, args.k, tails, x, first, fetch_next);
        store_sums<false>(sums);
      }
      const int64_t token = first * kAmxRows;
      finish_amx(args, layout, block, first_token + token, min64(2 * kAmxRows, x.tokens - token), sums);
    }
  }
}

// Brings steps [begin, end) of a block's weights into the second-level cache, a few lines at a time.
class AmxFetch {
 public:
  AmxFetch(const AmxWeights &w, int64_t k, int64_t begin, int64_t end)
      : w_(w), stride_(k), begin_(begin * kAmxDepth), end_(min64(end * kAmxDepth, k)), at_(begin_) {}

  void lines(int64_t count) {
    for (; count > 0 && half_ < 2; --count) {
      __builtin_prefetch(w_.rows[half_] + row_ * stride_ + at_, 0, 2);
      at_ += kAmxDepth;
      if (at_ < end_) continue;
      at_ = begin_;
      if (++row_ < w_.counts[half_]) continue;
      row_ = 0;
      ++half_;
    }
  }

 private:
  const AmxWeights w_;
  int64_t stride_, begin_, end_, at_, row_ = 0;
  int half_ = 0;
};

// Steps [begin, end) of a block as tiles one after the other, the first and the second rows in turn.
VLLM_MS_INLINE void pack_panel(const AmxWeights &w, int64_t k, int64_t begin, int64_t end, bf16 *panel) {
  const int64_t whole = min64(end, k / kAmxDepth), rest = k % kAmxDepth;
  for (int half = 0; half < 2; ++half) {
    for (int64_t i = 0; i < kAmxRows; ++i) {
      const bf16 *row = w.rows[half] + min64(i, w.counts[half] - 1) * k;
      bf16 *out = panel + half * kAmxTile + i * kAmxDepth;
      for (int64_t step = begin; step < whole; ++step) {
        _mm512_store_si512(out + (step - begin) * 2 * kAmxTile, _mm512_loadu_si512(row + step * kAmxDepth));
      }
      if (whole < end) {
        const __mmask32 columns = static_cast<__mmask32>((1u << rest) - 1);
        _mm512_store_si512(out + (whole - begin) * 2 * kAmxTile,
                           _mm512_maskz_loadu_epi16(columns, row + whole * kAmxDepth));
      }
    }
  }
}

template <bool second_tokens>
VLLM_MS_INLINE void multiply_panel(const bf16 *panel, int64_t steps, const bf16 *tokens0, int64_t bytes0,
                                   const bf16 *tokens1, int64_t bytes1, AmxFetch &fetch, int64_t lines) {
  for (int64_t step = 0; step < steps; ++step) {
    multiply_step<second_tokens>(panel, panel + kAmxTile, 64, tokens0, bytes0, tokens1, bytes1);
    fetch.lines(lines);
    panel += 2 * kAmxTile;
    tokens0 += 8 * bytes0;
    tokens1 += 8 * bytes1;
  }
}

// Many tokens: panels of weights stay in the first-level cache while all tokens pass, panels of tokens in the second-
// level cache while the chunk's blocks pass.
VLLM_MS_INLINE void reuse_blocks(const LinearArgs &args, const BlockLayout &layout, int64_t first_token,
                                 const AmxTokens &x, int64_t begin, int64_t end) {
  const int64_t pairs = ceil_div(x.blocks(), 2), lines = ceil_div(2 * kAmxRows, pairs);
  const Scratch partial_buffer((end - begin) * pairs * kAmxPairSums * sizeof(float));
  float *partial = partial_buffer.as<float>();
  alignas(64) bf16 panel[2 * kAmxTile * kAmxPanel];
  AmxTiles tiles(kAmxRows, kAmxRows, x.count(0), x.count(x.blocks() > 1 ? 1 : 0));
  for (int64_t from = 0; from < x.steps; from += kAmxPanel) {
    const int64_t to = min64(from + kAmxPanel, x.steps);
    for (int64_t block = begin; block < end; ++block) {
      const AmxWeights w(args, layout, block);
      pack_panel(w, args.k, from, to, panel);
      const bool wraps = block + 1 == end;
      const int64_t next_from = wraps ? to : from;
      AmxFetch fetch(AmxWeights(args, layout, wraps ? begin : block + 1), args.k, next_from,
                     min64(next_from + kAmxPanel, x.steps));
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t first = 2 * pair;
        const bool two = first + 1 < x.blocks();
        const int64_t second = two ? first + 1 : first;
        float *sums = partial + ((block - begin) * pairs + pair) * kAmxPairSums;
        tiles.set(kAmxRows, kAmxRows, x.count(first), x.count(second));
        const bf16 *tokens0 = x.tiles(first) + from * x.tile_elements(first);
        const bf16 *tokens1 = x.tiles(second) + from * x.tile_elements(second);
        const int64_t bytes0 = x.row_bytes(first), bytes1 = x.row_bytes(second);
        if (two) {
          from == 0 ? zero_sums<true>() : load_sums<true>(sums);
          multiply_panel<true>(panel, to - from, tokens0, bytes0, tokens1, bytes1, fetch, next_from < x.steps ? lines : 0);
          store_sums<true>(sums);
        } else {
          from == 0 ? zero_sums<false>() : load_sums<false>(sums);
          multiply_panel<false>(panel, to - from, tokens0, bytes0, tokens1, bytes1, fetch, next_from < x.steps ? lines : 0);
          store_sums<false>(sums);
        }
        if (to == x.steps) {
          const int64_t token = first * kAmxRows;
          finish_amx(args, layout, block, first_token + token, min64(2 * kAmxRows, x.tokens - token), sums);
        }
      }
    }
  }
}

VLLM_MS_INLINE void multiply_amx(const LinearArgs &args, int64_t first_token, const AmxTokens &x) {
  const BlockLayout layout(args);
  constexpr int64_t kWorkPerChunk = 1 << 16;  // weights below which a second thread does not pay
  const int64_t least = ceil_div(kWorkPerChunk, kBlock * args.k);
  const int64_t share = max64(least, min64(kAmxChunkBlocks, layout.blocks / (2 * num_threads())));
  if (x.tokens > kAmxStreamTokens) {
    parallel_for(ceil_div(layout.blocks, share), 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        reuse_blocks(args, layout, first_token, x, chunk * share, min64(layout.blocks, (chunk + 1) * share));
      }
    });
  } else {
    parallel_for(layout.blocks, share, [&](int64_t begin, int64_t end) {
      stream_blocks(args, layout, first_token, x, begin, end);
    });
  }
}

VLLM_MS_INLINE void linear_amx(const LinearArgs &args) {
  const int64_t steps = ceil_div(args.k, kAmxDepth);
  const int64_t tokens = min64(args.m, kAmxMaxTokens);
  const Scratch buffer(ceil_div(tokens, kAmxRows) * steps * kAmxTile * sizeof(bf16));
  for (int64_t first = 0; first < args.m; first += tokens) {
    const AmxTokens x{buffer.as<bf16>(), min64(tokens, args.m - first), steps};
    pack_amx_tokens(args, first, x);
    multiply_amx(args, first, x);
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

#endif
