// The process's one thread pool. The calling thread takes part; workers spin briefly between jobs, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "isa.h"

namespace vllm_ms {

// Threads that parallel_for may use, the caller included: VLLM_MS_NUM_THREADS, or the CPUs of the process's affinity
// mask.
int num_threads();

// For tests: use `threads` from now on. Not while a parallel_for runs.
void set_num_threads(int threads);

using ParallelBody = void (*)(void *context, int64_t begin, int64_t end);
void parallel_for_impl(int64_t n, int64_t grain, ParallelBody body, void *context);

// Calls f(begin, end) on disjoint ranges covering [0, n), each of at least `grain` items (but the last). Which thread
// gets which range is not fixed: a result must not depend on it. Runs on the caller alone when the work is one grain,
// or when the pool is busy with another caller's job (this makes nesting and concurrent callers safe). f must not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, F &&f) {
  using Body = std::remove_reference_t<F>;
  parallel_for_impl(
      n, grain, [](void *context, int64_t begin, int64_t end) { (*static_cast<Body *>(context))(begin, end); },
      const_cast<void *>(static_cast<const void *>(&f)));
}

// Hands out the items of [0, n) to the threads of one job, in ranges that get shorter, so that all threads end together.
class Ranges {
 public:
  struct Range {
    int64_t begin, end;
    bool empty() const { return begin == end; }
  };

  // least: items that are worth a range
  Ranges(int64_t n, int64_t least);
  int64_t workers() const { return workers_; }  // threads for which there is something to do
  Range take();

  // Takes ranges until none is left, and calls f(item, next) for each item: `next` is the item that this thread does
  // after it, to prefetch what it will read, or `item` itself where it is the thread's last.
  template <class F>
  void for_each(F &&f) {
    for (Range range = take(), then{0, 0}; !range.empty(); range = then) {
      for (int64_t item = range.begin; item < range.end; ++item) {
        const bool last = item + 1 == range.end;
        if (last) then = take();
        f(item, !last ? item + 1 : then.empty() ? item : then.begin);
      }
    }
  }

 private:
  const int64_t n_, least_, workers_;
  std::atomic<int64_t> next_{0};
};

// Buffers that Scratch had to take from the system so far: in steady work their number stays.
int64_t scratch_allocations();

// Temporary memory, 64-byte aligned, uninitialised; taken from and returned to a free list of the process, so that
// buffers are reused between operators whatever thread runs them.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  template <class T>
  T *as() const {
    return static_cast<T *>(data_);
  }

 private:
  void *data_;
  int64_t capacity_;
};

}  // namespace vllm_ms
