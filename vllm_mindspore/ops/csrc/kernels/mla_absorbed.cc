// Attention to latents: all heads of a query against the same rows, whose first part is also what they sum.
#include "mla.h"

#include "attention_tile.h"
#include "mla_dot.h"
#include "mla_rows.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

struct Task {
  const MlaInputs &in;
  const MlaTask &task, &next;
  int64_t row, width;   // padded lora + rope, padded lora
  AttentionInputs step;  // what softmax_row reads: scale and the accumulator's width
  float *query, *accumulator, *total;  // [heads, row], [heads, width], [heads, width]
  float *scores;                       // [heads, kTileKeys]
  float *max, *sum, *total_max, *total_sum;
  float *tile;  // [kTileKeys, row]: the tile's rows as float, or bf16 pairs of values
  float *zeros;  // [row]

  explicit Task(const MlaTaskArgs &args)
      : in(*args.inputs),
        task(*args.task),
        next(*args.next),
        row(padded_head(mla_row(in))),
        width(padded_head(in.lora)),
        step(in.step) {
    const int64_t heads = task.num_heads;
    step.cache.head_size = step.cache.value_size = in.lora;
    Blocks blocks{args.workspace};
    query = blocks.take(heads * row);
    accumulator = blocks.take(heads * width);
    total = blocks.take(heads * width);
    scores = blocks.take(heads * kTileKeys);
    max = blocks.take(heads);
    sum = blocks.take(heads);
    total_max = blocks.take(heads);
    total_sum = blocks.take(heads);
    tile = blocks.take(kTileKeys * row);
    zeros = blocks.take(row);
    std::memset(zeros, 0, row * sizeof(float));
  }

  RowState state(int64_t head) const { return {accumulator + head * width, max + head, sum + head}; }
  RowState total_state(int64_t head) const { return {total + head * width, total_max + head, total_sum + head}; }
};

// The cache slots of a task's keys [begin, end).
VLLM_MS_INLINE void find_keys(const MlaInputs &in, const MlaTask &task, int64_t begin, int64_t end, int64_t *slots) {
  if (task.selected != nullptr) {
    find_selected(in.step, task.request, task.selected, begin, end, slots);
  } else {
    find_slots(in.step, task.request, begin, end, slots);
  }
}

// Rows of the cache for keys [start, start + end), zeros for the other keys of the tile; `ahead`: of the next tile,
// after the last one of the next task's first.
struct TileRows {
  const void *rows[kTileKeys];
  const char *ahead[kTileKeys];

  TileRows(const Task &t, int64_t start, int64_t end) {
    const int64_t bytes = mla_row(t.in) * dtype_size(t.in.step.cache.dtype);
    const char *cache = static_cast<const char *>(t.in.step.cache.data);
    const bool last = start + kTileKeys >= t.task.key_end;
    const MlaTask &after = last ? t.next : t.task;
    const int64_t begin = last ? after.key_begin : start + kTileKeys;
    const int64_t count = min_of(kTileKeys, after.key_end - begin);
    int64_t slots[kTileKeys], next_slots[kTileKeys];
    find_keys(t.in, t.task, start, start + end, slots);
    find_keys(t.in, after, begin, begin + count, next_slots);
    for (int64_t j = 0; j < kTileKeys; ++j) {
      rows[j] = j < end ? cache + slots[j] * bytes : reinterpret_cast<const char *>(t.zeros);
      ahead[j] = cache + (j < count ? next_slots[j] : next_slots[0]) * bytes;
    }
  }
};

void softmax(const Task &t, int64_t end) {
  for (int64_t head = 0; head < t.task.num_heads; ++head) {
    softmax_row(t.step, t.scores + head * kTileKeys, 0, end, 0.0f, 0, t.state(head));
  }
}

// One tile on float rows, converted unless they are such in the cache.
template <class T>
VLLM_MS_NOINLINE void attend_tile(const Task &t, int64_t start, int64_t end) {
  TileRows keys(t, start, end);
  const int64_t size = mla_row(t.in), bytes = size * static_cast<int64_t>(sizeof(T));
  const bool direct = sizeof(T) == sizeof(float) && t.in.lora % kLanes == 0 && t.in.rope % kLanes == 0;
  if (!direct) {
    for (int64_t j = 0; j < end; ++j) {
      prefetch({keys.ahead, 0, bytes}, j);
      convert_row(static_cast<const T *>(keys.rows[j]), size, t.tile + j * t.row);
      keys.rows[j] = t.tile + j * t.row;
    }
  }
  for_row_groups(t.task.num_heads, [&](auto R, int64_t head) {
    const Ahead ahead{keys.ahead, 0, direct && head == 0 ? bytes : 0};
    score_rows<R.value, float>(t.query + head * t.row, t.row, keys.rows, 0, end, size, t.scores + head * kTileKeys,
                               ahead);
  });
  softmax(t, end);
  for_row_groups(t.task.num_heads, [&](auto R, int64_t head) {
    accumulate_rows<R.value, float>(t.accumulator + head * t.width, t.width, t.scores + head * kTileKeys, keys.rows, 0,
                                    end, t.in.lora, {keys.ahead, 0, 0});
  });
}

