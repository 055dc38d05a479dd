// Collectives between processes of this host, beside a plain copy. Built and run by collectives.py: the argument is the
// number of processes, each with a CPU of its own and one thread.
#include "collectives.h"

#include <sched.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "exchange.h"
#include "parallel.h"

using namespace vllm_ms;

namespace {

constexpr int64_t kSlotBytes = 32 << 20, kWidth = 1024;  // values of a row
constexpr int64_t kSizes[] = {4 << 10, 16 << 10, 128 << 10, 1 << 20, 16 << 20, 64 << 20};  // bytes

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Median seconds of `work`, which all ranks begin together.
double median_seconds(Group &group, int64_t times, const std::function<void()> &work) {
  std::vector<double> seconds;
  for (int64_t i = 0; i < times + 5; ++i) {
    group.barrier();
    const double begin = now();
    work();
    if (i >= 5) seconds.push_back(now() - begin);
  }
  std::nth_element(seconds.begin(), seconds.begin() + times / 2, seconds.end());
  return seconds[times / 2];
}

void measure(Group &group) {
  const int64_t size = group.size(), most = kSizes[std::size(kSizes) - 1] / 4;
  std::vector<float> x(most, 1.0f), out(most * size);
  for (const int64_t bytes : kSizes) {
    const int64_t count = bytes / 4, rows = count / kWidth;
    std::vector<int32_t> ranks;
    std::vector<float> routing;  // an expert a token, on the ranks in turn
    for (int64_t t = 0; t < size * rows; ++t) {
      ranks.push_back(static_cast<int32_t>(t / rows));
      routing.insert(routing.end(), {static_cast<float>(t % size), 1.0f});
    }
    const StepTokens tokens(ranks.data(), size * rows, static_cast<int>(size));
    const ExpertHolders holders{1, 1, 0};
    struct Kind {
      const char *name;
      int64_t result;  // bytes
      std::function<void()> call;
    };
    const Kind kinds[] = {
        {"all_reduce", bytes, [&] { group.all_reduce(x.data(), count, DType::f32, out.data()); }},
        {"all_gather", bytes * size, [&] { group.all_gather(x.data(), 1, count, DType::f32, out.data()); }},
        {"reduce_scatter", bytes / size,
         [&] { group.reduce_scatter(x.data(), 1, count / size, DType::f32, out.data()); }},
        {"all_to_all", bytes * size, [&] {
           const uint32_t round = begin_dispatch(group, tokens, x.data(), kWidth);
           end_dispatch(group, round, tokens, holders, routing.data(), 1, x.data(), kWidth, out.data());
         }}};
    for (const auto &[name, result, call] : kinds) {
      const int64_t times = std::clamp<int64_t>((64 << 20) / bytes, 30, 2000), moved = std::max(bytes, result);
      const double copy = median_seconds(group, times, [&] {
        for (int64_t done = 0; done < moved; done += bytes) {
          std::memcpy(reinterpret_cast<char *>(out.data()) + done, x.data(), bytes);
        }
      });
      const double seconds = median_seconds(group, times, call);
      if (group.rank() != 0) continue;
      std::printf("%-15s %6ld KiB to %6ld %10.1f us %7.2f GB/s %6.2f of a copy\n", name, bytes >> 10, result >> 10,
                  seconds * 1e6, moved / seconds * 1e-9, copy / seconds);
      std::fflush(stdout);
    }
  }
}

void take_cpu(int rank) {
  cpu_set_t all, one;
  sched_getaffinity(0, sizeof(all), &all);
  CPU_ZERO(&one);
  for (int cpu = 0, left = rank % CPU_COUNT(&all); cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &all) && left-- == 0) CPU_SET(cpu, &one);
  }
  sched_setaffinity(0, sizeof(one), &one);
  set_num_threads(1);
}

}  // namespace

int main(int argc, char **argv) {
  GroupOptions options{"bench", 0, argc > 1 ? std::atoi(argv[1]) : 2, "", kSlotBytes, 60, 1000000};
  Group first(options);
  const std::string memory = "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(first.file());
  for (int rank = 1; rank < options.size; ++rank) {
    if (fork() != 0) continue;
    options.rank = rank;
    options.memory = memory;
    take_cpu(rank);
    Group group(options);
    measure(group);
    return 0;
  }
  take_cpu(0);
  measure(first);
  while (wait(nullptr) > 0) {
  }
}
