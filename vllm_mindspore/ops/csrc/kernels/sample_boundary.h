// The value at which a sum over the largest elements reaches a target, without sorting. Only for files in kernels/.
#pragma once

#include "../parallel.h"
#include "../vec.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

constexpr int kBuckets = 2048;
constexpr int kDigitShifts[] = {21, 10, 0};  // digits of 11 bits; the last one has a bit in common with the one before

struct Boundary {
  float value;
  double above;  // the summed weight of all elements greater than `value`
};

// Adds up buckets until `target` is reached and returns the last one added; *above is then the sum before it. Where the
// target is not reached (rounding, or a target beyond the sum) that is the last bucket that is not empty.
VLLM_MS_INLINE int find_bucket(const double *buckets, double target, double *above) {
  int found = 0;
  double sum = *above;
  for (int b = 0; b < kBuckets; ++b) {
    if (buckets[b] == 0) continue;
    found = b;
    *above = sum;
    sum += buckets[b];
    if (sum >= target) break;
  }
  return found;
}

// Maps floats to integers of the opposite order: the greater the value, the smaller its key. Both zeros have one key.
VLLM_MS_INLINE uint32_t descending_key(float value) {
  const uint32_t bits = float_to_bits(value + 0.0f);
  return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

VLLM_MS_INLINE float value_of_key(uint32_t key) { return bits_to_float(key >> 31 ? key : ~key & 0x7fffffffu); }

// Sixteen buckets to a unit of distance from the largest element; the last one holds all that is far below.
VLLM_MS_INLINE int distance_bucket(float value, float largest) {
  const float scaled = (largest - value) * 16.0f;
  return scaled < kBuckets - 1 ? static_cast<int>(scaled) : kBuckets - 1;
}

struct Weighted {
  uint32_t *keys;
  float *weights;
  int64_t size;
};

// The key at which the sum over ascending keys reaches `target`: one digit a pass, keeping the keys that share it.
VLLM_MS_INLINE uint32_t boundary_key(Weighted set, double target, double *above) {
  double buckets[kBuckets];
  for (int shift : kDigitShifts) {
    for (double &bucket : buckets) bucket = 0;
    for (int64_t i = 0; i < set.size; ++i) buckets[set.keys[i] >> shift & (kBuckets - 1)] += set.weights[i];
    const uint32_t digit = find_bucket(buckets, target, above);
    int64_t kept = 0;
    for (int64_t i = 0; i < set.size; ++i) {
      set.keys[kept] = set.keys[i];
      set.weights[kept] = set.weights[i];
      kept += (set.keys[i] >> shift & (kBuckets - 1)) == digit;
    }
    set.size = kept;
  }
  return set.keys[0];
}

// The largest value at which the weights of x[i] >= value sum to `target` or more; the smallest x of positive weight
// where they never do. x: [size], no NaN; weights: [size], not negative, or null for one each; `largest` the maximum of
// x. Only the bucket that holds the boundary is looked at closely.
inline Boundary find_boundary(const float *x, const float *weights, int64_t size, float largest, double target) {
  double buckets[kBuckets] = {};
  for (int64_t i = 0; i < size; ++i) buckets[distance_bucket(x[i], largest)] += weights ? weights[i] : 1.0f;
  double above = 0;
  const int bucket = find_bucket(buckets, target, &above);
  const Scratch memory(size * (sizeof(uint32_t) + sizeof(float)));
  Weighted set{memory.as<uint32_t>(), memory.as<float>() + size, 0};
  for (int64_t i = 0; i < size; ++i) {
    set.keys[set.size] = descending_key(x[i]);
    set.weights[set.size] = weights ? weights[i] : 1.0f;
    set.size += distance_bucket(x[i], largest) == bucket;
  }
  const float value = value_of_key(boundary_key(set, target, &above));
  return {value, above};
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
