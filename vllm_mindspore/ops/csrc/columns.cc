#include "columns.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace vllm_ms {

bool columns_supported() { return isa() == Isa::avx512 || isa() == Isa::avx2; }

void arrange_columns(bf16 *weight, int64_t matrices, int64_t n, int64_t k, bool back) {
  struct Pair {
    bf16 elements[2];
  };
  const int64_t groups = (n + kColumnGroup - 1) / kColumnGroup, pairs = k / 2;
  parallel_for(matrices * groups, 1, [=](int64_t begin, int64_t end) {
    const Scratch scratch(kColumnGroup * k * sizeof(bf16));
    Pair *before = scratch.as<Pair>();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % groups * kColumnGroup, rows = std::min(kColumnGroup, n - row);
      Pair *group = reinterpret_cast<Pair *>(weight + (i / groups * n + row) * k);
      std::copy_n(group, rows * pairs, before);
      for (int64_t p = 0; p < pairs; ++p) {
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t in_columns = p * rows + r, in_rows = r * pairs + p;
          group[back ? in_rows : in_columns] = before[back ? in_columns : in_rows];
        }
      }
    }
  });
}

}  // namespace vllm_ms
