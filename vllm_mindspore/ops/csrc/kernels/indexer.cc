#include "indexer.h"

#include "mla_dot.h"
#include "mla_rows.h"
#include "norm_row.h"
#include "rotary_head.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

// Whether queries are rounded, and rows of the cache read as pairs in place.
VLLM_MS_INLINE bool in_pairs(const IndexerInputs &in) {
#if defined(__AVX512BF16__)
  return in.step.cache.dtype == DType::bf16 && in.step.cache.head_size % kPairs == 0;
#else
  (void)in;
  return false;
#endif
}

template <class T>
void write_tokens(const IndexerRowArgs &args) {
  const IndexerInputs &in = *args.inputs;
  const int64_t size = in.step.cache.head_size;
  float *key = args.workspace;
  for (int64_t token = args.begin; token < args.end; ++token) {
    const int64_t slot = in.slot_mapping[token];
    if (slot < 0 || slot >= in.step.cache.num_slots) continue;
    normalise_row(in.key_norm, in.key_weights + token * in.key_weights_stride,
                  [key](int64_t i, Vec v, int64_t n) { store_part(key + i, v, n); });
    transform_head(in.rotation, token, 0, key, key);
    convert(key, size, static_cast<T *>(in.step.cache.data) + slot * size);
  }
}

// The keys of a tile as rows that the products read: those of the cache, or float copies.
struct Tile {
  const void *rows[kTileKeys];

  Tile(const IndexerTaskArgs &args, int64_t start, int64_t end, float *copies) {
    const KvCache &cache = args.inputs->step.cache;
    const int64_t size = cache.head_size, padded = padded_head(size), bytes = size * dtype_size(cache.dtype);
    const bool direct = in_pairs(*args.inputs) || (cache.dtype == DType::f32 && size % kLanes == 0);
    int64_t slots[kTileKeys];
    find_slots(args.inputs->step, args.queries->request, start, start + end, slots);
    for (int64_t j = 0; j < kTileKeys; ++j) {
      rows[j] = static_cast<const char *>(cache.data) + slots[min_of(j, end - 1)] * bytes;
      if (direct || j >= end) continue;
      VLLM_MS_DISPATCH_FLOAT(cache.dtype, T, {
        convert_row(static_cast<const T *>(rows[j]), size, copies + j * padded);
      })
    }
    for (int64_t j = 0; j < kTileKeys && !direct; ++j) rows[j] = copies + min_of(j, end - 1) * padded;
  }
};

// products[head, key] = query . key
VLLM_MS_INLINE void multiply(const IndexerInputs &in, const IndexerQuery &query, const Tile &tile, int64_t end,
                             float *products) {
  const int64_t size = in.step.cache.head_size, padded = padded_head(size), heads = in.step.num_heads;
#if defined(__AVX512BF16__)
  if (in_pairs(in)) {
    return score_dot(reinterpret_cast<const bf16 *>(query.heads), size, heads, tile.rows, end, products,
                     {nullptr, 0, 0});
  }
#endif
  for_row_groups(heads, [&](auto R, int64_t head) {
    score_rows<R.value, float>(query.heads + head * padded, padded, tile.rows, 0, end, size,
                               products + head * kTileKeys, {nullptr, 0, 0});
  });
}

// scores[key] = sum over heads of weight * max(product, 0)
VLLM_MS_INLINE void add_heads(const float *products, const float *weights, int64_t heads, float *scores) {
  constexpr int kVecs = kTileKeys / kLanes;
  Vec sums[kVecs] = {};
  for (int64_t head = 0; head < heads; ++head) {
    const Vec weight = set1(weights[head]);
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) {
      sums[i] = fma(weight, vmax(load(products + head * kTileKeys + i * kLanes), zero()), sums[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kVecs; ++i) store(scores + i * kLanes, sums[i]);
}

}  // namespace

void indexer_write(const IndexerRowArgs &args) {
  VLLM_MS_DISPATCH_FLOAT(args.inputs->step.cache.dtype, T, { write_tokens<T>(args); })
}

void indexer_rotate(const IndexerQueryArgs &args) {
  const IndexerInputs &in = *args.inputs;
  const IndexerQuery &query = *args.query;
  const int64_t size = in.step.cache.head_size, padded = padded_head(size), heads = in.step.num_heads;
  const float *x = in.step.query + query.token * in.step.query_stride;
  std::memset(args.workspace, 0, padded * sizeof(float));
  for (int64_t head = 0; head < heads; ++head) {
    transform_head(in.rotation, query.token, head, x + head * size, args.workspace);
    if (in_pairs(in)) {
      convert(args.workspace, size, reinterpret_cast<bf16 *>(query.heads) + head * size);
    } else {
      std::memcpy(query.heads + head * padded, args.workspace, padded * sizeof(float));
    }
  }
}

void indexer_score(const IndexerTaskArgs &args) {
  const IndexerInputs &in = *args.inputs;
  const int64_t size = in.step.cache.head_size, heads = in.step.num_heads;
  Blocks blocks{args.workspace};
  float *products = blocks.take(heads * kTileKeys), *copies = blocks.take(kTileKeys * padded_head(size));
  std::memset(products, 0, heads * kTileKeys * sizeof(float));  // those behind a request's keys are not computed
  for (int64_t start = args.key_begin; start < args.key_end; start += kTileKeys) {
    const int64_t end = min_of(kTileKeys, args.key_end - start);
    const Tile tile(args, start, end, copies);
    for (int64_t i = 0; i < args.num_queries; ++i) {
      const IndexerQuery &query = args.queries[i];
      if (query.num_keys <= start) continue;
      multiply(in, query, tile, end, products);
      const float *weights = in.key_weights + query.token * in.key_weights_stride + size;
      add_heads(products, weights, heads, query.scores + start);
    }
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
