#include "rotary.h"

#include "rotary_head.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

void transform_heads(const TransformHeadsArgs &args) {
  const int64_t size = args.transform.head_size;
  for (int64_t token = args.begin; token < args.end; ++token) {
    for (int64_t head = 0; head < args.num_heads; ++head) {
      transform_head(args.transform, token, head, args.x + token * args.x_stride + head * size,
                     args.out + token * args.out_stride + head * size);
    }
  }
}

void inverse_rms_tokens(const InverseRmsArgs &args) {
  for (int64_t token = args.begin; token < args.end; ++token) {
    args.out[token] = inverse_rms(args.x + token * args.stride, args.size, args.eps);
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
