// What the kernels achieve, beside what the machine can do, both measured in one run. Built and run by kernels.py.
//
// Sizes are those of the Qwen3-0.6B shape, and weights and caches go round through more memory than caches hold.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention_plan.h"
#include "coded.h"
#include "columns.h"
#include "kernels/activation.h"
#include "kernels/linear.h"
#include "kernels/linear_quantized.h"
#include "kernels/moe_experts.h"
#include "kernels/norm.h"
#include "measure.h"
#include "mla_plan.h"
#include "parallel.h"
#include "peaks.h"
#include "sparse_attention.h"

using namespace vllm_ms;

namespace {

// Writes bf16 values as weights have them: normally distributed.
void fill(char *weights, int64_t bytes) {
  constexpr int64_t kDifferent = 1 << 20;
  static const std::vector<uint16_t> values = [] {
    std::mt19937 random;
    std::normal_distribution<float> distribution(0.0f, 0.02f);
    std::vector<uint16_t> values(kDifferent);
    for (uint16_t &value : values) value = static_cast<uint16_t>(float_to_bits(distribution(random)) >> 16);
    return values;
  }();
  for (int64_t i = 0; i < bytes / 2; ++i) reinterpret_cast<uint16_t *>(weights)[i] = values[i % kDifferent];
}

// Matrices [n, k] of bf16 as the engine has them: in columns where the kernels read these.
Weight arranged(char *data, int64_t matrices, int64_t n, int64_t k) {
  if (!columns_supported()) return {data, DType::bf16};
  arrange_columns(reinterpret_cast<bf16 *>(data), matrices, n, k);
  const bool coded = encode_columns(reinterpret_cast<bf16_columns *>(data), matrices, n, k);
  return {data, coded ? DType::bf16_coded : DType::bf16_columns};
}

// What of a weight's bytes is read.
double read_share(const Weight &weight) { return weight.dtype == DType::bf16_coded ? 0.75 : 1.0; }

struct Shape {
  const char *name;
  int64_t n, k;
  bool gated;
};
const Shape shapes[] = {{"qkv", 4096, 1024, false}, {"o", 1024, 2048, false}, {"gate_up", 6144, 1024, true},
                        {"down", 1024, 3072, false}, {"lm_head", 151936, 1024, false}};

void linear_layers() {
  constexpr int64_t kMemory = 640 << 20;
  char *weights = allocate(kMemory);
  for (const Shape &shape : shapes) {
    const int64_t bytes = shape.n * shape.k * 2, copies = kMemory / bytes;
    fill(weights, kMemory);  // anew: the last shape's may be coded
    const Weight first = arranged(weights, copies, shape.n, shape.k);
    for (int64_t m : {1, 8, 32, 64, 128, 512}) {
      if (shape.n > 100000 && m > 64) continue;
      const std::vector<float> x(m * shape.k, 0.5f);
      std::vector<float> out(m * shape.n);
      const double seconds = median_seconds([&] {
        for (int64_t i = 0; i < copies; ++i) {
          LinearArgs args{};
          args.x = x.data();
          args.weight = {weights + i * bytes, first.dtype};
          args.out = out.data();
          args.m = m;
          args.n = shape.n;
          args.k = shape.k;
          args.activation = {shape.gated ? Activation::silu : Activation::identity, shape.gated};
          linear(args);
        }
      });
      report(std::string("linear ") + shape.name + ", " + std::to_string(m) + " tokens", seconds / copies,
             bytes * read_share(first), 2.0 * m * shape.n * shape.k);
    }
  }
  munmap(weights, kMemory);
}

// A layer of Qwen3-30B-A3B: 128 experts of 768, 8 a token. The experts are others in every round.
void experts() {
  constexpr int64_t kExperts = 128, kTopK = 8, kHidden = 2048, kInter = 768;
  constexpr int64_t kExpert = 3 * kInter * kHidden * 2;  // bytes
  char *weights = allocate(kExperts * kExpert);
  fill(weights, kExperts * kExpert);
  const Weight w13 = arranged(weights, kExperts, 2 * kInter, kHidden);
  const Weight w2 = arranged(weights + kExperts * 2 * kInter * kHidden * 2, kExperts, kHidden, kInter);
  for (int64_t tokens : {1, 4, 16, 64, 256, 1024}) {
    constexpr int64_t kRoutings = 16;
    std::vector<float> routing(kRoutings * tokens * 2 * kTopK, 0.1f);
    uint32_t state = 1;
    std::vector<bool> read(kExperts);
    double bytes = 0;
    for (int64_t i = 0; i < kRoutings; ++i) {
      std::fill(read.begin(), read.end(), false);
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t first = (state = state * 1664525u + 1013904223u) >> 25;
        for (int64_t j = 0; j < kTopK; ++j) {
          const int64_t expert = (first + 13 * j) % kExperts;
          routing[(i * tokens + t) * 2 * kTopK + j] = static_cast<float>(expert);
          bytes += read[expert] ? 0 : kExpert / static_cast<double>(kRoutings);
          read[expert] = true;
        }
      }
    }
    const std::vector<float> x(tokens * kHidden, 0.5f);
    std::vector<float> out(tokens * kHidden);
    const double seconds = median_seconds([&] {
      for (int64_t i = 0; i < kRoutings; ++i) {
        MoeExpertsArgs args{};
        args.x = x.data();
        args.routing = routing.data() + i * tokens * 2 * kTopK;
        args.w13 = w13;
        args.w2 = w2;
        args.out = out.data();
        args.tokens = tokens;
        args.top_k = kTopK;
        args.experts = kExperts;
        args.hidden = args.width = kHidden;
        args.inter = kInter;
        args.activation = {Activation::silu, true};
        moe_experts(args);
      }
    });
    report("experts, 8 of 128, " + std::to_string(tokens) + " tokens", seconds / kRoutings,
           bytes * read_share(w13), 2.0 * tokens * kTopK * 3 * kInter * kHidden);
  }
  munmap(weights, kExperts * kExpert);
}

