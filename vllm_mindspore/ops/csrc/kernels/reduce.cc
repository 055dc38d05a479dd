#include "reduce.h"

#include "../vec.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

template <class T, class Out>
void sum(const SumPartsArgs &args) {
  Out *out = static_cast<Out *>(args.out);
  for (int64_t i = args.begin; i < args.end; i += kLanes) {
    const int64_t n = args.end - i < kLanes ? args.end - i : kLanes;
    Vec total = load_part(static_cast<const T *>(args.parts[0]) + i, n);
    for (int64_t part = 1; part < args.num_parts; ++part) {
      total += load_part(static_cast<const T *>(args.parts[part]) + i, n);
    }
    store_part(out + i, total, n);
  }
}

}  // namespace

void sum_parts(const SumPartsArgs &args) {
  VLLM_MS_DISPATCH_FLOAT(args.dtype, T, {
    VLLM_MS_DISPATCH_FLOAT(args.out_dtype, Out, { (sum<T, Out>(args)); })
  })
}

void copy_bytes(const CopyBytesArgs &args) {
  constexpr int64_t kStep = 4 * sizeof(Vec), kLong = 256 << 10;  // from here on memcpy's way of writing pays
  if (args.bytes >= kLong) {
    std::memcpy(args.to, args.from, args.bytes);
    return;
  }
  char *to = static_cast<char *>(args.to);
  const char *from = static_cast<const char *>(args.from), *const end = from + args.bytes;
  for (; end - from >= kStep; from += kStep, to += kStep) {
    Vec v[4];
    std::memcpy(v, from, kStep);
    std::memcpy(to, v, kStep);
  }
  std::memcpy(to, from, end - from);
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
