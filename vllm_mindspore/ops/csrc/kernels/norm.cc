#include "norm.h"

#include "../parallel.h"
#include "norm_row.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

void norm_rows(const NormArgs &args) {
  constexpr int64_t kElementsPerChunk = 16384;
  const int64_t grain = args.width > 0 ? (kElementsPerChunk + args.width - 1) / args.width : args.rows;
  parallel_for(args.rows, grain, [&args](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float *out = args.out + r * args.width;
      normalise_row(args, args.x + r * args.width, [out](int64_t i, Vec v, int64_t n) { store_part(out + i, v, n); });
    }
  });
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
