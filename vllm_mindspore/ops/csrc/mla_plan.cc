#include "mla_plan.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_plan.h"
#include "kernels/linear.h"
#include "parallel.h"

namespace vllm_ms {
namespace {

constexpr int64_t kMaxHeads = 64;          // of a task: enough to reuse a tile of keys, few enough for the L2 cache
constexpr int64_t kMinHeads = 16;          // when there are many threads to feed
constexpr int64_t kTileHeads = 4;          // reading a tile costs about as much as attending with this many heads
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMinParallelCost = 1 << 16;  // multiply-adds below which a second thread does not pay
constexpr int64_t kAbsorbedTokens = 64;        // at once: bounds what queries and sums in latent form take
constexpr int64_t kExpandedFloats = 4 << 20;   // at once: bounds what keys and values take
constexpr int64_t kMaxExpandedKeys = 1024;
constexpr int64_t kQueriesPerTask = 128;
constexpr int64_t kElementsPerChunk = 1 << 14;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void fail(const std::string &message) { throw std::invalid_argument(message); }

int64_t queries_of(const MlaInputs &in, int64_t request) {
  return in.step.query_start_loc[request + 1] - in.step.query_start_loc[request];
}

struct Query {
  int64_t request, token, num_keys;
};

// Up to kAbsorbedTokens queries in absorbed form.
class Absorbed {
 public:
  Absorbed(const MlaInputs &in, const std::vector<Query> &queries)
      : in_(in),
        queries_(queries),
        count_(static_cast<int64_t>(queries.size())),
        heads_(in.step.num_heads),
        row_(padded_head(mla_row(in))),
        latent_queries_(count_ * heads_ * row_ * sizeof(float)),
        sums_(count_ * heads_ * in.lora * sizeof(float)) {}

  void run() {
    absorb();
    attend();
    expand_sums();
  }

 private:
  struct Group {  // tasks that compute splits of the same heads
    MlaTask whole;
    std::atomic<int64_t> unfinished;
    Group(const MlaTask &task, int64_t parts) : whole(task), unfinished(parts) {}
  };
  struct Job {
    MlaTask task;
    Group *group;  // null unless task.partial
    int64_t cost;
  };

  void absorb() const {
    std::vector<int64_t> tokens;
    for (const Query &query : queries_) tokens.push_back(query.token);
    const int64_t work = std::max<int64_t>(1, count_ * in_.nope * in_.lora);
    parallel_for(heads_, ceil_div(kMinParallelCost, work), [&](int64_t begin, int64_t end) {
      const Scratch workspace(mla_absorb_workspace(in_, count_) * sizeof(float));
      mla_absorb({&in_, tokens.data(), count_, begin, end, latent_queries_.as<float>(), workspace.as<float>()});
    });
  }

  int64_t cost(int64_t keys, int64_t heads) const { return keys * (heads + kTileHeads) * (2 * in_.lora + in_.rope); }

  // Divides queries by heads, and contexts into runs of splits, until there is work for all threads.
  void divide(std::vector<Job> *jobs, std::vector<std::unique_ptr<Group>> *groups, int64_t *partial_floats) const {
    int64_t total = 0;
    for (const Query &query : queries_) total += cost(query.num_keys, heads_);
    const int64_t threads = total < kMinParallelCost ? 1 : num_threads();
    const int64_t wanted = threads == 1 ? 1 : kTasksPerThread * threads;
    int64_t step = std::min(heads_, kMaxHeads);
    while (step > kMinHeads && count_ * ceil_div(heads_, step) < wanted) step = std::max(kMinHeads, step / 2);
    const int64_t target = std::max<int64_t>(1, total / wanted);
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t keys = queries_[i].num_keys, splits = ceil_div(keys, kSplitKeys);
      for (int64_t head = 0; head < heads_; head += step) {
        const MlaTask task{i, queries_[i].request, head, std::min(step, heads_ - head), 0, keys, nullptr};
        const int64_t work = cost(keys, task.num_heads);
        const int64_t parts = threads > 1 && work > 2 * target ? std::min(splits, ceil_div(work, target)) : 1;
        if (parts == 1) {
          jobs->push_back({task, nullptr, work});
          continue;
        }
        groups->push_back(std::make_unique<Group>(task, parts));
        *partial_floats += splits * task.num_heads * attention_state(in_.lora);
        for (int64_t part = 0; part < parts; ++part) {
          MlaTask slice = task;
          slice.key_begin = splits * part / parts * kSplitKeys;
          slice.key_end = std::min(keys, splits * (part + 1) / parts * kSplitKeys);
          jobs->push_back({slice, groups->back().get(), work / parts});
        }
      }
    }
  }

  // Where the states of cut tasks go, one after the other.
  void place_partials(std::vector<Job> &jobs, float *partial) const {
    Group *last = nullptr;
    for (Job &job : jobs) {
      if (job.group == nullptr) continue;
      const int64_t state = job.task.num_heads * attention_state(in_.lora);
      if (job.group != last) job.group->whole.partial = partial;
      last = job.group;
      job.task.partial = partial;
      partial += ceil_div(job.task.key_end - job.task.key_begin, kSplitKeys) * state;
    }
  }

