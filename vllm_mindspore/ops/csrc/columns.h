// Weights [n, k] of bf16 arranged in columns: the order in which products of pairs read them, an output column a lane,
// so that no sum runs over lanes.
//
// Every group of kColumnGroup rows (the last may have fewer) stays where it is in memory. Within it come the pairs of k,
// and of each pair the elements of all rows: [k / 2][rows of the group][2]. k is even.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace vllm_ms {

constexpr int64_t kColumnGroup = 16;

// True where the kernels of the variant in use are faster with weights in columns. Only these can read them.
bool columns_supported();

// Puts `matrices` matrices [n, k], one after the other, into columns, in place; or back into rows.
void arrange_columns(bf16 *weight, int64_t matrices, int64_t n, int64_t k, bool back = false);

}  // namespace vllm_ms
