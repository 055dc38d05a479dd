#include "attention_plan.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace vllm_ms {
namespace {

constexpr int64_t kMaxRows = 128;         // of a task: enough to reuse a tile of keys, few enough for the L2 cache
constexpr int64_t kMinRows = 16;          // when there are many threads to feed
constexpr int64_t kTileRows = 8;          // reading a tile costs about as much as attending with this many rows
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMinParallelCost = 1 << 16;  // cost * head_size below which a second thread does not pay
constexpr int64_t kElementsPerChunk = 1 << 14;

void fail(const std::string &message) { throw std::invalid_argument(message); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch of a size that recurs, so that changing shapes do not each leave a buffer behind.
int64_t round_up_bytes(int64_t bytes) {
  int64_t size = 4096;
  while (size < bytes) size *= 2;
  return size;
}

// Queries of one request that share tasks, one task per group of KV heads.
struct Unit {
  int64_t request, first_query, num_queries;
  int64_t key_begin, key_end;
  int64_t heads;  // KV heads a task takes at once
};

struct Group {  // tasks that compute splits of the same rows
  AttentionTask whole;
  std::atomic<int64_t> unfinished;
};

struct Job {
  AttentionTask task;
  Group *group;  // null unless task.partial
  int64_t cost;
  int64_t order;
};

class Plan {
 public:
  explicit Plan(const AttentionInputs &in)
      : in_(in), members_(in.num_heads / in.cache.num_kv_heads), max_heads_(in.cache.num_kv_heads) {
    const int64_t total = total_cost();
    if (total * in.cache.head_size < kMinParallelCost) return;
    threads_ = num_threads();
    if (threads_ == 1) return;
    const int64_t wanted = kTasksPerThread * threads_;
    while (max_heads_ > 1 && count_tasks() < wanted) max_heads_ = (max_heads_ + 1) / 2;
    while (max_rows_ > kMinRows && count_tasks() < wanted) max_rows_ /= 2;
    target_ = std::max<int64_t>(1, total / (kTasksPerThread * threads_));
  }

  void run() {
    count();
    if (num_jobs_ == 0) return;
    Scratch jobs_memory(round_up_bytes(num_jobs_ * sizeof(Job)));
    Scratch groups_memory(round_up_bytes(num_groups_ * sizeof(Group)));
    Scratch partial_memory(round_up_bytes(partial_floats_ * sizeof(float)));
    Job *jobs = jobs_memory.as<Job>();
    fill(jobs, groups_memory.as<Group>(), partial_memory.as<float>());
    std::sort(jobs, jobs + num_jobs_, [](const Job &a, const Job &b) {
      if (a.cost != b.cost) return a.cost > b.cost;
      return a.order < b.order;
    });
    execute(jobs);
  }

 private:
  template <class F>
  void for_each_unit(F f) const {
    for (int64_t request = 0; request < in_.num_requests; ++request) {
      const int64_t queries = in_.query_start_loc[request + 1] - in_.query_start_loc[request];
      const int64_t step = std::max<int64_t>(1, max_rows_ / members_);
      for (int64_t first = 0; first < queries; first += step) {
        Unit unit{request, first, std::min(step, queries - first), 0, 0, 1};
        const int64_t position = in_.num_sinks + in_.seq_lens[request] - queries + first;
        unit.key_begin = first_key(in_, position);
        unit.key_end = position + unit.num_queries;
        unit.heads = std::max<int64_t>(1, std::min(max_heads_, max_rows_ / (unit.num_queries * members_)));
        f(unit);
      }
    }
  }

  // In (row, key) pairs.
  int64_t cost(const Unit &unit, int64_t heads) const {
    return heads * (unit.num_queries * members_ + kTileRows) * (unit.key_end - unit.key_begin);
  }

  int64_t total_cost() const {
    int64_t total = 0;
    for_each_unit([&](const Unit &unit) { total += cost(unit, in_.cache.num_kv_heads); });
    return total;
  }

  int64_t count_tasks() const {
    int64_t tasks = 0;
    for_each_unit([&](const Unit &unit) { tasks += ceil_div(in_.cache.num_kv_heads, unit.heads); });
    return tasks;
  }

  // Calls f(task over all keys, its cost, number of splits, number of tasks it becomes).
  template <class F>
  void for_each_task(F f) const {
    for_each_unit([&](const Unit &unit) {
      for (int64_t head = 0; head < in_.cache.num_kv_heads; head += unit.heads) {
        const int64_t heads = std::min(unit.heads, in_.cache.num_kv_heads - head);
        const AttentionTask task{unit.request, unit.first_query, unit.num_queries, head,
                                 heads,        unit.key_begin,   unit.key_end,     nullptr};
        const int64_t splits = ceil_div(unit.key_end, kSplitKeys) - unit.key_begin / kSplitKeys;
        const int64_t work = cost(unit, heads);
        const bool cut = target_ > 0 && work > 2 * target_;
        f(task, work, splits, cut ? std::min(splits, ceil_div(work, target_)) : 1);
      }
    });
  }

  int64_t rows(const AttentionTask &task) const { return task.num_heads * task.num_queries * members_; }

  void count() {
    for_each_task([&](const AttentionTask &task, int64_t, int64_t splits, int64_t parts) {
      num_jobs_ += parts;
      largest_ = std::max(largest_, rows(task));
      if (parts == 1) return;
      ++num_groups_;
      partial_floats_ += splits * rows(task) * attention_state(in_.cache.head_size);
    });
  }

  void fill(Job *job, Group *group, float *partial) const {
    int64_t order = 0;
    for_each_task([&](const AttentionTask &task, int64_t work, int64_t splits, int64_t parts) {
      if (parts == 1) {
        *job++ = {task, nullptr, work, order++};
        return;
      }
      new (group) Group{task, {parts}};
      group->whole.partial = partial;
      const int64_t state = rows(task) * attention_state(in_.cache.head_size);
      const int64_t first_split = task.key_begin / kSplitKeys;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = splits * part / parts, end = splits * (part + 1) / parts;
        AttentionTask slice = task;
        slice.key_begin = std::max(task.key_begin, (first_split + begin) * kSplitKeys);
        slice.key_end = std::min(task.key_end, (first_split + end) * kSplitKeys);
        slice.partial = partial + begin * state;
        *job++ = {slice, group, work / parts, order++};
      }
      partial += splits * state;
      ++group;
    });
  }

  // Workers take jobs off one counter; whoever finishes the last part of a group merges it.
  void execute(const Job *jobs) const {
    const int64_t workers = std::min<int64_t>(threads_, num_jobs_);
    const int64_t floats = ceil_div(attention_workspace(largest_, in_.cache.head_size), 16) * 16;
    Scratch memory(round_up_bytes(workers * floats * sizeof(float)));
    std::atomic<int64_t> next_job{0}, next_worker{0};
    parallel_for(workers, 1, [&](int64_t, int64_t) {
      float *workspace = memory.as<float>() + next_worker.fetch_add(1) * floats;
      for (int64_t i; (i = next_job.fetch_add(1)) < num_jobs_;) {
        run_attention({&in_, &jobs[i].task, workspace});
        Group *group = jobs[i].group;
        if (group != nullptr && group->unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) {
          merge_attention({&in_, &group->whole, workspace});
        }
      }
    });
  }

  const AttentionInputs &in_;
  const int64_t members_;  // query heads per KV head
  int64_t max_heads_;             // KV heads of a task, at most
  int64_t max_rows_ = kMaxRows;   // of a task, but for one query's
  int64_t threads_ = 1;
  int64_t target_ = 0;  // cost of a task worth having; 0: do not cut
  int64_t num_jobs_ = 0, num_groups_ = 0, partial_floats_ = 0;
  int64_t largest_ = 0;  // rows of the largest task
};

void check_request(const AttentionInputs &in, int64_t request) {
  const std::string name = "request " + std::to_string(request) + ": ";
  const int64_t start = in.query_start_loc[request], end = in.query_start_loc[request + 1];
  if (start < 0 || end < start || end > in.num_tokens) {
    fail(name + "query_start_loc " + std::to_string(start) + ".." + std::to_string(end) + " for " +
         std::to_string(in.num_tokens) + " tokens");
  }
  if (end == start) return;
  const int64_t length = in.seq_lens[request];
  if (length < end - start) {
    fail(name + "seq_lens " + std::to_string(length) + " with " + std::to_string(end - start) + " queries");
  }
  const int64_t blocks = ceil_div(length, in.block_size);
  if (blocks > in.max_blocks) {
    fail(name + "seq_lens " + std::to_string(length) + " needs " + std::to_string(blocks) +
         " blocks, block_table has " + std::to_string(in.max_blocks));
  }
  const int64_t available = in.cache.num_slots / in.block_size;
  for (int64_t i = first_key(in, length - (end - start)) / in.block_size; i < blocks; ++i) {
    const int64_t block = in.block_table[request * in.max_blocks + i];
    if (block < 0 || block >= available) {
      fail(name + "block_table has block " + std::to_string(block) + ", the cache has " + std::to_string(available));
    }
  }
}

}  // namespace

