// Rounds between the processes of a group: what all collectives are made of. Those of one host share memory; those of
// other hosts are reached by TCP (links.h).
//
// The memory has, for every rank, two counters and kDepth slots. A rank begins a round with `post`: it writes what the
// others need into its slot of the round and raises its counter of rounds posted. It ends the round with `take`: it waits
// until all have posted, reads their slots, and raises its counter of rounds taken. Between the two it may do other work
// and other rounds; all ranks post their rounds in the same order. A slot is written again when all have taken what was in
// it. To a rank of another host goes that part of a slot that it reads, and it does not tell when it has taken it.
//
// A rank that waits finds out within kAliveCheck that another has died (the kernel drops the lock that each rank holds on
// its byte of the memory's file, or closes its connection), that it reported a failure, or that it is at another
// collective; and, after the group's timeout, that it stalls. Each is a std::runtime_error that names the group and the
// rank, and ends the group for all.
#pragma once

#include <cstdint>
#include <memory>
#include <sstream>
#include <string>

#include "links.h"
#include "waiting.h"

namespace vllm_ms {

constexpr int kMostRanks = 64;
struct GroupMemory;

struct GroupOptions {
  std::string name;
  int rank = 0;
  int size = 1;
  std::string memory;            // path of the group's memory, to join it; empty: make it
  int64_t slot_bytes = 0;        // most of a round, where it is made; only what is used becomes resident
  double timeout = 0;            // seconds that another rank may take to arrive; 0: any
  int64_t spin_nanoseconds = 0;  // to wait busily before sleeping
  bool one_way = false;          // of two ranks: rank 0 only posts, and rank 1 only takes
};

template <class... Parts>
std::string text_of(const Parts &...parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

enum class Collective : int32_t {
  all_reduce,
  all_gather,
  reduce_scatter,
  barrier,
  gather_rows,
  dispatch,
  combine,
  all_reduce_start,
  all_gather_start,
  reduce_scatter_start,
  reduce_scatter_rows,
  all_to_all,
  send
};

class Rounds {
 public:
  static constexpr int kDepth = 4;  // rounds that a rank may have posted and not taken

  explicit Rounds(const GroupOptions &options);
  ~Rounds();
  Rounds(const Rounds &) = delete;
  Rounds &operator=(const Rounds &) = delete;

  int rank() const { return options_.rank; }
  int size() const { return options_.size; }
  bool one_way() const { return options_.one_way; }
  const std::string &name() const { return options_.name; }
  // Others join by /proc/<process>/fd/<this>: the memory has no name in any file system, and is gone with its last user.
  int file() const { return file_; }
  int64_t slot_bytes() const;
  void set_timeout(double seconds) { options_.timeout = seconds; }

  // Before the first round: the connections with the ranks of other hosts.
  void use(std::unique_ptr<Links> links) { links_ = std::move(links); }
  bool crosses_hosts() const { return links_ != nullptr; }
  Links &links();  // throws std::runtime_error where there are none

  // Begins a round: write(slot) writes this rank's slot, of which rank r reads part_of(r). Returns the round's number.
  // bytes: of the whole collective that the round belongs to, to tell when ranks are at different ones.
  template <class Write, class PartOf>
  uint32_t post(Collective kind, int64_t bytes, Write write, PartOf part_of) {
    const uint32_t round = begin(kind, bytes);
    char *mine = slot(options_.rank, round);
    write(mine);
    publish(kind, bytes);
    if (links_ != nullptr) links_->send({round, static_cast<int32_t>(kind), bytes, {}}, mine, part_of);
    return round;
  }

  // Ends a round: waits for all ranks, of which rank r has given bytes_of(r), and lets read() look at their slots.
  template <class BytesOf, class Read>
  void take(uint32_t round, Collective kind, BytesOf bytes_of, Read read) {
    for (int other = 0; other < options_.size; ++other) {
      if (other != options_.rank) wait_for_post(other, round, kind, bytes_of(other));
    }
    read();
    give_back(round);
  }

  // Of a group that is one-way: rank 0 has nothing to take of a round; which one rank 1 takes next.
  void leave_to_receiver(uint32_t round) { give_back(round); }
  uint32_t next_to_take() const { return taken_ + 1; }

  // What a rank wrote, between `post` and the end of `take`; of a rank of another host that part that this one reads.
  char *slot(int rank, uint32_t round) const;
  // How many rounds could be begun now, without one to be ended.
  int free_rounds() const { return kDepth - static_cast<int>(posted_ - taken_); }

  // Ends the group: ranks that wait, or will, fail with `reason`.
  void fail(const std::string &reason);

 private:
  struct Wanted;

  uint32_t begin(Collective kind, int64_t bytes);
  void publish(Collective kind, int64_t bytes);
  void wait_for_post(int other, uint32_t round, Collective kind, int64_t bytes);
  void give_back(uint32_t round);
  bool remote(int rank) const { return links_ != nullptr && links_->to(rank); }
  void wait_for(const Wanted &wanted);
  template <class There>
  void wait_for_links(int other, Collective kind, int64_t bytes, There there);
  void require_connected(int other, Collective kind, int64_t bytes);
  void require_same(int other, int32_t its_kind, int64_t its_bytes, Collective kind, int64_t bytes);
  void sleep_until_there(const Wanted &wanted);
  void require_alive();
  [[noreturn]] void end(const std::string &reason);

  GroupOptions options_;
  std::unique_ptr<Links> links_;  // null: all ranks are on this host
  int file_ = -1;
  GroupMemory *memory_ = nullptr;
  int64_t mapped_ = 0;
  uint32_t posted_ = 0, taken_ = 0;  // rounds; of the taken ones only as far as none is missing
  uint32_t taken_ahead_ = 0;         // bit i: round taken_ + 1 + i is taken too
};

// Why a group of this process has ended; empty if none has.
std::string group_failure();

}  // namespace vllm_ms
