// The last step of linear.cc's products, whatever computed their sums: bias, activation, gate, residual.
#pragma once

#include "activation_vec.h"
#include "linear.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

constexpr int kBlock = 32;          // weight rows per unit of work; gated: 16 of gate, then 16 of up
constexpr int kUp = kBlock / 2;     // where those of up begin
constexpr int64_t kCachedResult = 16 << 20;  // bytes; larger results would only displace from the caches what is read

VLLM_MS_INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
VLLM_MS_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
VLLM_MS_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// How the rows of a weight become blocks of output columns.
struct BlockLayout {
  int64_t width;    // columns of out
  int64_t columns;  // of a block
  int64_t blocks;

  explicit BlockLayout(const LinearArgs &args)
      : width(args.activation.gated ? args.n / 2 : args.n),
        columns(args.activation.gated ? kUp : kBlock),
        blocks((width + columns - 1) / columns) {}
  int64_t column(int64_t block) const { return block * columns; }
  int64_t count(int64_t block) const { return min64(columns, width - block * columns); }
};

// Bias, activation and residual of `count` output columns from `column` on; sums[t * kBlock ...].
VLLM_MS_INLINE void finish_block(const LinearArgs &args, int64_t first_token, int64_t tokens, int64_t column,
                                 int64_t count, const float *sums) {
  const bool gated = args.activation.gated;
  const int64_t width = gated ? args.n / 2 : args.n;
  alignas(64) float bias[kBlock] = {};
  if (args.bias) {
    VLLM_MS_DISPATCH_FLOAT(args.bias.dtype, B, {
      const B *values = static_cast<const B *>(args.bias.data);
      for (int64_t i = 0; i < count; ++i) {
        bias[i] = to_float(values[column + i]);
        if (gated) bias[kUp + i] = to_float(values[width + column + i]);
      }
    });
  }
  const bool cached = args.m * width * static_cast<int64_t>(sizeof(float)) <= kCachedResult;
  with_activation(args.activation.kind, [&](auto tag) {
    for (int64_t t = 0; t < tokens; ++t) {
      const float *sum = sums + t * kBlock;
      const int64_t offset = (first_token + t) * width + column;
      for (int64_t i = 0; i < count; i += kLanes) {
        Vec v = load(sum + i);
        if (args.bias) v += load(bias + i);
        v = activate<decltype(tag)::value>(v);
        if (gated) {
          Vec up = load(sum + kUp + i);
          if (args.bias) up += load(bias + kUp + i);
          v *= up;
        }
        const int64_t n = min64(kLanes, count - i);
        if (args.residual != nullptr) v += load_part(args.residual + offset + i, n);
        if (cached || n < kLanes) {
          store_part(args.out + offset + i, v, n);
        } else {
          stream(args.out + offset + i, v);
        }
      }
    }
  });
  if (!cached) end_streaming();
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
