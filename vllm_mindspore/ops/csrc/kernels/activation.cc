#include "activation.h"

#include "../parallel.h"
#include "activation_vec.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

template <Activation::Kind kind>
void activate_row(const float *x, const float *up, float *out, int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    Vec v = activate<kind>(load(x + i));
    if (up != nullptr) v *= load(up + i);
    store(out + i, v);
  }
  if (const int64_t n = width - i; n > 0) {
    Vec v = activate<kind>(load_n(x + i, n));
    if (up != nullptr) v *= load_n(up + i, n);
    store_n(out + i, v, n);
  }
}

}  // namespace

void activate_rows(const ActivationArgs &args) {
  constexpr int64_t kElementsPerChunk = 8192;
  if (args.rows == 0 || args.width == 0) return;
  // without a gate all rows are one: cut it anywhere, in whole vectors
  const bool gated = args.activation.gated;
  const int64_t rows = gated ? args.rows : (args.rows * args.width + kElementsPerChunk - 1) / kElementsPerChunk;
  const int64_t width = gated ? args.width : kElementsPerChunk;
  const int64_t total = args.rows * args.width;
  const int64_t grain = (kElementsPerChunk + width - 1) / width;
  with_activation(args.activation.kind, [&](auto tag) {
    constexpr Activation::Kind kind = decltype(tag)::value;
    parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (gated) {
          const float *x = args.x + r * 2 * width;
          activate_row<kind>(x, x + width, args.out + r * width, width);
        } else {
          const int64_t start = r * width;
          const int64_t count = total - start < width ? total - start : width;
          activate_row<kind>(args.x + start, nullptr, args.out + start, count);
        }
      }
    });
  });
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
