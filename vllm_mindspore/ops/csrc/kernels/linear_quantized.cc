#include "linear_quantized.h"

#include "../parallel.h"
#include "linear_finish.h"
#include "norm_row.h"
#include "quantized_dot.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

constexpr int64_t kPanelBytes = 16 << 10;   // of weights, to stay in the first-level cache
constexpr int64_t kPackedBytes = 512 << 10; // of packed activations, to stay in the second-level cache
constexpr int64_t kMinTokens = 24;
constexpr int64_t kMaxTokens = 768;
constexpr float kRound = 12582912.0f;       // 1.5 * 2^23: added and subtracted, it rounds to the nearest integer

// Quantized activations of a block of tokens: value ~ stored value * scale of its group.
struct Tokens {
  uint8_t *values;  // [count][2 * depth]
  float *scales;    // [count][groups]
  int32_t *zeros;   // [count][groups]: what a weight's zero point adds to a product
  int64_t count, depth, groups;

  const uint8_t *token(int64_t t) const { return values + t * 2 * depth; }
};

// One group of a row; `count` is a multiple of kLanes, values beyond k are zeros.
void quantize_group(const float *row, int64_t count, int64_t k, int32_t zero_point, const Tokens &out, int64_t t,
                    int64_t group) {
  Vec largest = zero(), finite = zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec v = load(row + i);
    largest = vmax(largest, vmax(v, -v));
    finite += v * 0.0f;
  }
  const float limit = hmax(largest);
  const Vec inverse = set1(limit > 1e-30f ? kTokenLargest / limit : 0.0f);
  IVec sum{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec rounded = (load(row + i) * inverse + set1(kRound)) - set1(kRound);
    const IVec values = __builtin_convertvector(rounded, IVec);
    sum += values;
    store_token(out.values + t * 2 * out.depth, out.depth, k + i, values);
  }
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  // a value that is not finite makes the token's results not a number
  out.scales[t * out.groups + group] = (limit > 1e-30f ? limit / kTokenLargest : 0.0f) + hsum(finite);
  out.zeros[t * out.groups + group] = total * zero_point;
}

void pack_tokens(const LinearArgs &args, int64_t first, int32_t zero_point, const Tokens &out) {
  const NormArgs norm{nullptr,        nullptr,   0,        args.k,          args.norm_weight,
                      args.norm_bias, args.norm, args.eps, args.norm_offset};
  const int64_t padded = round_up(out.depth, kLanes);
  constexpr int64_t kElementsPerChunk = 8192;
  parallel_for(out.count, max64(1, kElementsPerChunk / max64(1, args.k)), [&](int64_t begin, int64_t end) {
    const Scratch scratch(padded * sizeof(float));
    float *row = scratch.as<float>();
    for (int64_t t = begin; t < end; ++t) {
      normalise_row(norm, args.x + (first + t) * args.k, [row](int64_t i, Vec v, int64_t n) {
        store_part(row + i, v, n);
      });
      std::memset(row + args.k, 0, (padded - args.k) * sizeof(float));
      for (int64_t group = 0; group < out.groups; ++group) {
        const int64_t k = group * kQuantGroup;
        quantize_group(row + k, min64(kQuantGroup, padded - k), k, zero_point, out, t, group);
      }
    }
  });
}

// `R` tiles of 16 weight rows with the same range of k; float sums of tile r begin at r * kUp of a token's.
template <int R>
struct Tiles {
  const uint8_t *values[R];
  const float *scales[R];
  int64_t next;  // bytes to the weights that this thread reads after these, to prefetch
};

