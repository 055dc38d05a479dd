// Storage types of tensors and scalar conversions to and from float.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace vllm_ms {

enum class DType : int32_t { f32, bf16, fp16, i32, i64, u8, other, bf16_columns, bf16_coded };

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
// A bf16 of a weight that is arranged in columns, see columns.h.
struct bf16_columns {
  uint16_t bits;
};
// The memory that such a one would take, in a coded weight, see coded.h.
struct bf16_coded {
  uint16_t bits;
};

// A read-only weight: `data` may be null for an absent optional tensor.
struct Weight {
  const void *data = nullptr;
  DType dtype = DType::f32;
  explicit operator bool() const { return data != nullptr; }
};

VLLM_MS_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

VLLM_MS_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

VLLM_MS_INLINE float to_float(float value) { return value; }
VLLM_MS_INLINE float to_float(bf16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

// IEEE half to float, without subnormal floats on the way: MindSpore's threads may be set to take them for zero.
VLLM_MS_INLINE float to_float(fp16 value) {
  const uint32_t half = value.bits;
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = (magnitude << 13) | 0x7f800000u;  // infinity and NaN
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {
    bits = float_to_bits(static_cast<float>(magnitude) * 0x1p-24f);
  }
  return bits_to_float(bits | ((half & 0x8000u) << 16));
}

VLLM_MS_INLINE void from_float(float value, float *out) { *out = value; }

// Round to nearest even; NaN stays NaN.
VLLM_MS_INLINE void from_float(float value, bf16 *out) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

// Round to nearest even; overflow to infinity, NaN stays NaN.
VLLM_MS_INLINE void from_float(float value, fp16 *out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65520 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: let an addition do the rounding to multiples of 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

VLLM_MS_INLINE int64_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::i64:
      return 8;
    case DType::u8:
      return 1;
    default:
      return 2;
  }
}

}  // namespace vllm_ms

// Calls `body` with `T` naming the floating-point storage type of `dtype` (f32, bf16 or fp16):
//   VLLM_MS_DISPATCH_FLOAT(w.dtype, T, { work(static_cast<const T *>(w.data)); });
#define VLLM_MS_DISPATCH_FLOAT(dtype_value, T, ...)        \
  switch (dtype_value) {                                   \
    case ::vllm_ms::DType::bf16: {                         \
      using T = ::vllm_ms::bf16;                           \
      __VA_ARGS__                                          \
      break;                                               \
    }                                                      \
    case ::vllm_ms::DType::fp16: {                         \
      using T = ::vllm_ms::fp16;                           \
      __VA_ARGS__                                          \
      break;                                               \
    }                                                      \
    default: {                                             \
      using T = float;                                     \
      __VA_ARGS__                                          \
      break;                                               \
    }                                                      \
  }
