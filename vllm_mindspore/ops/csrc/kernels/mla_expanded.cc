// Attention of many queries to expanded keys and values, one head and one segment of a request's context at a time.
#include "mla.h"

#include "attention_tile.h"
#include "mla_dot.h"
#include "mla_rows.h"
#include "rotary_head.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

int64_t first_position(const MlaExpandedArgs &args) {
  const AttentionInputs &step = args.inputs->step;
  const int64_t request = args.segment->request;
  const int64_t queries = step.query_start_loc[request + 1] - step.query_start_loc[request];
  return step.seq_lens[request] - queries + args.first_query;
}

struct Task {
  const MlaExpandedArgs &args;
  const MlaInputs &in;
  int64_t size, key_width, value_width;  // nope + rope; it and v padded
  int64_t token, position;               // of the first query
  AttentionInputs step;                  // what softmax_row reads: scale and the accumulator's width
  float *query, *accumulator, *scores;   // [queries, key_width], [queries, value_width], [queries, kTileKeys]
  float *max, *sum;                      // [queries]
  float *keys, *values;                  // [kTileKeys, key_width], [kTileKeys, value_width]
  float *pairs;                          // as values, where they are put together in pairs
  float *zeros;                          // [key_width + value_width]

  explicit Task(const MlaExpandedArgs &a)
      : args(a),
        in(*a.inputs),
        size(in.nope + in.rope),
        key_width(padded_pairs(size)),
        value_width(padded_pairs(in.v)),
        step(in.step) {
    token = step.query_start_loc[a.segment->request] + a.first_query;
    position = first_position(a);
    step.cache.head_size = step.cache.value_size = in.v;
    Blocks blocks{a.workspace};
    query = blocks.take(a.num_queries * key_width);
    accumulator = blocks.take(a.num_queries * value_width);
    scores = blocks.take(a.num_queries * kTileKeys);
    max = blocks.take(a.num_queries);
    sum = blocks.take(a.num_queries);
    keys = blocks.take(kTileKeys * key_width);
    values = blocks.take(kTileKeys * value_width);
    pairs = blocks.take(kTileKeys * value_width);
    zeros = blocks.take(key_width + value_width);
    std::memset(zeros, 0, (key_width + value_width) * sizeof(float));
  }

  float *out(int64_t i) const { return step.out + ((token + i) * step.num_heads + args.head) * in.v; }
  int64_t state(int64_t i) const { return (token + i) * step.num_heads + args.head; }
};

void load_queries(const Task &t) {
  const bool first = t.args.segment->begin == 0;
  for (int64_t i = 0; i < t.args.num_queries; ++i) {
    const float *query = t.step.query + (t.token + i) * t.step.query_stride + t.args.head * t.size;
    float *row = t.query + i * t.key_width;
    std::memcpy(row, query, t.size * sizeof(float));
    if (t.step.query_transform != nullptr) {
      transform_head(*t.step.query_transform, t.token + i, t.args.head, row + t.in.nope, row + t.in.nope);
    }
    std::memset(row + t.size, 0, (t.key_width - t.size) * sizeof(float));
    float *accumulator = t.accumulator + i * t.value_width;
    std::memset(accumulator, 0, t.value_width * sizeof(float));
    if (!first) std::memcpy(accumulator, t.out(i), t.in.v * sizeof(float));
    t.max[i] = first ? -kInfinity : t.args.max[t.state(i)];
    t.sum[i] = first ? 0.0f : t.args.sum[t.state(i)];
  }
}

// Keys and values of positions [start, start + end), padded with zeros.
void load_tile(const Task &t, int64_t start, int64_t end) {
  const int64_t head = t.in.nope + t.in.v, stride = t.step.num_heads * head;
  const int64_t first = t.args.segment->row + start - t.args.segment->begin;
  for (int64_t j = 0; j < end; ++j) {
    const float *row = t.args.expanded + (first + j) * stride + t.args.head * head;
    float *key = t.keys + j * t.key_width, *value = t.values + j * t.value_width;
    std::memcpy(key, row, t.in.nope * sizeof(float));
    std::memcpy(key + t.in.nope, t.args.k_pe + (first + j) * t.in.rope, t.in.rope * sizeof(float));
    std::memset(key + t.size, 0, (t.key_width - t.size) * sizeof(float));
    std::memcpy(value, row + t.in.nope, t.in.v * sizeof(float));
    std::memset(value + t.in.v, 0, (t.value_width - t.in.v) * sizeof(float));
  }
}

