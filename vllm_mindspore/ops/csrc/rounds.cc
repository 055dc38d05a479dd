#include "rounds.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <stdexcept>

namespace vllm_ms {

// What all ranks of a group map. Zero when it is made.
struct GroupMemory {
  static constexpr uint64_t kMagic = 0x32706f7267736d76;
  static constexpr uint32_t kFailing = 1, kFailed = 2;

  struct Counter {
    std::atomic<uint32_t> value;
    std::atomic<uint32_t> sleepers;  // ranks that sleep until it changes
  };

  struct alignas(128) Line {
    Counter posted, taken;  // the last round of each
    std::atomic<int32_t> process;
    int32_t kind[Rounds::kDepth];   // of the last rounds: what the rank is doing,
    int64_t bytes[Rounds::kDepth];  // and with how much
  };

  uint64_t magic;
  int64_t size, slot_bytes;
  std::atomic<uint32_t> failed;
  char reason[1000];
  Line lines[kMostRanks];
};

namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kAliveCheck = 100000000;  // nanoseconds
constexpr double kFlushSeconds = 1;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
int64_t slots_offset() { return round_up(sizeof(GroupMemory), kPage); }
int64_t memory_bytes(int64_t size, int64_t slot_bytes) { return slots_offset() + Rounds::kDepth * size * slot_bytes; }

std::string describe(int32_t kind, int64_t bytes) {
  static const char *const names[] = {
      "all_reduce", "all_gather", "reduce_scatter",   "barrier",          "gather_rows",
      "dispatch",   "combine",    "all_reduce_start", "all_gather_start", "reduce_scatter_start", "reduce_scatter_rows",
      "all_to_all", "send"};
  const bool known = kind >= 0 && kind < static_cast<int32_t>(sizeof(names) / sizeof(names[0]));
  return text_of(known ? names[kind] : "another collective", " of ", bytes, " bytes");
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

void advance(GroupMemory::Counter &counter, uint32_t value) {
  counter.value.store(value, std::memory_order_seq_cst);
  if (counter.sleepers.load(std::memory_order_seq_cst) > 0) futex_wake_all(&counter.value, Sharing::memory);
}

std::mutex failure_mutex;
std::string failure;

}  // namespace

// What a rank waits for: that a counter of another one reaches a round.
struct Rounds::Wanted {
  int other;
  GroupMemory::Counter &counter;
  uint32_t round;
  Collective kind;  // of this rank, for messages
  int64_t bytes;

