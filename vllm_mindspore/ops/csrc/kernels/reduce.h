// Sums and copies of rows, as collectives take them.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../isa.h"

namespace vllm_ms {

// out[i] = parts[0][i] + parts[1][i] + ... for i in [begin, end), added in this order in float32. out may be one of them.
struct SumPartsArgs {
  const void *const *parts;
  int64_t num_parts;
  DType dtype;  // of the parts and of out: f32, bf16 or fp16
  int64_t begin;
  int64_t end;
  void *out;
};
VLLM_MS_DECLARE_KERNEL(sum_parts, SumPartsArgs)

// As std::memcpy, for memory that another CPU has just written: for some kilobytes memcpy takes `rep movsb`, which reads
// such memory up to five times slower.
struct CopyBytesArgs {
  void *to;
  const void *from;
  int64_t bytes;
};
VLLM_MS_DECLARE_KERNEL(copy_bytes, CopyBytesArgs)

}  // namespace vllm_ms
