#include "attention.h"

#include "attention_amx.h"
#include "attention_bf16.h"
#include "attention_tile.h"
#include "rotary_head.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

VLLM_MS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
VLLM_MS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

struct KeyRange {
  int32_t begin, end;  // relative to the tile; empty when begin >= end
};

// Memory of a task; see AttentionTask for the order of rows.
struct Workspace {
  float *query, *accumulator, *total;        // [rows, padded]
  float *scores;                             // [rows, kTileKeys]
  float *max, *sum, *total_max, *total_sum;  // [rows]
  float *slopes;                             // [rows], ALiBi
  KeyRange *ranges;                          // [rows of one head], what each row sees of the present tile
  float *keys, *values;                      // [kTileKeys, padded], for cache rows that need conversion
  float *zeros;                              // [padded]
  bf16 *query_tiles;                         // [rows, 2, padded] and
  bf16 *weights;                             // [rows, 2, kTileKeys], where the tiles of amx.h do the products
};

struct Task {
  AttentionInputs in;
  AttentionTask task;
  Workspace work;
  int64_t padded, group, rows_per_head, rows;
  int64_t token, position;  // of the first query
};

Task make_task(const AttentionTaskArgs &args) {
  Task t;
  t.in = *args.inputs;
  t.task = *args.task;
  t.padded = padded_head(t.in.cache.head_size);
  t.group = t.in.num_heads / t.in.cache.num_kv_heads;
  t.rows_per_head = t.task.num_queries * t.group;
  t.rows = t.task.num_heads * t.rows_per_head;
  const int64_t start = t.in.query_start_loc[t.task.request];
  const int64_t length = t.in.query_start_loc[t.task.request + 1] - start;
  t.token = start + t.task.first_query;
  t.position = t.in.num_sinks + t.in.seq_lens[t.task.request] - length + t.task.first_query;

  float *next = args.workspace;
  const auto take = [&next](int64_t count) {
    float *block = next;
    next += (count + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
    return block;
  };
  Workspace &w = t.work;
  w.query = take(t.rows * t.padded);
  w.accumulator = take(t.rows * t.padded);
  w.total = take(t.rows * t.padded);
  w.scores = take(t.rows * kTileKeys);
  w.max = take(t.rows);
  w.sum = take(t.rows);
  w.total_max = take(t.rows);
  w.total_sum = take(t.rows);
  w.slopes = take(t.rows);
  w.ranges = reinterpret_cast<KeyRange *>(take(2 * t.rows_per_head));
  w.keys = take(kTileKeys * t.padded);
  w.values = take(kTileKeys * t.padded);
  w.zeros = take(t.padded);
  w.query_tiles = reinterpret_cast<bf16 *>(take(t.rows * t.padded));
  w.weights = reinterpret_cast<bf16 *>(take(t.rows * kTileKeys));
  std::memset(w.zeros, 0, t.padded * sizeof(float));
  return t;
}

VLLM_MS_INLINE int64_t query_of(const Task &t, int64_t row) { return row % t.rows_per_head / t.group; }
VLLM_MS_INLINE int64_t head_of(const Task &t, int64_t row) {
  return (t.task.first_head + row / t.rows_per_head) * t.group + row % t.group;
}

constexpr int64_t kRowsAhead = 8;  // of queries and results: rows lie too far apart for the processor's own prefetching

float weight_at(const Weight &weight, int64_t i) {
  VLLM_MS_DISPATCH_FLOAT(weight.dtype, T, { return to_float(static_cast<const T *>(weight.data)[i]); })
}

void load_queries(const Task &t) {
  const int64_t size = t.in.cache.head_size;
  const auto query_at = [&](int64_t row) {
    return t.in.query + (t.token + query_of(t, row)) * t.in.query_stride + head_of(t, row) * size;
  };
  for (int64_t row = 0; row < t.rows; ++row) {
    const int64_t token = t.token + query_of(t, row), head = head_of(t, row);
    const float *query = query_at(row);
    if (row + kRowsAhead < t.rows) prefetch_row(query_at(row + kRowsAhead), size);
    float *out = t.work.query + row * t.padded;
    if (t.in.query_transform != nullptr) {
      transform_head(*t.in.query_transform, token, head, query, out);
    } else {
      std::memcpy(out, query, size * sizeof(float));
    }
    std::memset(out + size, 0, (t.padded - size) * sizeof(float));
    t.work.slopes[row] = t.in.alibi_slopes ? weight_at(t.in.alibi_slopes, head) : 0.0f;
  }
#if defined(__AMX_BF16__)
  if (!fits_amx(t.in.cache)) return;
  for (int64_t first = 0; first < t.rows; first += t.rows_per_head) {
    pack_amx_queries(t.work.query + first * t.padded, t.padded, t.rows_per_head, size,
                     reinterpret_cast<bf16 *>(t.work.keys), t.work.query_tiles + 2 * first * t.padded);
  }
#elif defined(VLLM_MS_ATTENTION_BF16)
  if (!fits_bf16(t.in.cache)) return;
  for (int64_t row = 0; row < t.rows; ++row) {
    round_query(t.work.query + row * t.padded, size, t.work.query_tiles + row * size);
  }
#endif
}

float *result_at(const Task &t, int64_t row) {
  return t.in.out + ((t.token + query_of(t, row)) * t.in.num_heads + head_of(t, row)) * t.in.cache.value_size;
}

// Divides by the denominator, to which a sink adds one term that carries no value.
void write_row(const Task &t, int64_t row, const RowState &total) {
  const int64_t size = t.in.cache.value_size, head = head_of(t, row);
  float numerator = 1.0f, sum = *total.sum;
  if (t.in.sinks) {
    const float sink = weight_at(t.in.sinks, head);
    const float highest = sink > *total.max ? sink : *total.max;
    numerator = softmax_exp(*total.max - highest);
    sum = fma(set1(sum), set1(numerator), softmax_exp(set1(sink - highest)))[0];
  }
  const Vec scale = set1(sum == 0 ? 0.0f : numerator / sum);
  float *out = result_at(t, row);
  if (row + kRowsAhead < t.rows) prefetch_row(result_at(t, row + kRowsAhead), size);
  int64_t d = 0;
#if defined(VLLM_MS_ATTENTION_BF16)
  if (fits_bf16(t.in.cache)) {
    for (; d < size; d += kLanes) store(out + d, unpaired(total.accumulator, d) * scale);
  }
#endif
  for (; d + kLanes <= size; d += kLanes) store(out + d, load(total.accumulator + d) * scale);
  if (d < size) store_n(out + d, load(total.accumulator + d) * scale, size - d);
}

// The cache slots of keys [begin, end) of the tile starting at position `tile`; those of sinks are negative.
void find_slots(const Task &t, int64_t tile, int64_t begin, int64_t end, int64_t *slots) {
  tile -= t.in.num_sinks;
  for (; begin < end && tile + begin < 0; ++begin) slots[begin] = tile + begin;
  if (begin >= end) return;
  const int32_t *blocks = t.in.block_table + t.task.request * t.in.max_blocks;
  int64_t block = (tile + begin) / t.in.block_size, offset = (tile + begin) % t.in.block_size;
  for (int64_t j = begin; j < end; ++j) {
    slots[j] = blocks[block] * t.in.block_size + offset;
    if (++offset == t.in.block_size) {
      offset = 0;
      ++block;
    }
  }
}

template <class T>
VLLM_MS_INLINE void convert_row(const T *row, int64_t size, float *out) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store(out + d, widen(row + d));
  if (d < size) store(out + d, load_n(row + d, size - d));
}