  // Also for a round before the first, whose number is negative; numbers wrap around.
  bool there() const { return static_cast<int32_t>(counter.value.load(std::memory_order_acquire) - round) >= 0; }
};

Rounds::Rounds(const GroupOptions &options) : options_(options) {
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
  require(!options_.one_way || options_.size == 2, text_of("one way between ", options_.size, " ranks; there must be 2"));
  file_ = make ? memfd_create("vllm_ms_group", MFD_CLOEXEC) : open(options_.memory.c_str(), O_RDWR | O_CLOEXEC);
  require(file_ >= 0, std::strerror(errno));
  if (make) require(ftruncate(file_, memory_bytes(options_.size, slot_bytes)) == 0, std::strerror(errno));
  struct stat status;
  require(fstat(file_, &status) == 0, std::strerror(errno));
  require(status.st_size > slots_offset(), "not the memory of a group");
  void *mapping = mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file_, 0);
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

Rounds::~Rounds() {
  if (links_ != nullptr) links_->tell_leaving();
  const bool sent = links_ == nullptr || links_->flush(kFlushSeconds);
  links_ = nullptr;
  if (sent) munmap(memory_, mapped_);  // else something may still be read from there
  close(file_);
}

Links &Rounds::links() {
  if (links_ == nullptr) throw std::runtime_error("group " + options_.name + ": it has no connections");
  return *links_;
}

int64_t Rounds::slot_bytes() const { return memory_->slot_bytes; }

char *Rounds::slot(int rank, uint32_t round) const {
  if (remote(rank)) return links_->slot(rank, round);
  return reinterpret_cast<char *>(memory_) + slots_offset() + (kDepth * rank + round % kDepth) * memory_->slot_bytes;
}

void Rounds::fail(const std::string &reason) {
  uint32_t none = 0;
  if (memory_->failed.compare_exchange_strong(none, GroupMemory::kFailing)) {
    std::snprintf(memory_->reason, sizeof(memory_->reason), "%s", reason.c_str());
    memory_->failed.store(GroupMemory::kFailed, std::memory_order_release);
  }
  for (int rank = 0; rank < options_.size; ++rank) {
    futex_wake_all(&memory_->lines[rank].posted.value, Sharing::memory);
    futex_wake_all(&memory_->lines[rank].taken.value, Sharing::memory);
  }
  if (links_ != nullptr) links_->tell_failure(reason);
}

void Rounds::end(const std::string &reason) {
  const std::string text = text_of("rank ", options_.rank, " of group ", options_.name, ": ", reason);
  fail(text);
  {
    const std::lock_guard<std::mutex> guard(failure_mutex);
    if (failure.empty()) failure = text;
  }
  throw std::runtime_error(text);
}

void Rounds::require_alive() {
  if (memory_->failed.load(std::memory_order_acquire) == GroupMemory::kFailed) end(memory_->reason);
}

void Rounds::sleep_until_there(const Wanted &wanted) {
  const GroupMemory::Line &line = memory_->lines[wanted.other];
  const int64_t deadline = monotonic_nanoseconds() + static_cast<int64_t>(options_.timeout * 1e9);
  wanted.counter.sleepers.fetch_add(1, std::memory_order_seq_cst);
  const auto leave = [&](const std::string &reason) {
    wanted.counter.sleepers.fetch_sub(1, std::memory_order_relaxed);
    if (!reason.empty()) end(reason);
  };
  for (;;) {
    const uint32_t seen = wanted.counter.value.load(std::memory_order_seq_cst);
    if (wanted.there()) return leave("");
    futex_wait(&wanted.counter.value, seen, Sharing::memory, kAliveCheck);
    if (wanted.there()) return leave("");
    if (memory_->failed.load(std::memory_order_acquire) == GroupMemory::kFailed) return leave(memory_->reason);
    if (links_ != nullptr) {
      links_->receive(0);
      const std::string reported = links_->failure();
      if (!reported.empty()) return leave(reported);
    }
    struct flock lock = rank_lock(wanted.other);  // says nothing of a rank in this process: such are threads of a test
    const bool dead = line.process != getpid() && fcntl(file_, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
    const auto what = [&] {
      const std::string doing = describe(static_cast<int32_t>(wanted.kind), wanted.bytes);
      return text_of("rank ", wanted.other, " (process ", line.process.load(), ") during ", doing);
    };
    if (dead && !wanted.there()) return leave(text_of(what(), " has died"));
    if (options_.timeout > 0 && monotonic_nanoseconds() > deadline) {
      return leave(text_of(what(), " did not arrive within ", options_.timeout, " s"));
    }
  }
}

void Rounds::wait_for(const Wanted &wanted) {
  if (!spin_until(options_.spin_nanoseconds, [&] { return wanted.there(); })) sleep_until_there(wanted);
}

// Waits until there(), which something that arrives from other hosts may make true.
template <class There>
void Rounds::wait_for_links(int other, Collective kind, int64_t bytes, There there) {
  const int64_t deadline = monotonic_nanoseconds() + static_cast<int64_t>(options_.timeout * 1e9);
  while (!there()) {
    links_->receive(kAliveCheck / 1000000);
    if (there()) return;
    require_alive();
    require_connected(other, kind, bytes);
    if (options_.timeout > 0 && monotonic_nanoseconds() > deadline) {
      const std::string doing = describe(static_cast<int32_t>(kind), bytes);
      end(text_of(links_->describe(other), " during ", doing, " did not arrive within ", options_.timeout, " s"));
    }
  }
}

void Rounds::require_connected(int other, Collective kind, int64_t bytes) {
  const std::string reported = links_->failure();
  if (!reported.empty()) end(reported);
  if (!links_->gone(other)) return;
  end(text_of(links_->describe(other), " during ", describe(static_cast<int32_t>(kind), bytes), kRankIsGone));
}

uint32_t Rounds::begin(Collective kind, int64_t bytes) {
  require_alive();
  const uint32_t round = posted_ + 1;
  if (round - taken_ > kDepth) end(text_of(kDepth, " collectives are begun and not ended"));
  for (int other = 0; other < options_.size; ++other) {
    if (other == options_.rank) continue;
    if (!remote(other)) {
      wait_for({other, memory_->lines[other].taken, round - kDepth, kind, bytes});
    } else {  // the slot's last round has left it, and where nothing comes back, has been taken
      wait_for_links(other, kind, bytes, [&] {
        return links_->sent(round) && (!options_.one_way || links_->taken(other, round - kDepth));
      });
    }
  }
  return round;
}

void Rounds::publish(Collective kind, int64_t bytes) {
  GroupMemory::Line &mine = memory_->lines[options_.rank];
  ++posted_;
  mine.kind[posted_ % kDepth] = static_cast<int32_t>(kind);
  mine.bytes[posted_ % kDepth] = bytes;
  advance(mine.posted, posted_);
}

void Rounds::wait_for_post(int other, uint32_t round, Collective kind, int64_t bytes) {
  if (remote(other)) {
    wait_for_links(other, kind, bytes, [&] { return links_->posted(other, round) != nullptr; });
    const Posted &posted = *links_->posted(other, round);
    return require_same(other, posted.kind, posted.bytes, kind, bytes);
  }
  GroupMemory::Line &line = memory_->lines[other];
  wait_for({other, line.posted, round, kind, bytes});
  require_same(other, line.kind[round % kDepth], line.bytes[round % kDepth], kind, bytes);
}

void Rounds::require_same(int other, int32_t its_kind, int64_t its_bytes, Collective kind, int64_t bytes) {
  if (its_kind == static_cast<int32_t>(kind) && its_bytes == bytes) return;
  end(text_of("rank ", other, " is at ", describe(its_kind, its_bytes), ", this one at ",
              describe(static_cast<int32_t>(kind), bytes)));
}

void Rounds::give_back(uint32_t round) {
  taken_ahead_ |= 1u << (round - taken_ - 1);
  while ((taken_ahead_ & 1) != 0) {
    taken_ahead_ >>= 1;
    ++taken_;
  }
  advance(memory_->lines[options_.rank].taken, taken_);
  if (links_ == nullptr) return;
  links_->give_back(round);
  if (options_.one_way && options_.rank == 1) links_->tell_taken(round);
}

std::string group_failure() {
  const std::lock_guard<std::mutex> guard(failure_mutex);
  return failure;
}

}  // namespace vllm_ms