// Takes keys that a query does not attend to out of its scores.
void mask_scores(const Task &t, int64_t i, int64_t start) {
  const MlaSegment &segment = *t.args.segment;
  if (segment.mask == nullptr) return;
  const uint64_t word = segment.mask[(t.args.first_query + i) * segment.mask_tiles + start / kTileKeys];
  if (word == ~uint64_t{0}) return;
  float *scores = t.scores + i * kTileKeys;
  UVec lane;
  for (int j = 0; j < kLanes; ++j) lane[j] = j;
  for (int64_t j = 0; j < kTileKeys; j += kLanes) {
    const UVec bits = UVec{} + static_cast<uint32_t>(word >> j);
    const IVec attended = reinterpret_cast<IVec>(((bits >> lane) & 1u) != 0u);
    store(scores + j, attended ? load(scores + j) : set1(-kInfinity));
  }
}

// Positions [start, start + end) against the queries from `first` on, the first one that sees any of them.
void attend_tile(const Task &t, int64_t start, int64_t end, int64_t first) {
  const void *keys[kTileKeys], *values[kTileKeys];
  for (int64_t j = 0; j < kTileKeys; ++j) {
    keys[j] = j < end ? t.keys + j * t.key_width : t.zeros;
    values[j] = j < end ? t.values + j * t.value_width : t.zeros;
  }
  const auto seen = [&](int64_t i) { return min_of(end, t.position + i + 1 - start); };  // keys of query i
  const Ahead none{nullptr, 0, 0};
  const int64_t count = t.args.num_queries - first;
  for_row_groups(count, [&](auto R, int64_t i) {
    score_rows<R.value, float>(t.query + (first + i) * t.key_width, t.key_width, keys, 0,
                               seen(first + i + R.value - 1), t.size, t.scores + (first + i) * kTileKeys, none);
  });
  for (int64_t i = first; i < t.args.num_queries; ++i) {
    mask_scores(t, i, start);
    softmax_row(t.step, t.scores + i * kTileKeys, 0, seen(i), 0.0f, 0,
                {t.accumulator + i * t.value_width, t.max + i, t.sum + i});
  }
  for_row_groups(count, [&](auto R, int64_t i) {
    float *accumulator = t.accumulator + (first + i) * t.value_width;
    const float *weights = t.scores + (first + i) * kTileKeys;
    const int64_t common = seen(first + i);
    accumulate_rows<R.value, float>(accumulator, t.value_width, weights, values, 0, common, t.in.v, none);
    for (int64_t r = 1; r < R.value; ++r) {
      accumulate_rows<1, float>(accumulator + r * t.value_width, t.value_width, weights + r * kTileKeys, values, common,
                                seen(first + i + r), t.in.v, none);
    }
  });
}

#if defined(__AVX512BF16__)
void round_queries(const Task &t) {
  bf16 *rounded = reinterpret_cast<bf16 *>(t.query);  // in place: a row's half is behind its source
  for (int64_t i = 0; i < t.args.num_queries * t.key_width; i += kLanes) store(rounded + i, load(t.query + i));
}