// sums[j][...] += the products of one group of k, begin on, of `MT` tokens.
template <int bits, int R, int MT, bool prefetch>
VLLM_MS_INLINE void multiply_group(const Tiles<R> &tiles, const Tokens &x, int64_t token, int64_t group, float *sums) {
  const int64_t begin = group * kQuantGroup, end = min64(begin + kQuantGroup, x.depth);
  DotSums dots[R][MT];
  const uint8_t *values[MT];
#pragma GCC unroll 8
  for (int j = 0; j < MT; ++j) values[j] = x.token(token + j);
  for (int64_t k = begin; k < end; k += kQuantDepth) {
    WeightStep w[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      load_steps<bits>(tiles.values[r], k, w[r]);
      if (prefetch) {
        const uint8_t *ahead = tiles.values[r] + k * kQuantRows * bits / 8 + tiles.next;
        __builtin_prefetch(ahead, 0, 2);
        if (bits == 8) __builtin_prefetch(ahead + 64, 0, 2);
      }
    }
#pragma GCC unroll 8
    for (int step = 0; step < 2; ++step) {
#pragma GCC unroll 8
      for (int j = 0; j < MT; ++j) {
        const TokenStep t = load_token(values[j], x.depth, k + 4 * step);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) add(w[r][step], t, &dots[r][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < MT; ++j) {
    const int64_t at = (token + j) * x.groups + group;
    const Vec scale = set1(x.scales[at]);
    const IVec zeros = IVec{} + x.zeros[at];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      IVec rows[kQuantParts];
      total(dots[r][j], rows);
#pragma GCC unroll 8
      for (int part = 0; part < kQuantParts; ++part) {
        float *out = sums + j * kBlock + r * kUp + part * kLanes;
        const Vec of_group = bits == 4 ? load(tiles.scales[r] + group * kQuantRows + part * kLanes) * scale : scale;
        store(out, fma(__builtin_convertvector(rows[part] - zeros, Vec), of_group, load(out)));
      }
    }
  }
}

template <int bits, int R, int MT, bool prefetch>
void multiply_tokens(const Tiles<R> &tiles, const Tokens &x, int64_t token, int64_t begin, int64_t end, float *sums) {
  for (int64_t group = begin; group < end; ++group) {
    multiply_group<bits, R, MT, prefetch>(tiles, x, token, group, sums + token * kBlock);
  }
}

// Groups begin ... end - 1 of `count` tokens, at most kDotTokens.
template <int bits, int R, bool prefetch>
void multiply_some(const Tiles<R> &tiles, const Tokens &x, int64_t token, int64_t count, int64_t begin, int64_t end,
                   float *sums) {
  switch (count) {
    case 1:
      return multiply_tokens<bits, R, 1, prefetch>(tiles, x, token, begin, end, sums);
    case 2:
      return multiply_tokens<bits, R, 2, prefetch>(tiles, x, token, begin, end, sums);
#if defined(__AVX512VNNI__)
    case 3:
      return multiply_tokens<bits, R, 3, prefetch>(tiles, x, token, begin, end, sums);
#endif
    default:
      return multiply_tokens<bits, R, kDotTokens, prefetch>(tiles, x, token, begin, end, sums);
  }
}

// sums[t * kBlock + r * kUp + i] = row i of tile r times token t, for all tokens; int8: without the rows' scales.
template <int bits, int R>
void multiply_tiles(const Tiles<R> &tiles, const Tokens &x, float *sums) {
  for (int64_t t = 0; t < x.count; ++t) {
    for (int r = 0; r < R; ++r) std::memset(sums + t * kBlock + r * kUp, 0, kUp * sizeof(float));
  }
  const int64_t chunks = quant_units(x.count, kDotTokens);
  const int64_t all = kPanelBytes / (R * kQuantGroup * kQuantRows * bits / 8);
  const int64_t panel = chunks == 1 ? x.groups : max64(1, all);
  for (int64_t begin = 0; begin < x.groups; begin += panel) {
    const int64_t end = min64(begin + panel, x.groups);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t token = x.count * chunk / chunks, count = x.count * (chunk + 1) / chunks - token;
      if (chunk == 0) {
        multiply_some<bits, R, true>(tiles, x, token, count, begin, end, sums);
      } else {
        multiply_some<bits, R, false>(tiles, x, token, count, begin, end, sums);
      }
    }
  }
  if (bits == 4) return;
  for (int64_t t = 0; t < x.count; ++t) {
    for (int r = 0; r < R; ++r) {
      for (int64_t i = 0; i < kQuantRows; i += kLanes) {
        float *out = sums + t * kBlock + r * kUp + i;
        store(out, load(out) * load(tiles.scales[r] + i));
      }
    }
  }
}

// The products of one kind of weight.
template <int bits>
struct Product {
  const LinearQuantizedArgs &args;
  const Tokens &x;
  int64_t tile_bytes = quant_tile_bytes(args.linear.k, bits);
  int64_t tile_scales = quant_scales(args.linear.k, bits) * kQuantRows;

  // Tiles `first` and `second` into the two halves of a block's sums.
  void pair(int64_t first, int64_t second, int64_t next, float *sums) const {
    for (int half = 0; half < 2; half += kDotTiles) {
      Tiles<kDotTiles> tiles;
      for (int r = 0; r < kDotTiles; ++r) {
        const int64_t tile = half + r == 0 ? first : second;
        tiles.values[r] = args.weight.values + tile * tile_bytes;
        tiles.scales[r] = args.weight.scales + tile * tile_scales;
      }
      tiles.next = next * tile_bytes;
      multiply_tiles<bits, kDotTiles>(tiles, x, sums + half * kUp);
    }
  }

  void one(int64_t tile, int64_t next, float *sums) const {
    multiply_tiles<bits, 1>(
        {{args.weight.values + tile * tile_bytes}, {args.weight.scales + tile * tile_scales}, next * tile_bytes}, x,
        sums);
  }

  // Rows row ... row + 15, or as many as there are, into the second half; they may lie in two tiles.
  void unaligned(int64_t row, float *sums, float *spare) const {
    const int64_t tile = row / kQuantRows, skipped = row % kQuantRows, last = quant_tiles(args.linear.n) - 1;
    one(tile, 0, spare);
    one(min64(tile + 1, last), 0, spare + kUp);
    for (int64_t t = 0; t < x.count; ++t) {
      std::memcpy(sums + t * kBlock + kUp, spare + t * kBlock + skipped, kUp * sizeof(float));
    }
  }
};

template <int bits>
void multiply_blocks(const LinearQuantizedArgs &args, int64_t first_token, const Tokens &x) {
  const LinearArgs &linear = args.linear;
  const BlockLayout layout(linear);
  const bool gated = linear.activation.gated;
  const bool aligned = !gated || layout.width % kQuantRows == 0;
  const int64_t last = quant_tiles(linear.n) - 1;
  constexpr int64_t kWorkPerChunk = 1 << 18;  // multiply-adds below which a second thread does not pay
  const int64_t work = max64(1, kBlock * linear.k * x.count);
  Ranges ranges(layout.blocks, (kWorkPerChunk + work - 1) / work);
  parallel_for(ranges.workers(), 1, [&](int64_t, int64_t) {
    const Scratch sums_buffer(x.count * kBlock * sizeof(float));
    const Scratch spare_buffer(aligned ? 0 : x.count * kBlock * sizeof(float));
    float *sums = sums_buffer.as<float>();
    const Product<bits> product{args, x};
    ranges.for_each([&](int64_t block, int64_t next_block) {
      const int64_t next = next_block - block;
      if (!aligned) {
        product.one(block, next, sums);
        product.unaligned(layout.width + layout.column(block), sums, spare_buffer.as<float>());
      } else if (gated) {
        product.pair(block, layout.width / kQuantRows + block, next, sums);
      } else {
        product.pair(2 * block, min64(2 * block + 1, last), 2 * next, sums);
      }
      finish_block(linear, first_token, x.count, layout.column(block), layout.count(block), sums);
    });
  });
}

template <int bits>
void run(const LinearQuantizedArgs &args) {
  const LinearArgs &linear = args.linear;
  const int64_t depth = quant_depth(linear.k), groups = quant_units(linear.k, kQuantGroup);
  const int64_t fitting = kPackedBytes / max64(1, 2 * depth) / kDotTokens * kDotTokens;
  const int64_t tokens = min64(linear.m, max64(kMinTokens, min64(kMaxTokens, fitting)));
  const Scratch values(tokens * 2 * depth), scales(tokens * groups * sizeof(float)),
      zeros(tokens * groups * sizeof(int32_t));
  for (int64_t first = 0; first < linear.m; first += tokens) {
    const Tokens x{values.as<uint8_t>(), scales.as<float>(), zeros.as<int32_t>(), min64(tokens, linear.m - first),
                   depth,                groups};
    pack_tokens(linear, first, bits == 4 ? 8 : 128, x);
    multiply_blocks<bits>(args, first, x);
  }
}

}  // namespace

void linear_quantized(const LinearQuantizedArgs &args) {
  if (args.linear.m == 0 || args.linear.n == 0) return;
  if (args.weight.bits == 4) {
    run<4>(args);
  } else {
    run<8>(args);
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
