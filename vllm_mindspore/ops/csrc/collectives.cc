#include "collectives.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "kernels/reduce.h"
#include "parallel.h"
#include "waiting.h"

namespace vllm_ms {

// What all ranks of a group map. Zero when it is made.
struct GroupMemory {
  static constexpr uint64_t kMagic = 0x31706f7267736d76;
  static constexpr uint32_t kFailing = 1, kFailed = 2;

  struct alignas(128) Line {
    std::atomic<uint32_t> round;     // the last one that this rank has written
    std::atomic<uint32_t> sleepers;  // ranks that sleep until it changes
    std::atomic<int32_t> process;
    int32_t kind[2];   // of the last two rounds: what the rank is doing,
    int64_t bytes[2];  // and with how much
  };

  uint64_t magic;
  int64_t size, slot_bytes;
  std::atomic<uint32_t> failed;
  char reason[1000];
  Line lines[kMostRanks];
};

namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kAliveCheck = 100000000;   // nanoseconds
constexpr int64_t kParallelBytes = 1 << 17;  // from here on a second thread pays

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
int64_t slots_offset() { return round_up(sizeof(GroupMemory), kPage); }
int64_t memory_bytes(int64_t size, int64_t slot_bytes) { return slots_offset() + 2 * size * slot_bytes; }

template <class... Parts>
std::string text_of(const Parts &...parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Calls f(begin, end) for [0, count) elements of `bytes` each, on all threads where that pays.
template <class F>
void for_elements(int64_t count, int64_t bytes, F f) {
  parallel_for(count, std::max<int64_t>(1, kParallelBytes / bytes), f);
}

// Calls f(place in [outer, size, inner], place in [begin, end), count) for every run of elements [begin, end) of part
// `part`, an [outer, inner].
template <class F>
void for_runs(int64_t begin, int64_t end, int64_t part, int64_t size, int64_t inner, F f) {
  for (int64_t i = begin; i < end;) {
    const int64_t row = i / inner, column = i % inner, count = std::min(end - i, inner - column);
    f((row * size + part) * inner + column, i - begin, count);
    i += count;
  }
}

// Takes or asks for the lock on the byte of a rank. The kernel drops it when the process that took it ends.
struct flock rank_lock(int rank) {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return lock;
}

std::mutex failure_mutex;
std::string failure;

}  // namespace

struct Group::Operation {
  enum Kind : int32_t { all_reduce, all_gather, reduce_scatter, barrier };
  Kind kind;
  int64_t bytes;

