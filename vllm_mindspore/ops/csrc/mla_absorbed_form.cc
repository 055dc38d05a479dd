#include "mla_forms.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "kernels/linear.h"
#include "parallel.h"

namespace vllm_ms {
namespace {

constexpr int64_t kMaxHeads = 64;          // of a task: enough to reuse a tile of keys, few enough for the L2 cache
constexpr int64_t kMinHeads = 16;          // when there are many threads to feed
constexpr int64_t kTileHeads = 4;          // reading a tile costs about as much as attending with this many heads
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMinParallelCost = 1 << 16;  // multiply-adds below which a second thread does not pay

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Absorbed {
 public:
  Absorbed(const MlaInputs &in, const std::vector<MlaQuery> &queries)
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
    for (const MlaQuery &query : queries_) tokens.push_back(query.token);
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
    for (const MlaQuery &query : queries_) total += cost(query.num_keys, heads_);
    const int64_t threads = total < kMinParallelCost ? 1 : num_threads();
    const int64_t wanted = threads == 1 ? 1 : kTasksPerThread * threads;
    int64_t step = std::min(heads_, kMaxHeads);
    while (step > kMinHeads && count_ * ceil_div(heads_, step) < wanted) step = std::max(kMinHeads, step / 2);
    const int64_t target = std::max<int64_t>(1, total / wanted);
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t keys = queries_[i].num_keys, splits = ceil_div(keys, kSplitKeys);
      for (int64_t head = 0; head < heads_; head += step) {
        const MlaTask task{i,    queries_[i].request,           queries_[i].selected,
                           head, std::min(step, heads_ - head), 0,
                           keys, nullptr};
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
  const std::vector<MlaQuery> &queries_;
  const int64_t count_, heads_, row_;
  const Scratch latent_queries_;  // [count, heads, row]
  const Scratch sums_;            // [heads, count, lora]
};

}  // namespace

void attend_absorbed(const MlaInputs &in, const std::vector<MlaQuery> &queries) { Absorbed(in, queries).run(); }

}  // namespace vllm_ms
