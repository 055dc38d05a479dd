// Sums and copies of rows, as collectives take them.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../isa.h"

namespace vllm_ms {

// out[i] = parts[0][i] + parts[1][i] + ... for i in [begin, end), added in this order in float32; of one part it is a
// conversion. out may be one of them where it has their type.
struct SumPartsArgs {
  const void *const *parts;
  int64_t num_parts;
  DType dtype;  // of the parts: f32, bf16 or fp16
  int64_t begin;
  int64_t end;
  void *out;
  DType out_dtype;
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