void quantized_layers(int bits) {
  constexpr int64_t kMemory = 640 << 20;
  uint8_t *weights = reinterpret_cast<uint8_t *>(allocate(kMemory));
  for (int64_t i = 0; i < kMemory; ++i) weights[i] = static_cast<uint8_t>(i * 2654435761u >> 20);
  for (const Shape &shape : shapes) {
    for (int64_t m : {1, 8, 64, 512}) {
      if (shape.n > 100000 && m > 64) continue;
      const std::vector<float> x(m * shape.k, 0.5f);
      std::vector<float> out(m * shape.n);
      const int64_t tiles = quant_tiles(shape.n), value_bytes = tiles * quant_tile_bytes(shape.k, bits);
      const std::vector<float> scales(tiles * quant_scales(shape.k, bits) * kQuantRows, 0.01f);
      const int64_t copies = kMemory / value_bytes, bytes = value_bytes + scales.size() * sizeof(float);
      const double seconds = median_seconds([&] {
        for (int64_t i = 0; i < copies; ++i) {
          LinearQuantizedArgs args{};
          args.linear.x = x.data();
          args.linear.out = out.data();
          args.linear.m = m;
          args.linear.n = shape.n;
          args.linear.k = shape.k;
          args.linear.activation = {shape.gated ? Activation::silu : Activation::identity, shape.gated};
          args.weight = {weights + i * value_bytes, scales.data(), bits};
          linear_quantized(args);
        }
      });
      report("linear_int" + std::to_string(bits) + " " + shape.name + ", " + std::to_string(m) + " tokens",
             seconds / copies, bytes, 2.0 * m * shape.n * shape.k);
    }
  }
  munmap(weights, kMemory);
}

