// How a thread waits for another one: busily for a while, then asleep.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace vllm_ms {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline int64_t monotonic_nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

// Spins until done() or for so many nanoseconds; returns done().
template <class Done>
bool spin_until(int64_t nanoseconds, Done done) {
  const int64_t deadline = monotonic_nanoseconds() + nanoseconds;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
  } while (monotonic_nanoseconds() < deadline);
  return done();
}

enum class Sharing { process = FUTEX_PRIVATE_FLAG, memory = 0 };  // who waits on a word: threads, or processes too

// Sleeps while *word is `expected`; at most so many nanoseconds, if there are any.
inline void futex_wait(std::atomic<uint32_t> *word, uint32_t expected, Sharing sharing, int64_t nanoseconds = 0) {
  const timespec most{nanoseconds / 1000000000, nanoseconds % 1000000000};
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(word), FUTEX_WAIT | static_cast<int>(sharing), expected,
          nanoseconds > 0 ? &most : nullptr, nullptr, 0);
}

inline void futex_wake_all(std::atomic<uint32_t> *word, Sharing sharing) {
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(word), FUTEX_WAKE | static_cast<int>(sharing), INT_MAX, nullptr,
          nullptr, 0);
}

}  // namespace vllm_ms
