// One row of RMS or layer norm; used by norm.cc and by linear.cc's prologue, so that both give the same bits.
#pragma once

#include <cmath>

#include "../vec.h"
#include "norm.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

// The row's values become (x - mean) * scale * gamma + beta.
struct RowStatistics {
  float mean, scale;
};

VLLM_MS_INLINE RowStatistics row_statistics(const float *x, int64_t width, Norm norm, float eps) {
  if (norm == Norm::none || width == 0) return {0.0f, 1.0f};
  const int64_t tail = width % kLanes;
  float mean = 0.0f;
  if (norm == Norm::layer) {
    Vec sum = zero(), sum2 = zero();
    int64_t i = 0;
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
      sum += load(x + i);
      sum2 += load(x + i + kLanes);
    }
    for (; i + kLanes <= width; i += kLanes) sum += load(x + i);
    if (tail != 0) sum2 += load_n(x + i, tail);
    mean = hsum(sum + sum2) / static_cast<float>(width);
  }
  const Vec center = set1(mean);
  Vec sum = zero(), sum2 = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    const Vec a = load(x + i) - center, b = load(x + i + kLanes) - center;
    sum = fma(a, a, sum);
    sum2 = fma(b, b, sum2);
  }
  for (; i + kLanes <= width; i += kLanes) {
    const Vec a = load(x + i) - center;
    sum = fma(a, a, sum);
  }
  float total = hsum(sum + sum2);
  for (; i < width; ++i) total += (x[i] - mean) * (x[i] - mean);
  return {mean, 1.0f / std::sqrt(total / static_cast<float>(width) + eps)};
}

// Calls emit(i, values, count) over the normalised row, count = kLanes but for the last.
template <class G, class B, class Emit>
VLLM_MS_INLINE void normalise_row(const float *x, int64_t width, RowStatistics s, const G *gamma, float offset,
                                  const B *beta, Emit emit) {
  const Vec mean = set1(s.mean), scale = set1(s.scale), shift = set1(offset);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    Vec v = (load(x + i) - mean) * scale;
    if (gamma != nullptr) v *= load(gamma + i) + shift;
    if (beta != nullptr) v += load(beta + i);
    emit(i, v, kLanes);
  }
  if (const int64_t n = width - i; n > 0) {
    Vec v = (load_n(x + i, n) - mean) * scale;
    if (gamma != nullptr) v *= load_n(gamma + i, n) + shift;
    if (beta != nullptr) v += load_n(beta + i, n);
    emit(i, v, n);
  }
}

// As above with the weights' storage types resolved.
template <class Emit>
VLLM_MS_INLINE void normalise_row(const NormArgs &args, const float *x, Emit emit) {
  const RowStatistics s = row_statistics(x, args.width, args.norm, args.eps);
  const float offset = args.norm == Norm::rms ? args.offset : 0.0f;
  VLLM_MS_DISPATCH_FLOAT(args.weight.dtype, G, {
    VLLM_MS_DISPATCH_FLOAT(args.bias.dtype, B, {
      normalise_row(x, args.width, s, static_cast<const G *>(args.weight.data), offset,
                    static_cast<const B *>(args.bias.data), emit);
    });
  });
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
