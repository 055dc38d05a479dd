#include "quantized_weight.h"

#include "../parallel.h"
#include "../vec.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: added and subtracted, it rounds to the nearest integer

VLLM_MS_INLINE Vec round_to_integer(Vec v) { return (v + set1(kRound)) - set1(kRound); }

// Stored values of a row before they are interleaved with other rows: k rounded up to whole vectors.
struct Row {
  float *values;
  int64_t padded;
};

template <class T>
void load_row(const T *weight, int64_t k, const Row &row) {
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    const int64_t n = k - i < kLanes ? k - i : kLanes;
    store(row.values + i, n == kLanes ? load(weight + i) : n > 0 ? load_n(weight + i, n) : zero());
  }
}

// The value of the largest magnitude; not a number if any value is not finite.
float extreme(const float *values, int64_t count) {
  Vec lowest = zero(), highest = zero(), finite = zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec v = load(values + i);
    lowest = vmin(v, lowest);
    highest = vmax(v, highest);
    finite += v * 0.0f;
  }
  const float high = hmax(highest), low = -hmax(-lowest);
  return (high >= -low ? high : low) + hsum(finite);
}

VLLM_MS_INLINE Vec quantize(Vec v, float inverse, float lowest, float highest) {
  return vmin(vmax(round_to_integer(v * inverse), set1(lowest)), set1(highest));
}

float inverse_of(float scale) { return scale * scale > 0.0f ? 1.0f / scale : 0.0f; }

float squared_error(const float *values, int64_t count, float scale) {
  const float inverse = inverse_of(scale);
  Vec sum = zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec v = load(values + i), error = v - quantize(v, inverse, -8.0f, 7.0f) * scale;
    sum = fma(error, error, sum);
  }
  return hsum(sum);
}

// The largest magnitude becomes -8 (there is no 8), or a little more or less: what rounds the group best.
float int4_scale(const float *values, int64_t count) {
  constexpr float kLevels[] = {8.0f, 7.0f, 7.25f, 7.5f, 7.75f, 8.25f, 8.5f, 8.75f, 9.0f, 9.5f, 10.0f};
  const float largest = extreme(values, count);
  float best = -largest / kLevels[0], least = squared_error(values, count, best);
  for (float level : kLevels) {
    const float scale = -largest / level, error = squared_error(values, count, scale);
    if (error < least) {
      least = error;
      best = scale;
    }
  }
  return best;
}

// Values of one row become stored values 0 ... 255 or 0 ... 15; scales[g * kQuantRows] are its scales.
void quantize_row(const Row &row, int bits, float *scales) {
  const int64_t group = bits == 4 ? kQuantGroup : row.padded;
  const float zero_point = bits == 4 ? 8.0f : 128.0f, lowest = bits == 4 ? -8.0f : -127.0f;
  for (int64_t begin = 0, g = 0; begin < row.padded; begin += group, ++g) {
    float *values = row.values + begin;
    const int64_t count = row.padded - begin < group ? row.padded - begin : group;
    const float largest = bits == 4 ? 0.0f : extreme(values, count);
    const float scale = bits == 4 ? int4_scale(values, count) : (largest < 0.0f ? -largest : largest) / 127.0f;
    const float inverse = inverse_of(scale);
    for (int64_t i = 0; i < count; i += kLanes) {
      store(values + i, quantize(load(values + i), inverse, lowest, -lowest - (bits == 4 ? 1.0f : 0.0f)) + zero_point);
    }
    scales[g * kQuantRows] = scale;
  }
}

// Row `i` of a tile among the others.
void interleave(const float *values, int64_t depth, int bits, int64_t i, uint8_t *tile) {
  for (int64_t k = 0; k < depth; k += 4) {
    uint8_t *out = tile + (bits == 4 ? k / 8 : k / 4) * (4 * kQuantRows) + 4 * i;
    for (int64_t j = 0; j < 4; ++j) {
      const uint8_t value = static_cast<uint8_t>(values[k + j]);
      out[j] = bits == 4 && k % 8 != 0 ? out[j] | static_cast<uint8_t>(value << 4) : value;
    }
  }
}

template <class T>
void run(const QuantizeArgs &args) {
  const int64_t depth = quant_depth(args.k), padded = quant_units(depth, kLanes) * kLanes;
  const int64_t tile_bytes = quant_tile_bytes(args.k, args.bits), groups = quant_scales(args.k, args.bits);
  parallel_for(quant_tiles(args.n), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(padded * sizeof(float));
    const Row row{scratch.as<float>(), padded};
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t i = 0; i < kQuantRows; ++i) {
        const int64_t n = tile * kQuantRows + i;
        load_row(static_cast<const T *>(args.weight.data) + n * args.k, n < args.n ? args.k : 0, row);
        quantize_row(row, args.bits, args.scales + tile * groups * kQuantRows + i);
        interleave(row.values, depth, args.bits, i, args.values + tile * tile_bytes);
      }
    }
  });
}

}  // namespace

void quantize_weight(const QuantizeArgs &args) {
  VLLM_MS_DISPATCH_FLOAT(args.weight.dtype, T, { run<T>(args); });
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