struct Tile {
  int64_t start;       // position of its first key
  int64_t begin, end;  // the keys in use, relative to start
  int64_t slots[kTileKeys];
  const void *keys[kTileKeys], *values[kTileKeys];  // rows of whole vectors; zeros where not in use
  const char *ahead[kTileKeys];                     // rows of the next tile, for prefetching
  int64_t half_bytes;                               // of a row in the cache: its key
};

constexpr int64_t kDirectRows = 8;

// Whether rows of the cache are used as they are, rather than through a float copy: where so few rows of the task read
// them that converting them each time is faster than a copy.
template <class T>
VLLM_MS_INLINE bool reads_directly(const Task &t) {
  const bool whole_vectors = t.in.cache.head_size % kLanes == 0 && t.in.cache.value_size % kLanes == 0;
  return whole_vectors && (sizeof(T) == sizeof(float) || t.rows_per_head <= kDirectRows);
}

// The row of a KV head at a slot that find_slots has found.
template <class T>
VLLM_MS_INLINE const T *row_at(const AttentionInputs &in, int64_t slot, int64_t head) {
  const void *rows = in.cache.data;
  if (slot < 0) {
    rows = in.sink_kv;
    slot += in.num_sinks;
  }
  return static_cast<const T *>(rows) + (slot * in.cache.num_kv_heads + head) * row_size(in.cache);
}

