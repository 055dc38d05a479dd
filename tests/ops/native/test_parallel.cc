#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "testing.h"

using namespace vllm_ms;

namespace {

// Each item is visited exactly once.
bool covers(int64_t n, int64_t grain) {
  std::vector<std::atomic<int>> visits(n);
  for (auto &v : visits) v = 0;
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++visits[i];
  });
  for (const auto &v : visits) {
    if (v != 1) return false;
  }
  return true;
}

// Whether a thread other than the caller takes part, given some attempts.
bool uses_another_thread() {
  std::atomic<bool> other{false};
  const std::thread::id self = std::this_thread::get_id();
  for (int attempt = 0; attempt < 1000 && !other; ++attempt) {
    parallel_for(64, 1, [&](int64_t, int64_t) {
      if (std::this_thread::get_id() != self) other = true;
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    });
  }
  return other;
}

double process_cpu_seconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval &t) { return t.tv_sec + t.tv_usec * 1e-6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

}  // namespace

TEST(parallel_for_covers_every_range) {
  const int before = num_threads();
  for (int threads : {1, 2, 5}) {
    set_num_threads(threads);
    for (int64_t n : {0, 1, 2, 3, 7, 100, 1001}) {
      for (int64_t grain : {0, 1, 3, 50, 2000}) CHECK(covers(n, grain)) << threads << " " << n << " " << grain;
    }
  }
  set_num_threads(before);
}

TEST(ranges_get_shorter_and_cover_everything) {
  const int before = num_threads();
  for (int threads : {1, 2, 5}) {
    set_num_threads(threads);
    for (int64_t n : {1, 2, 7, 100, 1001}) {
      for (int64_t least : {0, 1, 3, 50, 2000}) {
        Ranges ranges(n, least);
        CHECK(ranges.workers() >= 1 && ranges.workers() <= threads) << n << " " << least;
        int64_t next = 0, longest = n;
        for (Ranges::Range range = ranges.take(); !range.empty(); range = ranges.take()) {
          const int64_t length = range.end - range.begin;
          CHECK(range.begin == next && length <= longest) << threads << " " << n << " " << least << " " << next;
          CHECK(length >= least || range.end == n) << threads << " " << n << " " << least << " " << next;
          next = range.end;
          longest = length;
        }
        CHECK(next == n && ranges.take().empty());

        Ranges shared(n, least);
        std::vector<std::atomic<int>> visits(n);
        for (auto &v : visits) v = 0;
        std::atomic<bool> foretold{true};
        parallel_for(shared.workers(), 1, [&](int64_t, int64_t) {
          int64_t before = -1, announced = -1;
          shared.for_each([&](int64_t i, int64_t next) {
            ++visits[i];
            if (before >= 0 && announced != i) foretold = false;
            before = i;
            announced = next;
          });
          if (announced != before) foretold = false;
        });
        for (const auto &v : visits) CHECK(v == 1) << threads << " " << n << " " << least;
        CHECK(foretold) << threads << " " << n << " " << least;
      }
    }
  }
  set_num_threads(before);
}

TEST(parallel_for_in_quick_succession) {
  const int before = num_threads();
  set_num_threads(8);
  std::atomic<int64_t> visited{0};
  int64_t expected = 0;
  for (int repeat = 0; repeat < 200000; ++repeat) {  // jobs of different sizes, over before a late worker looks
    const int64_t n = repeat % 2 == 0 ? 2 : 30;
    expected += n;
    parallel_for(n, 1, [&](int64_t begin, int64_t end) { visited += end - begin; });
    if (visited != expected) break;
  }
  CHECK(visited == expected) << visited.load() << " for " << expected;
  set_num_threads(before);
}

TEST(parallel_for_from_many_threads_and_nested) {
  const int before = num_threads();
  set_num_threads(3);
  std::atomic<int64_t> total{0};
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 6; ++c) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 300; ++repeat) {
        if (!covers(97, 1)) ++wrong;
        parallel_for(10, 1, [&](int64_t begin, int64_t end) {
          parallel_for(end - begin, 1, [&](int64_t b, int64_t e) { total += e - b; });
        });
      }
    });
  }
  for (auto &caller : callers) caller.join();
  CHECK(wrong == 0) << wrong.load();
  CHECK(total == 6 * 300 * 10) << total.load();
  set_num_threads(before);
}

