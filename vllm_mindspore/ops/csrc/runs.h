// Parts of tensors that are whole in one dimension: where the elements of one are in the whole.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vllm_ms {

// Calls f(place in [outer, size, inner], place in [begin, end), count) for every run of elements [begin, end) of part
// `part`, an [outer, inner].
template <class F>
void for_runs(int64_t begin, int64_t end, int64_t part, int64_t size, int64_t inner, F f) {
  for (int64_t i = begin; i < end;) {
    const int64_t row = i / inner, column = i % inner, count = std::min(end - i, inner - column);
    f((row * size + part) * inner + column, i - begin, count);
    i += count;
  }
}

}  // namespace vllm_ms