// Points tile.keys and tile.values at one KV head's rows, in the cache (`direct`) or converted to float; and tile.ahead
// at those in slots `next` of `next_head`, which come after these.
template <class T>
VLLM_MS_NOINLINE void load_rows(const Task &t, int64_t head, const int64_t *next, int64_t next_head, bool direct,
                                Tile &tile) {
  const int64_t size = t.in.cache.head_size;
  tile.half_bytes = size * sizeof(T);
  for (int64_t j = 0; j < kTileKeys; ++j) {
    if (j < tile.begin || j >= tile.end) {
      tile.ahead[j] = static_cast<const char *>(t.in.cache.data);
      tile.keys[j] = tile.values[j] = t.work.zeros;
      continue;
    }
    tile.ahead[j] = reinterpret_cast<const char *>(row_at<T>(t.in, next[j], next_head));
    const T *row = row_at<T>(t.in, tile.slots[j], head);
    if (direct) {
      tile.keys[j] = row;
      tile.values[j] = row + size;
      continue;
    }
    float *key = t.work.keys + j * t.padded, *value = t.work.values + j * t.padded;
    convert_row(row, size, key);
    convert_row(row + size, t.in.cache.value_size, value);
    tile.keys[j] = key;
    tile.values[j] = value;
  }
}

