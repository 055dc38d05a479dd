#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "waiting.h"

namespace vllm_ms {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kChunksPerThread = 8;
constexpr int64_t kSpinNanoseconds = 100000;  // longer than the gap between two operators of one graph

// The main thread's mask, not the calling thread's: MindSpore's runtime may have bound the caller to one CPU.
cpu_set_t process_affinity() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(getpid(), sizeof(set), &set) != 0) CPU_SET(0, &set);
  return set;
}

int default_num_threads() {
  if (const char *text = std::getenv("VLLM_MS_NUM_THREADS"); text != nullptr && *text != '\0') {
    char *end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (*end == '\0' && value >= 1 && value <= kMaxThreads) return static_cast<int>(value);
  }
  const cpu_set_t set = process_affinity();
  return std::max(1, CPU_COUNT(&set));
}

// One job at a time. `ticket_` holds (epoch << 32 | chunks nobody has claimed). A thread claims one by reading the ticket,
// then the job's fields, then taking one off the ticket by compare-and-swap. Where that succeeds the job had a chunk left
// all the while, so it was not over and its fields were not being replaced: a late worker never runs a mixture of jobs.
class Pool {
 public:
  explicit Pool(int threads) : threads_(1) {
    const cpu_set_t affinity = process_affinity();
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the application's threads
    try {
      for (; threads_ < threads; ++threads_) {
        std::thread worker([this] { work(); });
        pthread_setaffinity_np(worker.native_handle(), sizeof(affinity), &affinity);
        workers_.push_back({worker.native_handle(), -1});
        worker.detach();
      }
    } catch (const std::system_error &error) {
      std::fprintf(stderr, "vllm_ms: only %d of %d threads could be started: %s\n", threads_, threads, error.what());
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (threads_ == CPU_COUNT(&affinity)) bind_workers(affinity);
  }

  int threads() const { return threads_; }

  bool try_acquire() { return !busy_.exchange(true, std::memory_order_acquire); }

  // Call between try_acquire() and the return: runs the job to its end and releases the pool.
  void run(int64_t n, int64_t chunk, ParallelBody body, void *context) {
    avoid_callers_cpu();
    const int64_t chunks = (n + chunk - 1) / chunk;
    n_.store(n, std::memory_order_relaxed);
    chunk_.store(chunk, std::memory_order_relaxed);
    body_.store(body, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    remaining_.store(static_cast<uint32_t>(chunks), std::memory_order_relaxed);
    const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    ticket_.store(static_cast<uint64_t>(epoch) << 32 | static_cast<uint64_t>(chunks), std::memory_order_release);
    epoch_.store(epoch, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) futex_wake_all(&epoch_, Sharing::process);
    run_chunks();
    wait_done();
    busy_.store(false, std::memory_order_release);
  }

  // Ends the workers; only for set_num_threads. The object itself is never freed, a worker may still be leaving.
  void stop() {
    stop_.store(true, std::memory_order_seq_cst);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    futex_wake_all(&epoch_, Sharing::process);
  }

 private:
  struct Worker {
    pthread_t handle;
    int cpu;  // the one it is bound to, or -1
  };

  // With a thread per CPU each worker gets a CPU of its own: schedulers that pack threads on few CPUs would have them
  // wait for each other.
  void bind_workers(const cpu_set_t &affinity) {
    callers_cpu_ = sched_getcpu();
    size_t next = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && next < workers_.size(); ++cpu) {
      if (CPU_ISSET(cpu, &affinity) && cpu != callers_cpu_) bind(&workers_[next++], cpu);
    }
  }

  // The caller is not bound. Where it has moved to a worker's CPU, that worker moves to the one the caller left.
  void avoid_callers_cpu() {
    if (callers_cpu_ < 0) return;
    const int cpu = sched_getcpu();
    if (cpu == callers_cpu_) return;
    for (Worker &worker : workers_) {
      if (worker.cpu != cpu) continue;
      bind(&worker, callers_cpu_);
      callers_cpu_ = cpu;
      return;
    }
  }

  static void bind(Worker *worker, int cpu) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (pthread_setaffinity_np(worker->handle, sizeof(one), &one) == 0) worker->cpu = cpu;
  }

  void run_chunks() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (static_cast<uint32_t>(ticket) != 0) {
      const int64_t n = n_.load(std::memory_order_relaxed);
      const int64_t chunk = chunk_.load(std::memory_order_relaxed);
      const ParallelBody body = body_.load(std::memory_order_relaxed);
      void *context = context_.load(std::memory_order_relaxed);
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        continue;
      }
      const int64_t begin = ((n + chunk - 1) / chunk - static_cast<uint32_t>(ticket)) * chunk;
      body(context, begin, std::min(n, begin + chunk));
      if (remaining_.fetch_sub(1, std::memory_order_seq_cst) == 1 && caller_sleeps_.load(std::memory_order_seq_cst)) {
        futex_wake_all(&remaining_, Sharing::process);
      }
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void wait_done() {
    if (spin_until(kSpinNanoseconds, [this] { return remaining_.load(std::memory_order_acquire) == 0; })) return;
    caller_sleeps_.store(true, std::memory_order_seq_cst);
    for (uint32_t left; (left = remaining_.load(std::memory_order_seq_cst)) != 0;) {
      futex_wait(&remaining_, left, Sharing::process);
    }
    caller_sleeps_.store(false, std::memory_order_relaxed);
  }

