#include "embedding.h"

#include "../coded.h"
#include "../parallel.h"
#include "../vec.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

template <class T>
void convert_row(const T *row, float *out, int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(out + i, load(row + i));
  for (; i < width; ++i) out[i] = to_float(row[i]);
}

// Row `id` of a table in columns: a pair of each group of lines.
void convert_columns(const bf16 *table, int64_t vocabulary, int64_t id, float *out, int64_t width) {
  const int64_t lane = id % kColumnGroup, first = id - lane;
  const int64_t rows = vocabulary - first < kColumnGroup ? vocabulary - first : kColumnGroup;
  const bf16 *pair = table + first * width + 2 * lane;
  for (int64_t i = 0; i + 1 < width; i += 2, pair += 2 * rows) {
    out[i] = to_float(pair[0]);
    out[i + 1] = to_float(pair[1]);
  }
}

// The same, of a coded table.
void convert_coded(const bf16 *table, int64_t id, float *out, int64_t width) {
  const int64_t lane = id % kColumnGroup;
  const CodedGroup group(table + (id - lane) * width, width);
  const auto value = [](uint16_t bits) { return to_float(bf16{bits}); };
  for (int64_t k = 0; k < width; ++k) out[k] = value(group.bits(k, 2 * lane + k % 2));
  for (const CodedException *one = group.exceptions; one->k != CodedException::kNoMore; ++one) {
    if (one->place / 2 == lane) out[one->k + one->place % 2] = value(one->bits);
  }
}

}  // namespace

void embedding(const EmbeddingArgs &args) {
  constexpr int64_t kElementsPerChunk = 16384;
  const int64_t grain = args.width > 0 ? (kElementsPerChunk + args.width - 1) / args.width : args.tokens;
  parallel_for(args.tokens, grain, [&args](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t given = args.id_dtype == DType::i32 ? static_cast<const int32_t *>(args.ids)[t]
                                                        : static_cast<const int64_t *>(args.ids)[t];
      const int64_t id = given - args.first;
      float *out = args.out + t * args.width;
      if (id < 0 || id >= args.vocabulary) {
        std::memset(out, 0, args.width * sizeof(float));
        continue;
      }
      if (args.weight.dtype == DType::bf16_columns) {
        convert_columns(static_cast<const bf16 *>(args.weight.data), args.vocabulary, id, out, args.width);
        continue;
      }
      if (args.weight.dtype == DType::bf16_coded) {
        convert_coded(static_cast<const bf16 *>(args.weight.data), id, out, args.width);
        continue;
      }
      VLLM_MS_DISPATCH_FLOAT(args.weight.dtype, T, {
        convert_row(static_cast<const T *>(args.weight.data) + id * args.width, out, args.width);
      });
    }
  });
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