TEST(parallel_for_uses_its_threads) {
  const int before = num_threads();
  set_num_threads(2);
  CHECK(uses_another_thread()) << "all work was done by the caller";
  set_num_threads(before);
}

TEST(with_a_thread_per_cpu_no_two_share_one) {
  cpu_set_t affinity;
  CPU_ZERO(&affinity);
  sched_getaffinity(getpid(), sizeof(affinity), &affinity);
  const int cpus = CPU_COUNT(&affinity);
  if (cpus < 2) return;  // nothing to share
  const int before = num_threads();
  set_num_threads(cpus);
  const auto check = [] {
    const std::thread::id self = std::this_thread::get_id();
    int shared = 0;
    for (int attempt = 0; attempt < 50; ++attempt) {
      const int callers_cpu = sched_getcpu();
      std::atomic<int> on_callers_cpu{0};
      parallel_for(64, 1, [&](int64_t, int64_t) {
        if (std::this_thread::get_id() != self && sched_getcpu() == callers_cpu) ++on_callers_cpu;
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      });
      if (on_callers_cpu > 0) ++shared;
    }
    return shared;
  };
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {  // wherever the caller runs
    if (!CPU_ISSET(cpu, &affinity)) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    std::thread caller([&] {
      sched_setaffinity(0, sizeof(one), &one);
      const int shared = check();
      CHECK(shared < 5) << "caller on CPU " << cpu << ": a worker shared it in " << shared << " of 50 jobs";
    });
    caller.join();
  }
  set_num_threads(before);
}

TEST(idle_pool_uses_no_cpu) {
  const int before = num_threads();
  set_num_threads(4);
  covers(1000, 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(200));  // the workers' spinning is over
  const double start = process_cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  const double used = process_cpu_seconds() - start;
  CHECK(used < 0.05) << used << " s of CPU in 0.3 s of sleep";
  set_num_threads(before);
}

TEST(pool_works_after_fork) {
  const int before = num_threads();
  const char *setting = std::getenv("VLLM_MS_NUM_THREADS");
  const std::string setting_before = setting == nullptr ? "" : setting;
  setenv("VLLM_MS_NUM_THREADS", "3", 1);
  set_num_threads(3);
  covers(1000, 1);
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) covers(500, 1);
  });
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      const Scratch scratch(1000);
      _exit(covers(1000, 1) && covers(77, 1) && uses_another_thread() ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "child status " << status;
  }
  stop = true;
  busy.join();
  CHECK(covers(1000, 1)) << "parent";
  setenv("VLLM_MS_NUM_THREADS", setting_before.c_str(), 1);
  set_num_threads(before);
}

TEST(scratch_is_reused_and_aligned) {
  void *first = nullptr;
  {
    const Scratch a(5000);
    first = a.as<void>();
    CHECK(reinterpret_cast<uintptr_t>(first) % 64 == 0) << first;
    const Scratch b(5000);
    CHECK(b.as<void>() != first) << "two live buffers are one";
    std::memset(a.as<char>(), 1, 5000);
  }
  bool reused = false;
  const Scratch c(4900), d(4900);
  reused = c.as<void>() == first || d.as<void>() == first;
  CHECK(reused) << "a returned buffer was not used again";
}

TEST(scratch_keeps_little_memory) {
  const auto resident = [] {
    long pages = 0, ignored = 0;
    std::FILE *file = std::fopen("/proc/self/statm", "r");
    const bool read = std::fscanf(file, "%ld %ld", &ignored, &pages) == 2;
    std::fclose(file);
    return read ? pages * sysconf(_SC_PAGESIZE) : -1;
  };
  const long before = resident();
  for (int64_t megabytes = 1; megabytes < 90; ++megabytes) {
    const Scratch buffer(megabytes << 20);
    std::memset(buffer.as<char>(), 1, megabytes << 20);
  }
  const long kept = (resident() - before) >> 20;
  CHECK(before > 0 && kept < 140) << kept << " MB kept";
}
