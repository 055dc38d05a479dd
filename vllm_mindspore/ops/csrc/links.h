// A rank's connections with those ranks of its group that are on other hosts: TCP, by libzmq (zmq_library.h).
//
// One connection a pair of ranks. What a rank posts in a round is sent to each of them out of its slot, by libzmq's
// thread; what they post is received by that thread and kept until the round is given back. A rank has at most `depth`
// rounds begun and not ended, so it is at most 2 * depth of them ahead of any other. One that only posts is told what
// has been taken.
//
// A connection that is closed, or over which nothing comes for `silence` seconds, not even an answer to libzmq's
// heartbeats, is a rank that is gone. A failure is told to all, and so is that a rank leaves.
//
// One thread posts and takes; others may ask for what is lost, and report failures.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "zmq_library.h"

namespace vllm_ms {

extern const char *const kRankIsGone;  // " has died or …"

// Which bytes of a rank's slot another one needs.
struct Part {
  int64_t offset = 0, bytes = 0;
};

// What was posted, and its part of the slot.
struct Posted {
  uint32_t round = 0;
  int32_t kind = 0;
  int64_t bytes = 0;  // of the collective, as Rounds::post has them
  Part part;
};

struct LinkOptions {
  std::string group, token;  // a secret of the group's ranks, so that nobody else is taken for one
  int rank = 0, size = 1;
  int depth = 1;        // rounds that a rank may have posted and not taken
  double silence = 10;  // seconds
};

class Links {
 public:
  // others: ranks on other hosts. Listens for those above this one, on ports of `address` that are free.
  Links(const LinkOptions &options, const std::string &address, const std::vector<int> &others);
  ~Links();
  Links(const Links &) = delete;
  Links &operator=(const Links &) = delete;

  // Where rank `other`, above this one, connects to: "tcp://address:port".
  std::string endpoint(int other) const;
  // Connects with rank `other`; process, host: what it is called in errors; endpoint: where it listens, if it is below.
  void connect(int other, const std::string &process, const std::string &host, const std::string &endpoint);
  // Waits until all have answered; throws std::runtime_error that names one that has not within `seconds`.
  void greet(double seconds);

  bool to(int rank) const { return peers_[rank] != nullptr; }
  // "rank 1 (process 7 on host 10.0.0.2)"
  std::string describe(int rank) const;

  // Sends a round to all: of `slot` what part_of(rank) says, which stays as it is until sent(round).
  void send(const Posted &posted, char *slot, const std::function<Part(int)> &part_of);
  bool sent(uint32_t round) const;
  // What rank `other` has posted in a round, or nullptr while it has not arrived.
  const Posted *posted(int other, uint32_t round) const;
  // The slot of rank `other`, of which the part that was sent is here.
  char *slot(int other, uint32_t round) const;
  // Whether rank `other` has told that it has taken a round of this rank's.
  bool taken(int other, uint32_t round) const;
  void tell_taken(uint32_t round);
  // Nobody reads the round's slots any more.
  void give_back(uint32_t round);

  // Receives what has come; waits for something, at most so many milliseconds.
  void receive(int milliseconds);
  // Whether the connection with a rank is gone.
  bool gone(int rank) const;
  // What another rank has reported; empty if nothing.
  std::string failure() const;
  void tell_failure(const std::string &reason);
  void tell_leaving();
  // Why the group cannot go on: a failure, or which rank is gone or has left; empty while it can.
  std::string lost();
  // Waits until all that was sent has left, at most so many seconds; returns whether it has.
  bool flush(double seconds);

 private:
  struct Arrived {
    Posted posted;
    zmq::Message message;
    bool filled = false;
  };
  struct Peer {
    void *socket = nullptr, *monitor = nullptr;
    std::string process, host, endpoint;
    int file = -1;       // of the connection, in this process
    uint32_t taken = 0;  // its last round
    bool greeted = false, gone = false, left = false;
    std::vector<Arrived> rounds;
  };
  static constexpr int kMostDepth = 16;
  // To how many a round's slot is being sent, and how many texts; lives until libzmq has called back for all.
  struct Sending {
    std::array<std::atomic<int>, kMostDepth> rounds{};
    std::atomic<int> texts{0};
    bool any() const;
  };

  void open(int other);
  void send_hello(int other);
  void require(bool condition, const std::string &what) const;
  void set(void *socket, int option, int value) const;
  void send_text(int other, int32_t kind, const std::string &text, uint32_t round = 0);
  void receive_now(int milliseconds);
  void receive_all(int other);
  void receive_one(int other, zmq::Message *header);
  void watch(int other);

  LinkOptions options_;
  std::string address_;
  std::vector<std::unique_ptr<Peer>> peers_;  // by rank; null for those of this host
  Sending *sending_;
  std::string failure_;
  bool told_ = false;
  mutable std::mutex mutex_;  // of the sockets and what has arrived
};

}  // namespace vllm_ms
