// Sparse attention at the sizes of DeepSeek V3.2: the indexer, and attention to the latents that it selects.
#pragma once

#include "indexer_plan.h"
#include "measure.h"
#include "mla_plan.h"

namespace {

using namespace vllm_ms;

constexpr int64_t kSparseBlock = 16, kTopK = 2048;

// One request whose last `queries` tokens are the step's, and which has `length` tokens, in blocks that follow another.
struct SparseStep {
  std::vector<int32_t> table, starts, lengths;

  SparseStep(int64_t queries, int64_t length)
      : table((length + kSparseBlock - 1) / kSparseBlock),
        starts{0, static_cast<int32_t>(queries)},
        lengths{static_cast<int32_t>(length)} {
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  }

  int64_t slots() const { return static_cast<int64_t>(table.size()) * kSparseBlock; }

  void fill(AttentionInputs &step, int64_t num_heads) const {
    step.num_tokens = starts[1];
    step.block_table = table.data();
    step.num_requests = 1;
    step.max_blocks = table.size();
    step.query_start_loc = starts.data();
    step.seq_lens = lengths.data();
    step.num_heads = num_heads;
    step.block_size = kSparseBlock;
  }
};

// bf16 numbers around 1 of both signs, in new memory.
char *sparse_cache(int64_t bytes) {
  char *memory = allocate(bytes);
  for (int64_t i = 0; i < bytes / 2; ++i) {
    reinterpret_cast<uint16_t *>(memory)[i] = static_cast<uint16_t>(0x3f00 + (i * 7919 & 0x80ff));
  }
  return memory;
}

std::string sparse_name(const char *what, int64_t queries, int64_t length) {
  return std::string(what) + ", " + std::to_string(queries) + " of " + std::to_string(length);
}

void indexer_of(int64_t queries, int64_t length) {
  constexpr int64_t kHeads = 64, kSize = 128, kRotated = 64;
  const SparseStep step(queries, length);
  const int64_t layer = step.slots() * kSize * 2, layers = std::max<int64_t>(1, (128 << 20) / layer);
  char *memory = sparse_cache(layer * layers);
  std::vector<float> query(queries * kHeads * kSize), key_weights(queries * (kSize + kHeads));
  for (size_t i = 0; i < query.size(); ++i) query[i] = static_cast<float>(i * 31 % 17) - 8.0f;
  for (size_t i = 0; i < key_weights.size(); ++i) key_weights[i] = static_cast<float>(i * 13 % 11) - 5.0f;
  const std::vector<float> ones(kSize, 1.0f), cos_sin(length * kRotated, 0.5f);
  std::vector<int64_t> positions(queries), slots(queries);
  for (int64_t i = 0; i < queries; ++i) positions[i] = slots[i] = length - queries + i;
  std::vector<float> out(queries * kTopK);
  IndexerInputs in{};
  step.fill(in.step, kHeads);
  in.step.query = query.data();
  in.step.query_stride = kHeads * kSize;
  in.rotation.head_size = kSize;
  in.rotation.positions = positions.data();
  in.rotation.cos_sin = {cos_sin.data(), DType::f32};
  in.rotation.rotary_dim = kRotated;
  in.key_weights = key_weights.data();
  in.key_weights_stride = kSize + kHeads;
  in.key_norm.width = kSize;
  in.key_norm.weight = in.key_norm.bias = {ones.data(), DType::f32};
  in.key_norm.norm = Norm::layer;
  in.key_norm.eps = 1e-6f;
  in.slot_mapping = slots.data();
  in.top_k = kTopK;
  const double seconds = median_seconds([&] {
    for (int64_t i = 0; i < layers; ++i) {
      in.step.cache = {memory + i * layer, DType::bf16, step.slots(), 1, kSize, 0};
      lightning_indexer(in, out.data());
    }
  });
  double pairs = 0;
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t keys = length - queries + i + 1;
    if (keys > kTopK) pairs += static_cast<double>(keys);
  }
  report(sparse_name("indexer", queries, length), seconds / layers, layer, 2.0 * pairs * kHeads * kSize);
  munmap(memory, layer * layers);
}

void selected_latents_of(int64_t queries, int64_t length) {
  constexpr int64_t kHeads = 128, kNope = 128, kRope = 64, kV = 128, kLora = 512, kRow = kLora + kRope;
  const SparseStep step(queries, length);
  const int64_t cache = step.slots() * kRow * 2, weight = kHeads * (kNope + kV) * kLora * 2, layer = cache + weight;
  char *memory = sparse_cache(layer);
  const std::vector<float> query(queries * kHeads * (kNope + kRope), 0.1f);
  std::vector<float> out(queries * kHeads * kV), selected(queries * kTopK);
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t keys = length - queries + i + 1;
    for (int64_t j = 0; j < kTopK; ++j) selected[i * kTopK + j] = static_cast<float>(j * std::max(keys, kTopK) / kTopK);
  }
  MlaInputs in{};
  step.fill(in.step, kHeads);
  in.step.query = query.data();
  in.step.query_stride = kHeads * (kNope + kRope);
  in.step.cache = {memory, DType::bf16, step.slots(), 1, kRow};
  in.step.scale = 0.1f;
  in.kv_b = {memory + cache, DType::bf16};
  in.nope = kNope;
  in.rope = kRope;
  in.v = kV;
  in.lora = kLora;
  double seconds[2];
  for (bool sparse : {false, true}) {
    in.selected = sparse ? selected.data() : nullptr;
    in.top_k = kTopK;
    in.step.out = out.data();
    seconds[sparse] = median_seconds([&] { mla_attention(in); });
  }
  const bool masked = mla_masks(in, queries, length);
  std::printf("%-44s %10.1f us, attention to all %10.1f us%s\n", sparse_name("selected latents", queries, length).c_str(),
              seconds[true] * 1e6, seconds[false] * 1e6, masked ? " (masked)" : "");
  std::fflush(stdout);
  munmap(memory, layer);
}

void sparse_attention() {
  for (int64_t length : {4096, 16384, 65536}) indexer_of(1, length);
  for (int64_t length : {4096, 16384}) indexer_of(128, length);
  for (int64_t length : {4096, 16384, 65536}) selected_latents_of(1, length);
  for (int64_t length : {4096, 16384}) selected_latents_of(128, length);
}

}  // namespace