#if defined(__AVX512BF16__)
// As attend_tile, for a cache that fits_dot. The queries are bf16 by now, and the rounded weights replace the scores.
VLLM_MS_NOINLINE void attend_tile_dot(const Task &t, int64_t start, int64_t end) {
  const TileRows keys(t, start, end);
  const int64_t size = mla_row(t.in);
  const bf16 *query = reinterpret_cast<const bf16 *>(t.query);
  bf16 *values = reinterpret_cast<bf16 *>(t.tile);
  pair_values(keys.rows, end, t.in.lora, values);
  score_dot(query, size, t.task.num_heads, keys.rows, end, t.scores, {keys.ahead, 0, size * 2});
  softmax(t, end);
  bf16 *weights = reinterpret_cast<bf16 *>(t.scores);
  for (int64_t head = 0; head < t.task.num_heads; ++head) {
    round_weights(t.scores + head * kTileKeys, 0, end, weights + head * kTileKeys);
  }
  accumulate_dot(t.accumulator, t.width, t.task.num_heads, weights, values, end, t.in.lora, {nullptr, 0, 0});
}

void round_queries(const Task &t) {
  bf16 *rounded = reinterpret_cast<bf16 *>(t.query);  // in place: a row's half is behind its source
  const int64_t size = mla_row(t.in);
  for (int64_t head = 0; head < t.task.num_heads; ++head) {
    for (int64_t d = 0; d < size; d += kLanes) store(rounded + head * size + d, load(t.query + head * t.row + d));
  }
}
#endif

// Keys [begin, end) of one split; begin is a multiple of kTileKeys.
void attend_split(const Task &t, int64_t begin, int64_t end) {
  for (int64_t start = begin; start < end; start += kTileKeys) {
    const int64_t count = min_of(kTileKeys, end - start);
#if defined(__AVX512BF16__)
    if (fits_dot(t.in)) {
      attend_tile_dot(t, start, count);
      continue;
    }
#endif
    VLLM_MS_DISPATCH_FLOAT(t.in.step.cache.dtype, T, { attend_tile<T>(t, start, count); })
  }
}

void write_heads(const Task &t, const MlaTaskArgs &args) {
  for (int64_t head = 0; head < t.task.num_heads; ++head) {
    const RowState total = t.total_state(head);
    const Vec scale = set1(1.0f / *total.sum);
    float *out = args.out + ((t.task.first_head + head) * args.count + t.task.index) * t.in.lora;
    int64_t d = 0;
    for (; d + kLanes <= t.in.lora; d += kLanes) store(out + d, load(total.accumulator + d) * scale);
    if (d < t.in.lora) store_n(out + d, load(total.accumulator + d) * scale, t.in.lora - d);
  }
}

}  // namespace

void mla_attend(const MlaTaskArgs &args) {
  const Task t(args);
  const int64_t heads = t.task.num_heads;
  const float *query = args.query + (t.task.index * t.in.step.num_heads + t.task.first_head) * t.row;
  std::memcpy(t.query, query, heads * t.row * sizeof(float));
#if defined(__AVX512BF16__)
  if (fits_dot(t.in)) round_queries(t);
#endif
  float *partial = t.task.partial;
  if (partial == nullptr) clear(t.total_max, t.total_sum, t.total, heads, t.width);
  for (int64_t begin = t.task.key_begin; begin < t.task.key_end; begin += kSplitKeys) {
    clear(t.max, t.sum, t.accumulator, heads, t.width);
    attend_split(t, begin, min_of(begin + kSplitKeys, t.task.key_end));
    for (int64_t head = 0; head < heads; ++head) {
      if (partial == nullptr) {
        fold(t.max[head], t.sum[head], t.accumulator + head * t.width, t.total_state(head), t.in.lora);
        continue;
      }
      std::memcpy(partial, t.accumulator + head * t.width, t.width * sizeof(float));
      partial[t.width] = t.max[head];
      partial[t.width + 1] = t.sum[head];
      partial += attention_state(t.in.lora);
    }
  }
  if (partial == nullptr) write_heads(t, args);
}

void mla_merge(const MlaTaskArgs &args) {
  const Task t(args);
  const int64_t heads = t.task.num_heads, state = attention_state(t.in.lora);
  const int64_t splits = (t.task.key_end - t.task.key_begin + kSplitKeys - 1) / kSplitKeys;
  clear(t.total_max, t.total_sum, t.total, heads, t.width);
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t split = 0; split < splits; ++split) {
      const float *partial = t.task.partial + (split * heads + head) * state;
      fold(partial[t.width], partial[t.width + 1], partial, t.total_state(head), t.in.lora);
    }
  }
  write_heads(t, args);
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