  static std::string describe(int32_t kind, int64_t bytes) {
    static const char *const names[] = {"all_reduce", "all_gather", "reduce_scatter", "barrier"};
    return text_of(kind >= 0 && kind <= barrier ? names[kind] : "another collective", " of ", bytes, " bytes");
  }
};

Group::Group(const GroupOptions &options) : options_(options) {
  const auto require = [this](bool condition, const std::string &reason) {
    if (condition) return;
    if (memory_ != nullptr) munmap(memory_, mapped_);
    if (file_ >= 0) close(file_);
    throw std::runtime_error("group " + options_.name + ": " + options_.memory + ": " + reason);
  };
  const bool make = options_.memory.empty();
  const int64_t slot_bytes = round_up(std::max<int64_t>(options_.slot_bytes, 1), kPage);
  require(options_.size >= 1 && options_.size <= kMostRanks && options_.rank >= 0 && options_.rank < options_.size,
          text_of("rank ", options_.rank, " of ", options_.size, "; there may be ", kMostRanks));
  file_ = make ? memfd_create("vllm_ms_group", MFD_CLOEXEC) : open(options_.memory.c_str(), O_RDWR | O_CLOEXEC);
  require(file_ >= 0, std::strerror(errno));
  if (make) require(ftruncate(file_, memory_bytes(options_.size, slot_bytes)) == 0, std::strerror(errno));
  struct stat status;
  require(fstat(file_, &status) == 0, std::strerror(errno));
  require(status.st_size > slots_offset(), "not the memory of a group");
  void *mapping = mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
  require(mapping != MAP_FAILED, std::strerror(errno));
  memory_ = static_cast<GroupMemory *>(mapping);
  mapped_ = status.st_size;
  if (make) {
    memory_->magic = GroupMemory::kMagic;
    memory_->size = options_.size;
    memory_->slot_bytes = slot_bytes;
  }
  require(memory_->magic == GroupMemory::kMagic && mapped_ == memory_bytes(memory_->size, memory_->slot_bytes),
          "not the memory of a group");
  require(memory_->size == options_.size, text_of("made for ", memory_->size, " ranks, joined as one of ", options_.size));
  struct flock lock = rank_lock(options_.rank);
  require(fcntl(file_, F_SETLK, &lock) == 0, text_of("rank ", options_.rank, " is taken by another process"));
  memory_->lines[options_.rank].process = getpid();
}

Group::~Group() {
  munmap(memory_, mapped_);
  close(file_);
}

char *Group::slot(int rank) const {
  return reinterpret_cast<char *>(memory_) + slots_offset() + (2 * rank + round_ % 2) * memory_->slot_bytes;
}

bool Group::arrived(int other) const {
  return static_cast<int32_t>(memory_->lines[other].round.load(std::memory_order_acquire) - round_) >= 0;
}

void Group::fail(const std::string &reason) {
  uint32_t none = 0;
  if (memory_->failed.compare_exchange_strong(none, GroupMemory::kFailing)) {
    std::snprintf(memory_->reason, sizeof(memory_->reason), "%s", reason.c_str());
    memory_->failed.store(GroupMemory::kFailed, std::memory_order_release);
  }
  for (int rank = 0; rank < options_.size; ++rank) futex_wake_all(&memory_->lines[rank].round, Sharing::memory);
}

void Group::end(const std::string &reason) {
  const std::string text = text_of("rank ", options_.rank, " of group ", options_.name, ": ", reason);
  fail(text);
  {
    const std::lock_guard<std::mutex> guard(failure_mutex);
    if (failure.empty()) failure = text;
  }
  throw std::runtime_error(text);
}

void Group::sleep_until_arrived(int other, const Operation &operation) {
  GroupMemory::Line &line = memory_->lines[other];
  const int64_t begin = monotonic_nanoseconds();
  const int64_t deadline = begin + static_cast<int64_t>(options_.timeout * 1e9);
  line.sleepers.fetch_add(1, std::memory_order_seq_cst);
  const auto leave = [&](const std::string &reason) {
    line.sleepers.fetch_sub(1, std::memory_order_relaxed);
    if (!reason.empty()) end(reason);
  };
  for (;;) {
    const uint32_t seen = line.round.load(std::memory_order_seq_cst);
    if (arrived(other)) return leave("");
    futex_wait(&line.round, seen, Sharing::memory, kAliveCheck);
    if (arrived(other)) return leave("");
    if (memory_->failed.load(std::memory_order_acquire) == GroupMemory::kFailed) return leave(memory_->reason);
    struct flock lock = rank_lock(other);  // says nothing of a rank in this process: such are threads of a test
    const bool dead = line.process != getpid() && fcntl(file_, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
    const auto what = [&] {
      return text_of(" (process ", line.process.load(), ") during ", Operation::describe(operation.kind, operation.bytes));
    };
    if (dead && !arrived(other)) return leave(text_of("rank ", other, what(), " has died"));
    if (options_.timeout > 0 && monotonic_nanoseconds() > deadline) {
      return leave(text_of("rank ", other, what(), " did not arrive within ", options_.timeout, " s"));
    }
  }
}

void Group::wait_for(int other, const Operation &operation) {
  if (!spin_until(options_.spin_nanoseconds, [&] { return arrived(other); })) sleep_until_arrived(other, operation);
  const GroupMemory::Line &line = memory_->lines[other];
  const int32_t kind = line.kind[round_ % 2];
  const int64_t bytes = line.bytes[round_ % 2];
  if (kind == operation.kind && bytes == operation.bytes) return;
  end(text_of("rank ", other, " is at ", Operation::describe(kind, bytes), ", this one at ",
              Operation::describe(operation.kind, operation.bytes)));
}

// `count` units, `per_round` of them in a round: write(begin, end, slot) puts them into this rank's slot, and
// read(begin, end) takes the others' out of slot(rank).
template <class Write, class Read>
void Group::rounds(const Operation &operation, int64_t count, int64_t per_round, Write write, Read read) {
  GroupMemory::Line &mine = memory_->lines[options_.rank];
  for (int64_t begin = 0; begin == 0 || begin < count; begin += per_round) {
    const int64_t end_of_round = std::min(count, begin + per_round);
    if (memory_->failed.load(std::memory_order_acquire) == GroupMemory::kFailed) end(memory_->reason);
    ++round_;
    write(begin, end_of_round, slot(options_.rank));
    mine.kind[round_ % 2] = operation.kind;
    mine.bytes[round_ % 2] = operation.bytes;
    mine.round.store(round_, std::memory_order_seq_cst);
    if (mine.sleepers.load(std::memory_order_seq_cst) > 0) futex_wake_all(&mine.round, Sharing::memory);
    for (int other = 0; other < options_.size; ++other) {
      if (other != options_.rank) wait_for(other, operation);
    }
    read(begin, end_of_round);
  }
}

void Group::all_reduce(const void *x, int64_t count, DType dtype, void *out) {
  const int64_t bytes = dtype_size(dtype);
  const auto write = [&](int64_t begin, int64_t end, char *to) {
    for_elements((end - begin) * bytes, 1, [&](int64_t first, int64_t last) {
      std::memcpy(to + first, static_cast<const char *>(x) + begin * bytes + first, last - first);
    });
  };
  const auto read = [&](int64_t begin, int64_t end) {
    const void *parts[kMostRanks];
    for (int rank = 0; rank < options_.size; ++rank) parts[rank] = slot(rank);
    void *to = static_cast<char *>(out) + begin * bytes;
    for_elements(end - begin, bytes, [&](int64_t first, int64_t last) {
      sum_parts({parts, options_.size, dtype, first, last, to});
    });
  };
  rounds({Operation::all_reduce, count * bytes}, count, memory_->slot_bytes / bytes, write, read);
}

void Group::all_gather(const void *x, int64_t outer, int64_t inner, DType dtype, void *out) {
  const int64_t bytes = dtype_size(dtype), count = outer * inner;
  const auto write = [&](int64_t begin, int64_t end, char *to) {
    std::memcpy(to, static_cast<const char *>(x) + begin * bytes, (end - begin) * bytes);
  };
  const auto read = [&](int64_t begin, int64_t end) {
    for (int rank = 0; rank < options_.size; ++rank) {
      const char *from = slot(rank);
      for_elements(end - begin, bytes, [&](int64_t first, int64_t last) {
        for_runs(begin + first, begin + last, rank, options_.size, inner, [&](int64_t to, int64_t at, int64_t n) {
          std::memcpy(static_cast<char *>(out) + to * bytes, from + (first + at) * bytes, n * bytes);
        });
      });
    }
  };
  rounds({Operation::all_gather, count * bytes}, count, memory_->slot_bytes / bytes, write, read);
}

void Group::reduce_scatter(const void *x, int64_t outer, int64_t inner, DType dtype, void *out) {
  const int64_t bytes = dtype_size(dtype), count = outer * inner;
  const auto write = [&](int64_t begin, int64_t end, char *to) {
    for (int rank = 0; rank < options_.size; ++rank) {
      char *part = to + rank * (end - begin) * bytes;
      for_elements(end - begin, bytes, [&](int64_t first, int64_t last) {
        for_runs(begin + first, begin + last, rank, options_.size, inner, [&](int64_t from, int64_t at, int64_t n) {
          std::memcpy(part + (first + at) * bytes, static_cast<const char *>(x) + from * bytes, n * bytes);
        });
      });
    }
  };
  const auto read = [&](int64_t begin, int64_t end) {
    const void *parts[kMostRanks];
    for (int rank = 0; rank < options_.size; ++rank) parts[rank] = slot(rank) + options_.rank * (end - begin) * bytes;
    void *to = static_cast<char *>(out) + begin * bytes;
    for_elements(end - begin, bytes, [&](int64_t first, int64_t last) {
      sum_parts({parts, options_.size, dtype, first, last, to});
    });
  };
  rounds({Operation::reduce_scatter, count * bytes}, count, memory_->slot_bytes / bytes / options_.size, write, read);
}

void Group::barrier() {
  rounds({Operation::barrier, 0}, 0, 1, [](int64_t, int64_t, char *) {}, [](int64_t, int64_t) {});
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

Group &group(const std::string &name) {
  const std::lock_guard<std::mutex> guard(groups_mutex);
  const auto found = groups().find(name);
  if (found == groups().end()) throw std::runtime_error("group " + name + " is not joined by this process");
  return *found->second;
}

std::string group_failure() {
  const std::lock_guard<std::mutex> guard(failure_mutex);
  return failure;
}

}  // namespace vllm_ms