void check_attention(const AttentionInputs &in) {
  if (in.cache.num_kv_heads <= 0 || in.cache.head_size <= 0 || in.num_heads % in.cache.num_kv_heads != 0) {
    fail("num_heads " + std::to_string(in.num_heads) + ", num_kv_heads " + std::to_string(in.cache.num_kv_heads) +
         ", head_size " + std::to_string(in.cache.head_size));
  }
  if (in.cache.value_size > in.cache.head_size) {
    fail("values of " + std::to_string(in.cache.value_size) + " with keys of " + std::to_string(in.cache.head_size));
  }
  if (in.block_size <= 0) fail("block_size " + std::to_string(in.block_size));
  for (int64_t request = 0; request < in.num_requests; ++request) check_request(in, request);
}

void check_positions(const int64_t *positions, int64_t begin, int64_t end, int64_t rows, const int64_t *slots) {
  for (int64_t token = begin; token < end; ++token) {
    if (slots != nullptr && slots[token] < 0) continue;
    if (positions[token] < 0 || positions[token] >= rows) {
      fail("position " + std::to_string(positions[token]) + " of token " + std::to_string(token) + ", cos_sin has " +
           std::to_string(rows) + " rows");
    }
  }
}

void check_slots(const int64_t *slots, int64_t num_tokens, int64_t num_slots) {
  for (int64_t token = 0; token < num_tokens; ++token) {
    if (slots[token] >= num_slots) {
      fail("slot_mapping has slot " + std::to_string(slots[token]) + " for token " + std::to_string(token) +
           ", the cache has " + std::to_string(num_slots));
    }
  }
}