void attention_of(const char *name, int64_t requests, int64_t queries, int64_t length) {
  constexpr int64_t kHeads = 16, kKvHeads = 8, kSize = 128, kBlock = 16;
  const int64_t blocks = (length + kBlock - 1) / kBlock, slots = requests * blocks * kBlock;
  const int64_t layer = slots * kKvHeads * 2 * kSize * 2, layers = std::max<int64_t>(1, (512 << 20) / layer);
  char *cache = allocate(layer * layers);
  for (int64_t i = 0; i < layer * layers / 2; ++i) reinterpret_cast<uint16_t *>(cache)[i] = 0x3c00 + (i & 0x83ff);
  std::vector<int32_t> table(requests * blocks), starts, lengths(requests, length);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  for (int64_t r = 0; r <= requests; ++r) starts.push_back(static_cast<int32_t>(r * queries));
  const std::vector<float> query(requests * queries * kHeads * kSize, 0.1f);
  std::vector<float> out(query.size());
  const double seconds = median_seconds([&] {
    for (int64_t i = 0; i < layers; ++i) {
      AttentionInputs in;
      in.query = query.data();
      in.query_stride = kHeads * kSize;
      in.num_tokens = requests * queries;
      in.cache = {cache + i * layer, DType::bf16, slots, kKvHeads, kSize, kSize};
      in.block_table = table.data();
      in.num_requests = requests;
      in.max_blocks = blocks;
      in.query_start_loc = starts.data();
      in.seq_lens = lengths.data();
      in.num_heads = kHeads;
      in.block_size = kBlock;
      in.scale = 0.1f;
      in.out = out.data();
      attention(in);
    }
  });
  double pairs = 0;
  for (int64_t q = 0; q < queries; ++q) pairs += length - queries + q + 1;
  report(std::string(name) + ", " + std::to_string(requests) + " x " + std::to_string(length), seconds / layers, layer,
         4.0 * requests * pairs * kHeads * kSize);
  munmap(cache, layer * layers);
}

// The sizes of DeepSeek's models: 16 heads are V2-Lite, 128 V2 and V3.
void latent_attention_of(const char *name, int64_t heads, int64_t requests, int64_t queries, int64_t length) {
  constexpr int64_t kNope = 128, kRope = 64, kV = 128, kLora = 512, kRow = kLora + kRope, kBlock = 16;
  const int64_t blocks = (length + kBlock - 1) / kBlock, slots = requests * blocks * kBlock;
  const int64_t cache_bytes = slots * kRow * 2, weight_bytes = heads * (kNope + kV) * kLora * 2;
  const int64_t layer = cache_bytes + weight_bytes, layers = std::max<int64_t>(1, (256 << 20) / layer);
  char *memory = allocate(layer * layers);
  for (int64_t i = 0; i < layer * layers / 2; ++i) reinterpret_cast<uint16_t *>(memory)[i] = 0x3c00 + (i & 0x83ff);
  std::vector<int32_t> table(requests * blocks), starts, lengths(requests, length);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  for (int64_t r = 0; r <= requests; ++r) starts.push_back(static_cast<int32_t>(r * queries));
  const std::vector<float> query(requests * queries * heads * (kNope + kRope), 0.1f);
  std::vector<float> out(requests * queries * heads * kV);
  MlaInputs in{};
  in.step.query = query.data();
  in.step.query_stride = heads * (kNope + kRope);
  in.step.num_tokens = requests * queries;
  in.step.block_table = table.data();
  in.step.num_requests = requests;
  in.step.max_blocks = blocks;
  in.step.query_start_loc = starts.data();
  in.step.seq_lens = lengths.data();
  in.step.num_heads = heads;
  in.step.block_size = kBlock;
  in.step.scale = 0.1f;
  in.step.out = out.data();
  in.nope = kNope;
  in.rope = kRope;
  in.v = kV;
  in.lora = kLora;
  const double seconds = median_seconds([&] {
    for (int64_t i = 0; i < layers; ++i) {
      in.step.cache = {memory + i * layer, DType::bf16, slots, 1, kRow};
      in.kv_b = {memory + i * layer + cache_bytes, DType::bf16};
      mla_attention(in);
    }
  });
  double pairs = 0;
  for (int64_t q = 0; q < queries; ++q) pairs += length - queries + q + 1;
  const bool expanded = mla_expands(in, queries, length);
  const double latents = expanded ? length : queries, per_pair = expanded ? kNope + kRope + kV : 2 * kLora + kRope;
  const double products = requests * heads * (latents * (kNope + kV) * kLora + pairs * per_pair);
  report(std::string(name) + ", " + std::to_string(heads) + " heads, " + std::to_string(requests) + " x " +
             std::to_string(length),
         seconds / layers, layer, 2 * products);
  munmap(memory, layer * layers);
}

