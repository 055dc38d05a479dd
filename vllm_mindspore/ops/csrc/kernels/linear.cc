#include "linear.h"

#include "../parallel.h"
#include "column_product.h"
#include "linear_amx.h"
#include "linear_finish.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

constexpr int64_t kPackedBytes = 4 << 20;  // of packed activations, to stay in the caches

template <class T>
void multiply_blocks(const LinearArgs &args, int64_t first_token, const PackedRows<typename Packed<T>::Type> &x) {
  const T *weight = static_cast<const T *>(args.weight.data);
  const BlockLayout layout(args);
  constexpr int64_t kWorkPerChunk = 1 << 18;  // multiply-adds below which a second thread does not pay
  const int64_t work = max64(1, kBlock * args.k * x.count);
  Ranges ranges(layout.blocks, (kWorkPerChunk + work - 1) / work);
  parallel_for(ranges.workers(), 1, [&](int64_t, int64_t) {
    const Scratch sums_buffer(x.count * kBlock * sizeof(float));
    float *sums = sums_buffer.as<float>();
    ranges.for_each([&](int64_t block, int64_t next_block) {
      const int64_t column = layout.column(block), count = layout.count(block);
      const int64_t next = (layout.column(next_block) - column) * args.k;
      const T *rows = weight + column * args.k;
      const BlockRows<T> in_order = rows_in_order(rows, count, args.k, next);
      const BlockRows<T> of_both{{rows, rows + layout.width * args.k}, {count, count}, 1, args.k, next};
      multiply_block(args.activation.gated ? of_both : in_order, x, sums);
      finish_block(args, first_token, x.count, column, count, sums);
    });
  });
}

template <class T>
void run(const LinearArgs &args) {
  using X = typename Packed<T>::Type;
  const int64_t stride = packed_stride<X>(args.k);
  const int64_t tokens = min64(args.m, tokens_within(kPackedBytes, stride * sizeof(X)));
  const Scratch buffer(tokens * stride * sizeof(X));
  for (int64_t first = 0; first < args.m; first += tokens) {
    const int64_t count = min64(tokens, args.m - first);
    const NormArgs norm{args.x + first * args.k, nullptr,   count,    args.k,          args.norm_weight,
                        args.norm_bias,          args.norm, args.eps, args.norm_offset};
    pack_rows(norm, stride, buffer.as<X>(), [](int64_t) { return 1.0f; });
    multiply_blocks<T>(args, first, {buffer.as<X>(), stride, count});
  }
}

}  // namespace

void linear(const LinearArgs &args) {
  if (args.m == 0 || args.n == 0) return;
#if defined(VLLM_MS_COLUMNS)
  if (args.weight.dtype == DType::bf16_columns) return run<bf16_columns>(args);
  if (args.weight.dtype == DType::bf16_coded) return run<bf16_coded>(args);
#endif
#if defined(__AMX_BF16__)
  if (args.weight.dtype == DType::bf16 && args.k > 0) return linear_amx(args);
#endif
  VLLM_MS_DISPATCH_FLOAT(args.weight.dtype, T, { run<T>(args); });
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
