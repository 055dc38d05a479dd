#include "collectives.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>

#include "kernels/reduce.h"
#include "parallel.h"
#include "runs.h"

namespace vllm_ms {

namespace {

constexpr int64_t kParallelBytes = 1 << 17;  // from here on a second thread pays
constexpr int64_t kRoundBytes = 1 << 19;     // what ranks write before the others read it: it is still in their caches
constexpr int kRoundsUnderWay = 2;

// Calls f(begin, end) for [0, count) elements of `bytes` each, on all threads where that pays.
template <class F>
void for_elements(int64_t count, int64_t bytes, F f) {
  parallel_for(count, std::max<int64_t>(1, kParallelBytes / bytes), f);
}

}  // namespace

int64_t Group::round_bytes() const { return std::min(slot_bytes(), kRoundBytes); }

// `count` units of together `bytes`, `per_round` of them in a round: write(begin, end, slot) puts them into this rank's
// slot, of which rank r reads part_of(r, count of units), and read(begin, end, round) takes the others' out of theirs.
// All ranks have as many. Between hosts the next round is under way while one is read.
template <class Write, class PartOf, class Read>
void Group::in_rounds(Collective kind, int64_t bytes, int64_t count, int64_t per_round, Write write, PartOf part_of,
                      Read read) {
  struct UnderWay {
    int64_t begin, end;
    uint32_t round;
  };
  const int64_t most = crosses_hosts() ? std::min(kRoundsUnderWay, free_rounds()) : 1;
  const int64_t rounds = std::max<int64_t>(1, (count + per_round - 1) / per_round);
  UnderWay under_way[kDepth];
  int64_t posted = 0;
  for (int64_t taken = 0; taken < rounds; ++taken) {
    for (; posted < rounds && posted - taken < std::max<int64_t>(1, most); ++posted) {
      const int64_t begin = posted * per_round, end = std::min(count, begin + per_round);
      const uint32_t round = post(kind, bytes, [&](char *slot) { write(begin, end, slot); },
                                  [&](int other) { return part_of(other, end - begin); });
      under_way[posted % kDepth] = {begin, end, round};
    }
    const UnderWay &next = under_way[taken % kDepth];
    take(next.round, kind, [&](int) { return bytes; }, [&] { read(next.begin, next.end, next.round); });
  }
}

void Group::all_reduce(const void *x, int64_t count, DType dtype, void *out) {
  const int64_t bytes = dtype_size(dtype);
  const auto write = [&](int64_t begin, int64_t end, char *to) {
    for_elements((end - begin) * bytes, 1, [&](int64_t first, int64_t last) {
      std::memcpy(to + first, static_cast<const char *>(x) + begin * bytes + first, last - first);
    });
  };
  const auto read = [&](int64_t begin, int64_t end, uint32_t round) {
    const void *parts[kMostRanks];
    for (int other = 0; other < size(); ++other) parts[other] = slot(other, round);
    parts[rank()] = static_cast<const char *>(x) + begin * bytes;
    void *to = static_cast<char *>(out) + begin * bytes;
    for_elements(end - begin, bytes, [&](int64_t first, int64_t last) {
      sum_parts({parts, size(), dtype, first, last, to, dtype});
    });
  };
  const auto all = [&](int, int64_t n) { return Part{0, n * bytes}; };
  in_rounds(Collective::all_reduce, count * bytes, count, round_bytes() / bytes, write, all, read);
}

void Group::all_gather(const void *x, int64_t outer, int64_t inner, DType dtype, void *out) {
  const int64_t bytes = dtype_size(dtype), count = outer * inner;
  const auto write = [&](int64_t begin, int64_t end, char *to) {
    std::memcpy(to, static_cast<const char *>(x) + begin * bytes, (end - begin) * bytes);
  };
  const auto read = [&](int64_t begin, int64_t end, uint32_t round) {
    for (int other = 0; other < size(); ++other) {
      const char *from = slot(other, round);
      for_elements(end - begin, bytes, [&](int64_t first, int64_t last) {
        for_runs(begin + first, begin + last, other, size(), inner, [&](int64_t to, int64_t at, int64_t n) {
          copy_bytes({static_cast<char *>(out) + to * bytes, from + (first + at) * bytes, n * bytes});
        });
      });
    }
  };
  const auto all = [&](int, int64_t n) { return Part{0, n * bytes}; };
  in_rounds(Collective::all_gather, count * bytes, count, round_bytes() / bytes, write, all, read);
}

void Group::reduce_scatter(const void *x, int64_t outer, int64_t inner, DType dtype, void *out) {
  const int64_t bytes = dtype_size(dtype), count = outer * inner;
  const auto write = [&](int64_t begin, int64_t end, char *to) {
    for (int other = 0; other < size(); ++other) {
      char *part = to + other * (end - begin) * bytes;
      for_elements(end - begin, bytes, [&](int64_t first, int64_t last) {
        for_runs(begin + first, begin + last, other, size(), inner, [&](int64_t from, int64_t at, int64_t n) {
          std::memcpy(part + (first + at) * bytes, static_cast<const char *>(x) + from * bytes, n * bytes);
        });
      });
    }
  };
  const auto read = [&](int64_t begin, int64_t end, uint32_t round) {
    const void *parts[kMostRanks];
    for (int other = 0; other < size(); ++other) parts[other] = slot(other, round) + rank() * (end - begin) * bytes;
    void *to = static_cast<char *>(out) + begin * bytes;
    for_elements(end - begin, bytes, [&](int64_t first, int64_t last) {
      sum_parts({parts, size(), dtype, first, last, to, dtype});
    });
  };
  const auto one = [&](int other, int64_t n) { return Part{other * n * bytes, n * bytes}; };
  in_rounds(Collective::reduce_scatter, count * bytes, count, round_bytes() / bytes / size(), write, one, read);
}

void Group::barrier() {
  in_rounds(Collective::barrier, 0, 0, 1, [](int64_t, int64_t, char *) {}, [](int, int64_t) { return Part{}; },
            [](int64_t, int64_t, uint32_t) {});
}

namespace {

std::mutex groups_mutex;
std::map<std::string, std::unique_ptr<Group>> &groups() {
  static auto *all = new std::map<std::string, std::unique_ptr<Group>>;  // never freed: a thread may be in a collective
  return *all;
}

}  // namespace

Group &join_group(const GroupOptions &options) {
  const std::lock_guard<std::mutex> guard(groups_mutex);
  if (groups().count(options.name) != 0) throw std::runtime_error("group " + options.name + " is joined already");
  return *(groups()[options.name] = std::make_unique<Group>(options));
}

void leave_group(const std::string &name) {
  const std::lock_guard<std::mutex> guard(groups_mutex);
  groups().erase(name);
}

void fail_groups(const std::string &reason) {
  const std::lock_guard<std::mutex> guard(groups_mutex);
  for (auto &entry : groups()) {
    entry.second->fail(text_of("rank ", entry.second->rank(), " of group ", entry.first, ": ", reason));
  }
}

void set_group_timeout(double seconds) {
  const std::lock_guard<std::mutex> guard(groups_mutex);
  for (auto &entry : groups()) entry.second->set_timeout(seconds);
}

void flush_groups(double seconds) {
  const std::lock_guard<std::mutex> guard(groups_mutex);
  for (auto &entry : groups()) {
    if (entry.second->crosses_hosts()) entry.second->links().flush(seconds);
  }
}

std::string lost_rank() {
  const std::lock_guard<std::mutex> guard(groups_mutex);
  for (auto &entry : groups()) {
    const std::string lost = entry.second->crosses_hosts() ? entry.second->links().lost() : "";
    if (!lost.empty()) return lost;
  }
  return "";
}

Group &group(const std::string &name) {
  const std::lock_guard<std::mutex> guard(groups_mutex);
  const auto found = groups().find(name);
  if (found == groups().end()) throw std::runtime_error("group " + name + " is not joined by this process");
  return *found->second;
}

}  // namespace vllm_ms