void attentions() {
  for (int64_t requests : {1, 8, 32}) {
    for (int64_t length : {128, 316, 1024, 8192}) {
      if (requests * length <= 65536) attention_of("attention, decode", requests, 1, length);
    }
  }
  for (int64_t length : {128, 512, 2048}) attention_of("attention, prefill", 1, length, length);
}

void latent_attentions() {
  for (int64_t heads : {16, 128}) {
    for (int64_t requests : {1, 8, 32}) {
      for (int64_t length : {128, 1024, 8192}) {
        if (requests * length <= 32768) latent_attention_of("latents, decode", heads, requests, 1, length);
      }
    }
    for (int64_t length : {128, 1024}) latent_attention_of("latents, prefill", heads, 1, length, length);
  }
}

void rows() {
  constexpr int64_t kRows = 32768, kWidth = 1024;
  const std::vector<float> x(kRows * kWidth, 0.5f);
  std::vector<float> out(x.size());
  const std::vector<float> weight(kWidth, 1.0f);
  NormArgs norm{};
  norm.x = x.data();
  norm.out = out.data();
  norm.rows = kRows;
  norm.width = kWidth;
  norm.weight = {weight.data(), DType::f32};
  norm.norm = Norm::rms;
  norm.eps = 1e-6f;
  report("rms_norm, rows of 1024", median_seconds([&] { norm_rows(norm); }), 2.0 * x.size() * sizeof(float), 0);
  ActivationArgs gated{x.data(), out.data(), kRows / 2, kWidth, {Activation::silu, true}};
  report("silu_and_mul, rows of 2 x 1024", median_seconds([&] { activate_rows(gated); }),
         1.5 * x.size() * sizeof(float), 0);
}

}  // namespace

// The argument is the one family of kernels to run: linear, experts, quantized, attention, latents, sparse or rows.
int main(int argc, char **argv) {
  constexpr int64_t kMemory = 1 << 30;
  char *memory = allocate(kMemory);
  std::fill(memory, memory + kMemory, 1);
  peaks.bytes = kMemory / median_seconds([&] {
    parallel_for(kMemory >> 16, 1, [&](int64_t begin, int64_t end) { read_memory(memory, begin << 16, end << 16); });
  });
  munmap(memory, kMemory);
  const int64_t threads = num_threads();
  double operations = 0;
  const double seconds = median_seconds([&] {
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) operations = multiply_bf16() * threads;
    });
  });
  peaks.products = operations / seconds;
  std::printf("instruction set %s, %ld threads; peaks: read %.1f GB/s, %s %.0f GFLOP/s\n", isa_name(isa()),
              static_cast<long>(threads), peaks.bytes * 1e-9, kProducts, peaks.products * 1e-9);
  const std::string wanted = argc > 1 ? argv[1] : "";
  const auto runs = [&wanted](const char *family) { return wanted.empty() || wanted == family; };
  if (runs("linear")) linear_layers();
  if (runs("experts")) experts();
  if (runs("quantized")) {
    for (int bits : {8, 4}) quantized_layers(bits);
  }
  if (runs("attention")) attentions();
  if (runs("latents")) latent_attentions();
  if (runs("sparse")) sparse_attention();
  if (runs("rows")) rows();
}