  // Workers take jobs off one counter; whoever finishes the last part of a group merges it.
  void attend() const {
    std::vector<Job> jobs;
    std::vector<std::unique_ptr<Group>> groups;
    int64_t partial_floats = 0;
    divide(&jobs, &groups, &partial_floats);
    const Scratch partials(partial_floats * sizeof(float));
    place_partials(jobs, partials.as<float>());
    std::stable_sort(jobs.begin(), jobs.end(), [](const Job &a, const Job &b) { return a.cost > b.cost; });
    const int64_t num_jobs = static_cast<int64_t>(jobs.size());
    const int64_t workers = std::min<int64_t>(num_threads(), num_jobs);
    std::atomic<int64_t> next_job{0};
    parallel_for(workers, 1, [&](int64_t, int64_t) {
      const Scratch workspace(mla_workspace(in_, std::min(heads_, kMaxHeads)) * sizeof(float));
      for (int64_t i; (i = next_job.fetch_add(1)) < num_jobs;) {
        run_task(&mla_attend, jobs[i].task, jobs[std::min(i + workers, num_jobs - 1)].task, workspace);
        Group *group = jobs[i].group;
        if (group != nullptr && group->unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) {
          run_task(&mla_merge, group->whole, group->whole, workspace);
        }
      }
    });
  }

  void run_task(void (*kernel)(const MlaTaskArgs &), const MlaTask &task, const MlaTask &next,
                const Scratch &workspace) const {
    kernel({&in_, &task, &next, latent_queries_.as<float>(), sums_.as<float>(), count_, workspace.as<float>()});
  }

  // The sums of latents to values: a small product per head.
  void expand_sums() const {
    const int64_t width = heads_ * in_.v;
    const int64_t work = std::max<int64_t>(1, count_ * in_.v * in_.lora);
    parallel_for(heads_, ceil_div(kMinParallelCost, work), [&](int64_t begin, int64_t end) {
      const Scratch values(count_ * in_.v * sizeof(float));
      for (int64_t head = begin; head < end; ++head) {
        LinearArgs args{};
        args.x = sums_.as<float>() + head * count_ * in_.lora;
        args.weight = {static_cast<const char *>(mla_head_weight(in_, head)) +
                           in_.nope * in_.lora * dtype_size(in_.kv_b.dtype),
                       in_.kv_b.dtype};
        args.out = values.as<float>();
        args.m = count_;
        args.n = in_.v;
        args.k = in_.lora;
        linear(args);
        for (int64_t i = 0; i < count_; ++i) {
          std::memcpy(in_.step.out + queries_[i].token * width + head * in_.v, args.out + i * in_.v,
                      in_.v * sizeof(float));
        }
      }
    });
  }

  const MlaInputs &in_;
  const std::vector<Query> &queries_;
  const int64_t count_, heads_, row_;
  const Scratch latent_queries_;  // [count, heads, row]
  const Scratch sums_;            // [heads, count, lora]
};

// Requests in expanded form, a block of their contexts at a time.
class Expanded {
 public:
  explicit Expanded(const MlaInputs &in)
      : in_(in),
        head_(in.nope + in.v),
        capacity_(std::clamp<int64_t>(kExpandedFloats / (in.step.num_heads * head_) / kTileKeys * kTileKeys,
                                      kTileKeys, kMaxExpandedKeys)),
        latents_(capacity_ * in.lora * sizeof(float)),
        k_pe_(capacity_ * in.rope * sizeof(float)),
        expanded_(capacity_ * in.step.num_heads * head_ * sizeof(float)),
        max_(in.step.num_tokens * in.step.num_heads * sizeof(float)),
        sum_(in.step.num_tokens * in.step.num_heads * sizeof(float)) {}

  void run(const std::vector<int64_t> &requests) {
    for (int64_t request : requests) {
      const int64_t keys = in_.step.seq_lens[request];
      for (int64_t begin = 0; begin < keys;) {
        int64_t room = capacity_ - rows_;
        if (keys - begin > room) room = room / kTileKeys * kTileKeys;  // segments end with a tile or a request
        if (room == 0) {
          flush();
          continue;
        }
        const int64_t end = std::min(keys, begin + room);
        segments_.push_back({request, begin, end, rows_});
        rows_ += end - begin;
        begin = end;
      }
    }
    flush();
  }

 private:
  void flush() {
    if (segments_.empty()) return;
    gather();
    LinearArgs args{};
    args.x = latents_.as<float>();
    args.weight = in_.kv_b;
    args.out = expanded_.as<float>();
    args.m = rows_;
    args.n = in_.step.num_heads * head_;
    args.k = in_.lora;
    linear(args);
    attend();
    segments_.clear();
    rows_ = 0;
  }