// As load_tile; keys as bf16 rows, values in pairs.
void load_tile_dot(const Task &t, int64_t start, int64_t end) {
  const int64_t head = t.in.nope + t.in.v, stride = t.step.num_heads * head;
  const int64_t first = t.args.segment->row + start - t.args.segment->begin;
  bf16 *keys = reinterpret_cast<bf16 *>(t.keys), *values = reinterpret_cast<bf16 *>(t.values);
  const void *rows[kTileKeys];
  for (int64_t j = 0; j < kTileKeys; ++j) {
    rows[j] = t.zeros;
    if (j >= end) continue;
    const float *row = t.args.expanded + (first + j) * stride + t.args.head * head;
    bf16 *key = keys + j * t.key_width, *value = values + j * t.value_width;
    convert(row, t.in.nope, key);
    convert(t.args.k_pe + (first + j) * t.in.rope, t.in.rope, key + t.in.nope);
    std::memset(key + t.size, 0, (t.key_width - t.size) * sizeof(bf16));
    convert(row + t.in.nope, t.in.v, value);
    std::memset(value + t.in.v, 0, (t.value_width - t.in.v) * sizeof(bf16));
    rows[j] = value;
  }
  pair_values(rows, end, t.value_width, reinterpret_cast<bf16 *>(t.pairs));
}

// As attend_tile. Weights of keys that a query does not see are zero.
void attend_tile_dot(const Task &t, int64_t start, int64_t end, int64_t first) {
  const bf16 *tile = reinterpret_cast<const bf16 *>(t.keys), *query = reinterpret_cast<const bf16 *>(t.query);
  const void *keys[kTileKeys];
  for (int64_t j = 0; j < kTileKeys; ++j) {
    keys[j] = j < end ? static_cast<const void *>(tile + j * t.key_width) : t.zeros;
  }
  const int64_t count = t.args.num_queries - first;
  score_dot(query + first * t.key_width, t.key_width, count, keys, end, t.scores + first * kTileKeys,
            {nullptr, 0, 0});
  bf16 *weights = reinterpret_cast<bf16 *>(t.scores);  // in place, as the queries
  for (int64_t i = first; i < t.args.num_queries; ++i) {
    const int64_t seen = min_of(end, t.position + i + 1 - start);
    mask_scores(t, i, start);
    softmax_row(t.step, t.scores + i * kTileKeys, 0, seen, 0.0f, 0,
                {t.accumulator + i * t.value_width, t.max + i, t.sum + i});
    round_weights(t.scores + i * kTileKeys, 0, seen, weights + i * kTileKeys);
  }
  accumulate_dot(t.accumulator + first * t.value_width, t.value_width, count, weights + first * kTileKeys,
                 reinterpret_cast<const bf16 *>(t.pairs), end, t.value_width, {nullptr, 0, 0});
}
#endif

void store_states(const Task &t) {
  for (int64_t i = 0; i < t.args.num_queries; ++i) {
    float *accumulator = t.accumulator + i * t.value_width;
    if (t.position + i < t.args.segment->end) {  // no later segment has a key of this query
      const Vec scale = set1(1.0f / t.sum[i]);
      for (int64_t d = 0; d < t.value_width; d += kLanes) store(accumulator + d, load(accumulator + d) * scale);
    }
    std::memcpy(t.out(i), accumulator, t.in.v * sizeof(float));
    t.args.max[t.state(i)] = t.max[i];
    t.args.sum[t.state(i)] = t.sum[i];
  }
}

}  // namespace

void mla_attend_expanded(const MlaExpandedArgs &args) {
  const MlaSegment &segment = *args.segment;
  const int64_t skipped = min_of(max_of(0, segment.begin - first_position(args)), args.num_queries);
  if (skipped == args.num_queries) return;  // queries before the segment are complete
  MlaExpandedArgs rest = args;
  rest.first_query += skipped;
  rest.num_queries -= skipped;
  const Task t(rest);
  load_queries(t);
#if defined(__AVX512BF16__)
  const bool dot = expands_to_pairs(t.in);
  if (dot) round_queries(t);
#endif
  const int64_t last = min_of(segment.end, t.position + rest.num_queries);
  for (int64_t start = segment.begin; start < last; start += kTileKeys) {
    const int64_t end = min_of(kTileKeys, last - start), first = max_of(0, start - t.position);
#if defined(__AVX512BF16__)
    if (dot) {
      load_tile_dot(t, start, end);
      attend_tile_dot(t, start, end, first);
      continue;
    }
#endif
    load_tile(t, start, end);
    attend_tile(t, start, end, first);
  }
  store_states(t);
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