void find_ranges(const Task &t, const Tile &tile) {
  KeyRange *range = t.work.ranges;
  for (int64_t query = 0; query < t.task.num_queries; ++query) {
    const int64_t position = t.position + query;
    const int64_t begin = min_of(max_of(first_key(t.in, position) - tile.start, tile.begin), kTileKeys);
    const int64_t end = max_of(min_of(position + 1 - tile.start, tile.end), 0);
    for (int64_t member = 0; member < t.group; ++member) {
      *range++ = {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
    }
  }
}

template <int R, class T>
void accumulate_group(const Task &t, const Tile &tile, const KeyRange *ranges, float *accumulator,
                      const float *weights, Ahead ahead) {
  const int64_t size = t.in.cache.value_size;
  const auto one_by_one = [&](int64_t from, int64_t to) {
    for (int64_t r = 0; r < R; ++r) {
      const int64_t begin = max_of(from, ranges[r].begin), end = min_of(to, ranges[r].end);
      if (begin >= end) continue;
      accumulate_rows<1, T>(accumulator + r * t.padded, t.padded, weights + r * kTileKeys, tile.values, begin, end,
                            size, {tile.ahead, 0, 0});
    }
  };
  // What all rows see, since later rows do not begin or end earlier.
  const int64_t begin = ranges[R - 1].begin, end = max_of(ranges[0].end, begin);
  if (ranges[0].begin < begin) one_by_one(tile.begin, begin);
  if (begin < end) accumulate_rows<R, T>(accumulator, t.padded, weights, tile.values, begin, end, size, ahead);
  if (end < ranges[R - 1].end) one_by_one(end, tile.end);
}

// One tile against the rows of one KV head; T is the type of tile.keys and tile.values.
template <class T>
void attend(const Task &t, const Tile &tile, int64_t head) {
  const int64_t size = t.in.cache.head_size, first = (head - t.task.first_head) * t.rows_per_head;
  const float *query = t.work.query + first * t.padded;
  float *scores = t.work.scores + first * kTileKeys, *accumulator = t.work.accumulator + first * t.padded;
  float *max = t.work.max + first, *sum = t.work.sum + first;
  const KeyRange *ranges = t.work.ranges;
  for_row_groups(t.rows_per_head, [&](auto R, int64_t row) {
    score_rows<R.value, T>(query + row * t.padded, t.padded, tile.keys, ranges[row].begin,
                           ranges[row + R.value - 1].end, size, scores + row * kTileKeys,
                           {tile.ahead, 0, row == 0 ? tile.half_bytes : 0});
  });
  for (int64_t row = 0; row < t.rows_per_head; ++row) {
    if (ranges[row].begin >= ranges[row].end) continue;
    const int64_t distance = t.in.alibi_slopes ? tile.start - (t.position + row / t.group) : 0;
    softmax_row(t.in, scores + row * kTileKeys, ranges[row].begin, ranges[row].end, t.work.slopes[first + row],
                distance, {accumulator + row * t.padded, max + row, sum + row});
  }
  for_row_groups(t.rows_per_head, [&](auto R, int64_t row) {
    accumulate_group<R.value, T>(t, tile, ranges + row, accumulator + row * t.padded, scores + row * kTileKeys,
                                 {tile.ahead, tile.half_bytes, row == 0 ? tile.half_bytes : 0});
  });
}

#if defined(__AMX_BF16__)
// As attend, for a cache that fits_amx.
VLLM_MS_NOINLINE void attend_amx(const Task &t, const Tile &tile, int64_t head) {
  const int64_t size = t.in.cache.head_size, first = (head - t.task.first_head) * t.rows_per_head;
  const bf16 *queries = t.work.query_tiles + 2 * first * t.padded;
  float *scores = t.work.scores + first * kTileKeys, *accumulator = t.work.accumulator + first * t.padded;
  bf16 *weights = t.work.weights + 2 * first * kTileKeys;
  const KeyRange *ranges = t.work.ranges;
  const AmxKeys keys{reinterpret_cast<bf16 *>(t.work.keys), reinterpret_cast<bf16 *>(t.work.values)};
  pack_amx_keys(tile.keys, tile.values, t.in.cache, {tile.ahead, 0, 2 * tile.half_bytes}, keys);
  const int64_t count = min_of(kAmxRows, t.rows_per_head);
  AmxTiles tiles(kAmxRows, kAmxRows, count, count);
  const auto for_blocks = [&](auto body) {  // (first row, rows, begin and end of the keys that any of them sees)
    for (int64_t row = 0; row < t.rows_per_head; row += kAmxRows) {
      const int64_t rows = min_of(kAmxRows, t.rows_per_head - row);
      const int64_t begin = ranges[row].begin, end = ranges[row + rows - 1].end;
      if (begin < end) body(row, rows, begin, end);
    }
  };
  for_blocks([&](int64_t row, int64_t rows, int64_t begin, int64_t end) {
    score_amx(tiles, queries + 2 * row * size, rows, keys, begin, end, size, scores + row * kTileKeys);
  });
  for (int64_t row = 0; row < t.rows_per_head; ++row) {
    const bool seen = ranges[row].begin < ranges[row].end;
    if (seen) {
      const int64_t distance = t.in.alibi_slopes ? tile.start - (t.position + row / t.group) : 0;
      softmax_row(t.in, scores + row * kTileKeys, ranges[row].begin, ranges[row].end, t.work.slopes[first + row],
                  distance, {accumulator + row * t.padded, t.work.max + first + row, t.work.sum + first + row});
    }
    pack_amx_weights(scores + row * kTileKeys, seen ? ranges[row].begin : 0, seen ? ranges[row].end : 0,
                     weights + 2 * row * kTileKeys);
  }
  for_blocks([&](int64_t row, int64_t rows, int64_t begin, int64_t end) {
    accumulate_amx(tiles, accumulator + row * t.padded, t.padded, weights + 2 * row * kTileKeys, rows, keys,
                   begin, end, t.in.cache.value_size);
  });
}
#endif

#if defined(VLLM_MS_ATTENTION_BF16)
// Calls body(rows, row) for groups of up to `Most` rows, about equally many in each.
template <int Most, class Body>
VLLM_MS_INLINE void for_equal_groups(int64_t rows, Body body) {
  const int64_t groups = (rows + Most - 1) / Most;
  for (int64_t i = 0, row = 0; i < groups; ++i) {
    const int64_t count = (rows - row + groups - i - 1) / (groups - i);
    with_count<Most>(count, [&](auto R) { body(R, row); });
    row += count;
  }
}

// As attend, for a cache that fits_bf16.
VLLM_MS_NOINLINE void attend_bf16(const Task &t, const Tile &tile, int64_t head) {
  const int64_t value_size = t.in.cache.value_size;
  const int64_t size = t.in.cache.head_size, first = (head - t.task.first_head) * t.rows_per_head;
  const bf16 *queries = t.work.query_tiles + first * size;
  float *scores = t.work.scores + first * kTileKeys, *accumulator = t.work.accumulator + first * t.padded;
  bf16 *weights = t.work.weights + first * kTileKeys;
  bf16 *values = reinterpret_cast<bf16 *>(t.work.values);
  const KeyRange *ranges = t.work.ranges;
  if (t.rows_per_head >= kTurnRows) {
    bf16 *keys = reinterpret_cast<bf16 *>(t.work.keys);
    turn_keys(tile.keys, tile.begin, tile.end, size, {tile.ahead, 0, tile.half_bytes}, keys);
    for_equal_groups<kScoreRows>(t.rows_per_head, [&](auto R, int64_t row) {
      score_turned<R()>(queries + row * size, keys, ranges[row].begin, ranges[row + R() - 1].end, size,
                        scores + row * kTileKeys);
    });
  } else {
    for_row_groups(t.rows_per_head, [&](auto R, int64_t row) {
      score_pairs<R.value>(queries + row * size, tile.keys, ranges[row].begin, ranges[row + R.value - 1].end, size,
                           scores + row * kTileKeys, {tile.ahead, 0, row == 0 ? tile.half_bytes : 0});
    });
  }
  const bool plain = t.in.soft_cap == 0 && !t.in.alibi_slopes;
  for (int64_t row = 0; row < t.rows_per_head; ++row) {
    const RowState state{accumulator + row * t.padded, t.work.max + first + row, t.work.sum + first + row};
    const KeyRange seen = ranges[row];
    if (plain && seen.begin == 0 && seen.end == kTileKeys) {
      softmax_whole_row(t.in, scores + row * kTileKeys, weights + row * kTileKeys, state);
      continue;
    }
    const bool any = seen.begin < seen.end;
    if (any) {
      const int64_t distance = t.in.alibi_slopes ? tile.start - (t.position + row / t.group) : 0;
      softmax_row(t.in, scores + row * kTileKeys, seen.begin, seen.end, t.work.slopes[first + row], distance, state);
    }
    round_weights(scores + row * kTileKeys, any ? seen.begin : 0, any ? seen.end : 0, weights + row * kTileKeys);
  }
  if (t.rows_per_head > kFewRows) {
    pair_values(tile.values, tile.begin / 2 * 2, (tile.end + 1) / 2 * 2, value_size,
                {tile.ahead, tile.half_bytes, tile.half_bytes}, values);
    for_equal_groups<kValueRows>(t.rows_per_head, [&](auto R, int64_t row) {
      const int64_t begin = ranges[row].begin / 2 * 2, end = (ranges[row + R() - 1].end + 1) / 2 * 2;
      accumulate_rows_paired<R()>(accumulator + row * t.padded, t.padded, weights + row * kTileKeys, values, begin, end,
                                  value_size);
    });
    return;
  }
  for_row_groups(t.rows_per_head, [&](auto R, int64_t row) {
    const int64_t begin = ranges[row].begin / 2 * 2, end = (ranges[row + R.value - 1].end + 1) / 2 * 2;
    if (begin >= end) return;
    accumulate_rows_bf16<R.value>(accumulator + row * t.padded, t.padded, weights + row * kTileKeys, tile.values, begin,
                                  end, value_size, {tile.ahead, tile.half_bytes, row == 0 ? tile.half_bytes : 0});
  });
}
#endif

// Visits the keys of one split, positions [begin, end), begin a multiple of kTileKeys.
void run_split(const Task &t, int64_t begin, int64_t end, Tile &tile) {
  const int64_t last_head = t.task.first_head + t.task.num_heads - 1;
  int64_t following[kTileKeys];
  for (int64_t start = begin; start < end; start += kTileKeys) {
    tile.start = start;
    tile.begin = max_of(t.task.key_begin - start, 0);
    tile.end = min_of(t.task.key_end - start, kTileKeys);
    for (int64_t j = 0; j < kTileKeys; ++j) following[j] = 0;
    find_slots(t, start, tile.begin, tile.end, tile.slots);
    find_slots(t, start + kTileKeys, 0, min_of(t.task.key_end - start - kTileKeys, kTileKeys), following);
    find_ranges(t, tile);
    for (int64_t head = t.task.first_head; head <= last_head; ++head) {
      const bool last = head == last_head;
      const int64_t *next = last ? following : tile.slots;
      const int64_t next_head = last ? t.task.first_head : head + 1;
#if defined(__AMX_BF16__)
      if (fits_amx(t.in.cache)) {
        load_rows<bf16>(t, head, next, next_head, true, tile);
        attend_amx(t, tile, head);
        continue;
      }
#elif defined(VLLM_MS_ATTENTION_BF16)
      if (fits_bf16(t.in.cache)) {
        load_rows<bf16>(t, head, next, next_head, true, tile);
        attend_bf16(t, tile, head);
        continue;
      }
#endif
      VLLM_MS_DISPATCH_FLOAT(t.in.cache.dtype, T, {
        load_rows<T>(t, head, next, next_head, reads_directly<T>(t), tile);
        if (reads_directly<T>(t)) {
          attend<T>(t, tile, head);
        } else {
          attend<float>(t, tile, head);
        }
      })
    }
  }
}

}  // namespace