  void gather() const {
    const int64_t grain = ceil_div(std::max<int64_t>(1, kElementsPerChunk / mla_row(in_)), kTileKeys) * kTileKeys;
    for (const MlaSegment &segment : segments_) {
      parallel_for(segment.end - segment.begin, grain, [&](int64_t begin, int64_t end) {
        mla_gather({&in_, &segment, segment.begin + begin, segment.begin + end, latents_.as<float>(),
                    k_pe_.as<float>()});
      });
    }
  }

  struct Job {
    const MlaSegment *segment;
    int64_t head, first_query, num_queries;
  };

  void attend() const {
    std::vector<Job> jobs;
    for (const MlaSegment &segment : segments_) {
      const int64_t queries = queries_of(in_, segment.request);
      for (int64_t first = 0; first < queries; first += kQueriesPerTask) {
        for (int64_t head = 0; head < in_.step.num_heads; ++head) {
          jobs.push_back({&segment, head, first, std::min(kQueriesPerTask, queries - first)});
        }
      }
    }
    const int64_t work = kQueriesPerTask * kTileKeys * (head_ + in_.rope);
    parallel_for(static_cast<int64_t>(jobs.size()), ceil_div(kMinParallelCost, work), [&](int64_t begin, int64_t end) {
      const Scratch workspace(mla_expanded_workspace(in_, kQueriesPerTask) * sizeof(float));
      for (int64_t i = begin; i < end; ++i) {
        const Job &job = jobs[i];
        mla_attend_expanded({&in_, job.segment, job.head, job.first_query, job.num_queries, expanded_.as<float>(),
                             k_pe_.as<float>(), max_.as<float>(), sum_.as<float>(), workspace.as<float>()});
      }
    });
  }

  const MlaInputs &in_;
  const int64_t head_;      // nope + v
  const int64_t capacity_;  // positions of a block
  const Scratch latents_, k_pe_, expanded_, max_, sum_;
  std::vector<MlaSegment> segments_;
  int64_t rows_ = 0;
};

void clear_unowned(const AttentionInputs &step, int64_t width) {
  const int64_t first = step.num_requests > 0 ? step.query_start_loc[0] : 0;
  const int64_t last = step.num_requests > 0 ? step.query_start_loc[step.num_requests] : 0;
  if (first > 0) std::memset(step.out, 0, first * width * sizeof(float));
  if (last < step.num_tokens) {
    std::memset(step.out + last * width, 0, (step.num_tokens - last) * width * sizeof(float));
  }
}

}  // namespace

void check_mla(const MlaInputs &in) {
  if (in.nope <= 0 || in.rope < 0 || in.v <= 0 || in.lora <= 0) {
    fail("nope_dim " + std::to_string(in.nope) + ", rope_dim " + std::to_string(in.rope) + ", v_dim " +
         std::to_string(in.v) + ", kv_lora_rank " + std::to_string(in.lora));
  }
  check_attention(in.step);
}

bool mla_expands(const MlaInputs &in, int64_t queries, int64_t keys) {
  const int64_t per_latent = (in.nope + in.v) * in.lora, pairs = queries * keys;
  const int64_t expanded = keys * per_latent + pairs * (in.nope + in.rope + in.v);
  const int64_t absorbed = queries * per_latent + pairs * (2 * in.lora + in.rope);
  return queries > 1 && expanded < absorbed;
}

void mla_attention(const MlaInputs &in) {
  clear_unowned(in.step, in.step.num_heads * in.v);
  std::vector<int64_t> expanded;
  std::vector<Query> absorbed;
  const auto flush = [&]() {
    if (!absorbed.empty()) Absorbed(in, absorbed).run();
    absorbed.clear();
  };
  for (int64_t request = 0; request < in.step.num_requests; ++request) {
    const int64_t queries = queries_of(in, request), keys = in.step.seq_lens[request];
    if (queries == 0) continue;
    if (mla_expands(in, queries, keys)) {
      expanded.push_back(request);
      continue;
    }
    for (int64_t i = 0; i < queries; ++i) {
      absorbed.push_back({request, in.step.query_start_loc[request] + i, keys - queries + i + 1});
      if (static_cast<int64_t>(absorbed.size()) == kAbsorbedTokens) flush();
    }
  }
  flush();
  if (!expanded.empty()) Expanded(in).run(expanded);
}

void mla_write(MlaWriteArgs args) {
  const int64_t width = args.lora + args.rope, first = args.begin;
  const int64_t grain = std::max<int64_t>(1, kElementsPerChunk / std::max<int64_t>(1, width));
  parallel_for(args.end - args.begin, grain, [&](int64_t begin, int64_t end) {
    const Scratch row(width * sizeof(float));
    MlaWriteArgs part = args;
    part.workspace = row.as<float>();
    part.begin = first + begin;
    part.end = first + end;
    mla_write_tokens(part);
  });
}

}  // namespace vllm_ms
