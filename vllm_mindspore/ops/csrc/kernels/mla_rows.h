// What the kernels of multi-head latent attention share: rows of the cache, and memory of a task.
#pragma once

#include "attention_tile.h"
#include "mla.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

VLLM_MS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
VLLM_MS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// The cache slots of a request's positions [begin, end).
VLLM_MS_INLINE void find_slots(const AttentionInputs &step, int64_t request, int64_t begin, int64_t end,
                               int64_t *slots) {
  if (begin >= end) return;
  const int32_t *blocks = step.block_table + request * step.max_blocks;
  int64_t block = begin / step.block_size, offset = begin % step.block_size;
  for (int64_t j = 0; j < end - begin; ++j) {
    slots[j] = blocks[block] * step.block_size + offset;
    if (++offset == step.block_size) {
      offset = 0;
      ++block;
    }
  }
}

// The cache slots of a request's positions selected[begin, end).
VLLM_MS_INLINE void find_selected(const AttentionInputs &step, int64_t request, const float *selected, int64_t begin,
                                  int64_t end, int64_t *slots) {
  const int32_t *blocks = step.block_table + request * step.max_blocks;
  const uint32_t size = static_cast<uint32_t>(step.block_size);
  for (int64_t j = 0; j < end - begin; ++j) {
    const uint32_t position = static_cast<uint32_t>(selected[begin + j]);
    slots[j] = static_cast<int64_t>(blocks[position / size]) * step.block_size + position % size;
  }
}

// To whole vectors: writes up to kLanes - 1 zeros behind `size` floats.
template <class T>
VLLM_MS_INLINE void convert_row(const T *row, int64_t size, float *out) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store(out + d, widen(row + d));
  if (d < size) store(out + d, load_n(row + d, size - d));
}

// Exactly `size` floats.
template <class T>
VLLM_MS_INLINE void widen_exactly(const T *row, int64_t size, float *out) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store(out + d, widen(row + d));
  if (d < size) store_n(out + d, load_n(row + d, size - d), size - d);
}

// Hands out aligned blocks of a workspace.
struct Blocks {
  float *next;

  float *take(int64_t count) {
    float *block = next;
    next += (count + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
    return block;
  }
};

}  // namespace
}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