void run_attention(const AttentionTaskArgs &args) {
  const Task t = make_task(args);
  const Workspace &w = t.work;
  const int64_t size = t.in.cache.value_size, state = attention_state(t.in.cache.head_size);
  float *partial = t.task.partial;
  Tile tile;
  load_queries(t);
  if (partial == nullptr) clear(w.total_max, w.total_sum, w.total, t.rows, t.padded);
  for (int64_t begin = t.task.key_begin / kSplitKeys * kSplitKeys; begin < t.task.key_end; begin += kSplitKeys) {
    clear(w.max, w.sum, w.accumulator, t.rows, t.padded);
    run_split(t, max_of(begin, t.task.key_begin / kTileKeys * kTileKeys), min_of(begin + kSplitKeys, t.task.key_end),
              tile);
    for (int64_t row = 0; row < t.rows; ++row) {
      const float *accumulator = w.accumulator + row * t.padded;
      if (partial == nullptr) {
        const RowState total{w.total + row * t.padded, w.total_max + row, w.total_sum + row};
        fold(w.max[row], w.sum[row], accumulator, total, size);
      } else {
        std::memcpy(partial, accumulator, t.padded * sizeof(float));
        partial[t.padded] = w.max[row];
        partial[t.padded + 1] = w.sum[row];
        partial += state;
      }
    }
  }
  if (partial != nullptr) return;
  for (int64_t row = 0; row < t.rows; ++row) {
    write_row(t, row, {w.total + row * t.padded, w.total_max + row, w.total_sum + row});
  }
}

void merge_attention(const AttentionTaskArgs &args) {
  const Task t = make_task(args);
  const Workspace &w = t.work;
  const int64_t state = attention_state(t.in.cache.head_size);
  const int64_t splits = (t.task.key_end - 1) / kSplitKeys - t.task.key_begin / kSplitKeys + 1;
  clear(w.total_max, w.total_sum, w.total, t.rows, t.padded);
  for (int64_t row = 0; row < t.rows; ++row) {
    const RowState total{w.total + row * t.padded, w.total_max + row, w.total_sum + row};
    for (int64_t split = 0; split < splits; ++split) {
      const float *partial = t.task.partial + (split * t.rows + row) * state;
      fold(partial[t.padded], partial[t.padded + 1], partial, total, t.in.cache.value_size);
    }
    write_row(t, row, total);
  }
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