void attention(const AttentionInputs &in) {
  const int64_t width = in.num_heads * in.cache.value_size;
  const int64_t first = in.num_requests > 0 ? in.query_start_loc[0] : 0;
  const int64_t last = in.num_requests > 0 ? in.query_start_loc[in.num_requests] : 0;
  if (first > 0) std::memset(in.out, 0, first * width * sizeof(float));
  if (last < in.num_tokens) std::memset(in.out + last * width, 0, (in.num_tokens - last) * width * sizeof(float));
  Plan(in).run();
}

void kv_write(KvWriteArgs args) {
  const int64_t width = args.cache.num_kv_heads * args.cache.head_size;
  const int64_t grain = std::max<int64_t>(1, kElementsPerChunk / std::max<int64_t>(1, width));
  const int64_t first = args.begin;
  parallel_for(args.end - args.begin, grain, [&](int64_t begin, int64_t end) {
    const Scratch head(args.cache.head_size * sizeof(float));
    KvWriteArgs part = args;
    part.workspace = head.as<float>();
    part.begin = first + begin;
    part.end = first + end;
    kv_write_tokens(part);
  });
}

void rotary(const TransformHeadsArgs &args) {
  const int64_t width = args.num_heads * args.transform.head_size;
  const int64_t grain = std::max<int64_t>(1, kElementsPerChunk / std::max<int64_t>(1, width));
  parallel_for(args.end - args.begin, grain, [&](int64_t begin, int64_t end) {
    TransformHeadsArgs part = args;
    part.begin = args.begin + begin;
    part.end = args.begin + end;
    transform_heads(part);
  });
}

void inverse_rms(const InverseRmsArgs &args) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerChunk / std::max<int64_t>(1, args.size));
  parallel_for(args.end - args.begin, grain, [&](int64_t begin, int64_t end) {
    InverseRmsArgs part = args;
    part.begin = args.begin + begin;
    part.end = args.begin + end;
    inverse_rms_tokens(part);
  });
}

}  // namespace vllm_ms
