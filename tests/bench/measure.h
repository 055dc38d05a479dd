// Time, memory and the lines that are printed.
#pragma once

#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

namespace {

constexpr int kRounds = 5;

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Median seconds of `work`, after one round that does not count.
double median_seconds(const std::function<void()> &work) {
  std::vector<double> seconds;
  for (int round = 0; round <= kRounds; ++round) {
    const double begin = now();
    work();
    if (round > 0) seconds.push_back(now() - begin);
  }
  std::nth_element(seconds.begin(), seconds.begin() + kRounds / 2, seconds.end());
  return seconds[kRounds / 2];
}

// Memory as the worker has it for weights and caches: in large pages where there are any.
char *allocate(int64_t bytes) {
  void *data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) std::abort();
  madvise(data, bytes, MADV_HUGEPAGE);
  return static_cast<char *>(data);
}

struct Peaks {
  double bytes, products;  // a second
} peaks;

void report(const std::string &name, double seconds, double bytes, double operations) {
  const double bound = std::max(bytes / peaks.bytes, operations / peaks.products);
  std::printf("%-44s %10.1f us %8.1f GB/s %9.1f GFLOP/s %6.0f %% of the bound\n", name.c_str(), seconds * 1e6,
              bytes / seconds * 1e-9, operations / seconds * 1e-9, 100 * bound / seconds);
  std::fflush(stdout);
}

}  // namespace
