#include "mla_forms.h"

#include <algorithm>

#include "kernels/linear.h"
#include "parallel.h"

namespace vllm_ms {
namespace {

constexpr int64_t kExpandedFloats = 4 << 20;  // at once: bounds what keys and values take
constexpr int64_t kMaxExpandedKeys = 1024;
constexpr int64_t kQueriesPerTask = 128;
constexpr int64_t kMinParallelCost = 1 << 16;  // multiply-adds below which a second thread does not pay
constexpr int64_t kElementsPerChunk = 1 << 14;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

  void run(const std::vector<MlaPart> &parts) {
    for (const MlaPart &part : parts) {
      for (int64_t begin = 0; begin < part.keys;) {
        int64_t room = capacity_ - rows_;
        if (part.keys - begin > room) room = room / kTileKeys * kTileKeys;  // segments end with a tile or a request
        if (room == 0) {
          flush();
          continue;
        }
        const int64_t end = std::min(part.keys, begin + room);
        segments_.push_back({part.request, begin, end, rows_, part.mask, mla_tiles(part.keys)});
        queries_.push_back(part.queries);
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
    queries_.clear();
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
    for (size_t i = 0; i < segments_.size(); ++i) {
      for (int64_t first = 0; first < queries_[i]; first += kQueriesPerTask) {
        for (int64_t head = 0; head < in_.step.num_heads; ++head) {
          jobs.push_back({&segments_[i], head, first, std::min(kQueriesPerTask, queries_[i] - first)});
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
  std::vector<int64_t> queries_;  // of the segments
  int64_t rows_ = 0;
};

}  // namespace

void attend_expanded(const MlaInputs &in, const std::vector<MlaPart> &parts) { Expanded(in).run(parts); }

}  // namespace vllm_ms