  void work() {
    uint32_t seen = 0;
    for (;;) {
      uint32_t epoch = seen;
      if (!spin_until(kSpinNanoseconds, [&] { return (epoch = epoch_.load(std::memory_order_acquire)) != seen; })) {
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        while ((epoch = epoch_.load(std::memory_order_seq_cst)) == seen) futex_wait(&epoch_, seen, Sharing::process);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
      }
      if (stop_.load(std::memory_order_acquire)) return;
      seen = epoch;
      run_chunks();
    }
  }

  int threads_;
  std::vector<Worker> workers_;
  int callers_cpu_ = -1;  // free of workers; -1: workers are not bound
  std::atomic<bool> busy_{false};
  std::atomic<bool> stop_{false};
  std::atomic<bool> caller_sleeps_{false};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<uint32_t> sleepers_{0};
  alignas(64) std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> n_{0}, chunk_{1};
  std::atomic<ParallelBody> body_{nullptr};
  std::atomic<void *> context_{nullptr};
  alignas(64) std::atomic<uint32_t> remaining_{0};
};

struct FreeBuffer {
  void *data;
  int64_t capacity;
};

// Everything the library keeps per process; a forked child, which has none of the threads, starts with a new one.
struct State {
  std::mutex mutex;  // guards all below but `ready`
  Pool *pool = nullptr;
  std::vector<FreeBuffer> free_buffers;
  int64_t free_bytes = 0;
  std::atomic<Pool *> ready{nullptr};
};

std::atomic<State *> state{nullptr};

State &process_state() {
  State *current = state.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { state.store(nullptr); }); });
  State *created = new State;
  if (state.compare_exchange_strong(current, created)) return *created;
  delete created;
  return *current;
}

Pool &pool() {
  State &s = process_state();
  if (Pool *ready = s.ready.load(std::memory_order_acquire)) return *ready;
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.pool == nullptr) s.pool = new Pool(default_num_threads());
  s.ready.store(s.pool, std::memory_order_release);
  return *s.pool;
}

constexpr int64_t kScratchAlignment = 64;
constexpr int64_t kMaxFreeBytes = 128 << 20;  // kept between operators
constexpr int64_t kLargePage = 2 << 20;       // buffers of this size and more are mapped, in large pages if there are any
std::atomic<int64_t> allocations{0};

// Few sizes, a quarter apart, so that a buffer of one step serves the next one of slightly other shapes.
int64_t round_up_size(int64_t bytes) {
  int64_t power = kScratchAlignment;
  while (2 * power <= bytes) power *= 2;
  const int64_t quarter = std::max(power / 4, kScratchAlignment);
  return (bytes + quarter - 1) / quarter * quarter;
}

void *allocate(int64_t bytes) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (bytes < kLargePage) return std::aligned_alloc(kScratchAlignment, bytes);
  void *data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  madvise(data, bytes, MADV_HUGEPAGE);
  return data;
}

void release(void *data, int64_t bytes) {
  if (bytes < kLargePage) {
    std::free(data);
  } else {
    munmap(data, bytes);
  }
}

}  // namespace

int num_threads() { return pool().threads(); }

void set_num_threads(int threads) {
  State &s = process_state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.pool != nullptr) s.pool->stop();
  s.pool = new Pool(std::max(1, std::min(threads, kMaxThreads)));
  s.ready.store(s.pool, std::memory_order_release);
}

void parallel_for_impl(int64_t n, int64_t grain, ParallelBody body, void *context) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (n > grain) {
    Pool &p = pool();
    if (p.threads() > 1 && p.try_acquire()) {
      const int64_t parts = int64_t{p.threads()} * kChunksPerThread;
      p.run(n, std::max(grain, (n + parts - 1) / parts), body, context);
      return;
    }
  }
  body(context, 0, n);
}

Ranges::Ranges(int64_t n, int64_t least)
    : n_(n),
      least_(std::max<int64_t>(least, 1)),
      workers_(std::min<int64_t>(num_threads(), std::max<int64_t>(1, n_ / least_))) {}

Ranges::Range Ranges::take() {
  int64_t begin = next_.load(std::memory_order_relaxed), end;
  do {
    if (begin == n_) return {n_, n_};
    const int64_t share = workers_ == 1 ? n_ : (n_ - begin) / (2 * workers_);
    end = std::min(n_, begin + std::max(least_, share));
  } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
  return {begin, end};
}

int64_t scratch_allocations() { return allocations.load(std::memory_order_relaxed); }

Scratch::Scratch(int64_t bytes) : data_(nullptr), capacity_(0) {
  bytes = round_up_size(std::max(bytes, kScratchAlignment));
  State &s = process_state();
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    auto &list = s.free_buffers;
    auto best = list.end();
    for (auto it = list.begin(); it != list.end(); ++it) {  // of equal ones the last returned: it may still be cached
      if (it->capacity < bytes || it->capacity > 4 * bytes) continue;
      if (best == list.end() || it->capacity <= best->capacity) best = it;
    }
    if (best != list.end()) {
      data_ = best->data;
      capacity_ = best->capacity;
      s.free_bytes -= capacity_;
      list.erase(best);
      return;
    }
  }
  capacity_ = bytes;
  data_ = allocate(capacity_);
  if (data_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() {
  State &s = process_state();
  std::vector<FreeBuffer> evicted;
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    auto &list = s.free_buffers;
    list.push_back({data_, capacity_});
    s.free_bytes += capacity_;
    while (s.free_bytes > kMaxFreeBytes) {  // the longest unused first
      evicted.push_back(list.front());
      s.free_bytes -= list.front().capacity;
      list.erase(list.begin());
    }
  }
  for (const FreeBuffer &buffer : evicted) release(buffer.data, buffer.capacity);
}

}  // namespace vllm_ms
