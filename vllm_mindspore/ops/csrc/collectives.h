// Collectives between the processes of one host, over shared memory.
//
// A group's memory holds, for every rank, a counter and two slots. A collective goes in rounds: each rank writes what the
// others need of it into one of its slots, raises its counter, waits for all counters and reads the others' slots. Rounds
// take the two slots in turn: whoever writes round r has seen all ranks begin round r - 1, so none still reads r - 2.
//
// Sums are taken in the order of ranks, on every rank, so that all get the same bits, and get them again.
//
// A rank that waits finds out within kAliveCheck that another has died (the kernel drops the lock that each rank holds on
// its byte of the memory's file), that it reported a failure, or that it is at another collective; and, after the group's
// timeout, that it stalls. Each is a std::runtime_error that names the group and the rank, and ends the group for all.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "dtype.h"

namespace vllm_ms {

constexpr int kMostRanks = 64;
struct GroupMemory;

struct GroupOptions {
  std::string name;
  int rank = 0;
  int size = 1;
  std::string memory;            // path of the group's memory, to join it; empty: make it
  int64_t slot_bytes = 0;        // of a round, where it is made
  double timeout = 0;            // seconds that another rank may take to arrive; 0: any
  int64_t spin_nanoseconds = 0;  // to wait busily before sleeping
};

class Group {
 public:
  explicit Group(const GroupOptions &options);
  ~Group();
  Group(const Group &) = delete;
  Group &operator=(const Group &) = delete;

  int rank() const { return options_.rank; }
  int size() const { return options_.size; }
  // Others join by /proc/<process>/fd/<this>: the memory has no name in any file system, and is gone with its last user.
  int file() const { return file_; }

  // out[i] = sum over ranks of x[i]. x may be out.
  void all_reduce(const void *x, int64_t count, DType dtype, void *out);
  // out [outer, size, inner] from each rank's x [outer, inner].
  void all_gather(const void *x, int64_t outer, int64_t inner, DType dtype, void *out);
  // out [outer, inner] = sum over ranks of x [outer, size, inner] at this rank's place.
  void reduce_scatter(const void *x, int64_t outer, int64_t inner, DType dtype, void *out);
  void barrier();

  void set_timeout(double seconds) { options_.timeout = seconds; }

  // Ends the group: ranks that wait, or will, fail with `reason`.
  void fail(const std::string &reason);

 private:
  struct Operation;

  template <class Write, class Read>
  void rounds(const Operation &operation, int64_t count, int64_t per_round, Write write, Read read);
  void wait_for(int other, const Operation &operation);
  void sleep_until_arrived(int other, const Operation &operation);
  bool arrived(int other) const;
  [[noreturn]] void end(const std::string &reason);
  char *slot(int rank) const;  // of the present round

  GroupOptions options_;
  int file_ = -1;
  GroupMemory *memory_ = nullptr;
  int64_t mapped_ = 0;
  uint32_t round_ = 0;
};

// The groups of this process, by name. join_group throws std::runtime_error where the memory is not that of such a group.
Group &join_group(const GroupOptions &options);
void leave_group(const std::string &name);
void fail_groups(const std::string &reason);
void set_group_timeout(double seconds);  // of all groups
Group &group(const std::string &name);  // throws std::runtime_error where it is not joined

// Why a group of this process has ended; empty if none has.
std::string group_failure();

}  // namespace vllm_ms
