#include "links.h"

#include <errno.h>
#include <time.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "waiting.h"

namespace vllm_ms {
namespace {

constexpr int kHello = -1, kFailure = -2, kLeaving = -3, kTaken = -4;  // kinds of messages beside those of rounds

// What goes before the bytes.
struct Header {
  uint32_t round;
  int32_t kind;
  int64_t bytes, offset, length;
};

// Nothing is sent to a rank that is gone, and whoever waits for it will see that it is.
void send_both(zmq::Message *messages, void *socket) {
  const zmq::Library &library = zmq_library();
  const bool first = library.msg_send(&messages[0], socket, zmq::kDontWait | zmq::kMore) >= 0;
  if (!first) library.msg_close(&messages[0]);
  if (!first || library.msg_send(&messages[1], socket, zmq::kDontWait) < 0) library.msg_close(&messages[1]);
}

void one_is_sent(void *, void *counter) {
  static_cast<std::atomic<int> *>(counter)->fetch_sub(1, std::memory_order_release);
}

void free_text(void *text, void *counter) {
  std::free(text);
  one_is_sent(nullptr, counter);
}

}  // namespace

const char *const kRankIsGone = " has died or cannot be reached: its connection is closed, or silent for too long";

bool Links::Sending::any() const {
  const auto busy = [](const std::atomic<int> &counter) { return counter.load(std::memory_order_acquire) > 0; };
  return busy(texts) || std::any_of(rounds.begin(), rounds.end(), busy);
}

void Links::send_hello(int other) { send_text(other, kHello, options_.token); }

void Links::send_text(int other, int32_t kind, const std::string &text, uint32_t round) {
  const zmq::Library &library = zmq_library();
  Header header{round, kind, 0, 0, static_cast<int64_t>(text.size())};
  zmq::Message messages[2];
  library.msg_init_size(&messages[0], sizeof(header));
  std::memcpy(library.msg_data(&messages[0]), &header, sizeof(header));
  void *copy = std::malloc(text.size() + 1);
  std::memcpy(copy, text.data(), text.size());
  sending_->texts.fetch_add(1);
  library.msg_init_data(&messages[1], copy, text.size(), free_text, &sending_->texts);
  send_both(messages, peers_[other]->socket);
}

void Links::send(const Posted &posted, char *slot, const std::function<Part(int)> &part_of) {
  const zmq::Library &library = zmq_library();
  const std::lock_guard<std::mutex> guard(mutex_);
  std::atomic<int> &counter = sending_->rounds[posted.round % options_.depth];
  for (int other = 0; other < options_.size; ++other) {
    if (peers_[other] == nullptr || peers_[other]->gone) continue;
    const Part part = part_of(other);
    const Header header{posted.round, posted.kind, posted.bytes, part.offset, part.bytes};
    zmq::Message messages[2];
    library.msg_init_size(&messages[0], sizeof(header));
    std::memcpy(library.msg_data(&messages[0]), &header, sizeof(header));
    counter.fetch_add(1);
    library.msg_init_data(&messages[1], slot + part.offset, part.bytes, one_is_sent, &counter);
    send_both(messages, peers_[other]->socket);
  }
}

bool Links::sent(uint32_t round) const {
  return sending_->rounds[round % options_.depth].load(std::memory_order_acquire) == 0;
}

const Posted *Links::posted(int other, uint32_t round) const {
  const std::lock_guard<std::mutex> guard(mutex_);
  const Arrived &arrived = peers_[other]->rounds[round % (2 * options_.depth)];
  return arrived.filled && arrived.posted.round == round ? &arrived.posted : nullptr;
}

char *Links::slot(int other, uint32_t round) const {
  Arrived &arrived = peers_[other]->rounds[round % (2 * options_.depth)];
  return static_cast<char *>(zmq_library().msg_data(&arrived.message)) - arrived.posted.part.offset;
}

bool Links::taken(int other, uint32_t round) const {
  const std::lock_guard<std::mutex> guard(mutex_);
  return static_cast<int32_t>(peers_[other]->taken - round) >= 0;
}

void Links::tell_taken(uint32_t round) {
  const std::lock_guard<std::mutex> guard(mutex_);
  for (int other = 0; other < options_.size; ++other) {
    if (peers_[other] != nullptr && !peers_[other]->gone) send_text(other, kTaken, "", round);
  }
}

void Links::give_back(uint32_t round) {
  const std::lock_guard<std::mutex> guard(mutex_);
  for (const auto &peer : peers_) {
    if (peer == nullptr) continue;
    Arrived &arrived = peer->rounds[round % (2 * options_.depth)];
    if (arrived.filled) zmq_library().msg_close(&arrived.message);
    arrived.filled = false;
  }
}

void Links::receive_one(int other, zmq::Message *first) {
  const zmq::Library &library = zmq_library();
  Peer &peer = *peers_[other];
  zmq::Message second;
  library.msg_init(&second);
  const bool two = library.msg_more(first) && library.msg_recv(&second, peer.socket, zmq::kDontWait) >= 0;
  Header header{};
  const bool whole = two && library.msg_size(first) == sizeof(header);
  if (whole) std::memcpy(&header, library.msg_data(first), sizeof(header));
  const int file = library.msg_get(first, zmq::kSourceFile);
  library.msg_close(first);
  const std::string text = whole && header.kind < 0
                               ? std::string(static_cast<char *>(library.msg_data(&second)), library.msg_size(&second))
                               : std::string();
  const bool complete = whole && header.length == static_cast<int64_t>(library.msg_size(&second));
  if (!complete || (!peer.greeted && header.kind != kHello)) {
    // Not one of ours.
  } else if (header.kind == kHello) {
    if (!peer.greeted && text == options_.token) {
      peer.greeted = true;
      peer.file = file;
      if (other > options_.rank) send_hello(other);
    }
  } else if (header.kind == kFailure) {
    if (failure_.empty()) failure_ = text;
  } else if (header.kind == kLeaving) {
    peer.left = true;
  } else if (header.kind == kTaken) {
    peer.taken = header.round;
  } else {
    Arrived &arrived = peer.rounds[header.round % peer.rounds.size()];
    if (!arrived.filled) library.msg_init(&arrived.message);
    library.msg_move(&arrived.message, &second);
    arrived.posted = {header.round, header.kind, header.bytes, {header.offset, header.length}};
    arrived.filled = true;
  }
  library.msg_close(&second);
}

void Links::receive_all(int other) {
  for (;;) {
    zmq::Message message;
    zmq_library().msg_init(&message);
    if (zmq_library().msg_recv(&message, peers_[other]->socket, zmq::kDontWait) < 0) break;
    receive_one(other, &message);
  }
}

void Links::watch(int other) {
  const zmq::Library &library = zmq_library();
  Peer &peer = *peers_[other];
  for (;;) {
    zmq::Message event, where;
    library.msg_init(&event);
    if (library.msg_recv(&event, peer.monitor, zmq::kDontWait) < 0) break;
    int32_t file = -1;  // after 16 bits that say which event it is
    std::memcpy(&file, static_cast<char *>(library.msg_data(&event)) + sizeof(uint16_t), sizeof(file));
    library.msg_init(&where);
    if (library.msg_more(&event)) library.msg_recv(&where, peer.monitor, zmq::kDontWait);
    library.msg_close(&event);
    library.msg_close(&where);
    if (!peer.greeted || file != peer.file) continue;
    receive_all(other);  // what came before
    peer.gone = true;
  }
}

void Links::receive(int milliseconds) {
  const std::lock_guard<std::mutex> guard(mutex_);
  receive_now(milliseconds);
}

void Links::receive_now(int milliseconds) {
  std::vector<zmq::PollItem> items;
  std::vector<int> ranks;
  for (int other = 0; other < options_.size; ++other) {
    if (peers_[other] == nullptr || peers_[other]->gone) continue;
    items.push_back({peers_[other]->socket, 0, zmq::kPollIn, 0});
    items.push_back({peers_[other]->monitor, 0, zmq::kPollIn, 0});
    ranks.push_back(other);
  }
  if (zmq_library().poll(items.data(), static_cast<int>(items.size()), milliseconds) <= 0) return;
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (items[2 * i].ready != 0) receive_all(ranks[i]);
    if (items[2 * i + 1].ready != 0) watch(ranks[i]);
  }
}

bool Links::gone(int rank) const {
  const std::lock_guard<std::mutex> guard(mutex_);
  return peers_[rank] != nullptr && peers_[rank]->gone;
}

std::string Links::failure() const {
  const std::lock_guard<std::mutex> guard(mutex_);
  return failure_;
}

std::string Links::lost() {
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock) return "";  // somebody waits, and will see it
  receive_now(0);
  if (!failure_.empty()) return failure_;
  for (int rank = 0; rank < options_.size; ++rank) {
    if (peers_[rank] == nullptr) continue;
    const std::string who = describe(rank) + " of group " + options_.group;
    if (peers_[rank]->left) return who + " has left it";
    if (peers_[rank]->gone) return who + kRankIsGone;
  }
  return "";
}

void Links::tell_failure(const std::string &reason) {
  const std::lock_guard<std::mutex> guard(mutex_);
  if (told_) return;
  told_ = true;
  for (int other = 0; other < options_.size; ++other) {
    if (peers_[other] != nullptr && peers_[other]->greeted && !peers_[other]->gone) send_text(other, kFailure, reason);
  }
}

void Links::tell_leaving() {
  const std::lock_guard<std::mutex> guard(mutex_);
  for (int other = 0; other < options_.size; ++other) {
    if (peers_[other] != nullptr && peers_[other]->greeted && !peers_[other]->gone) send_text(other, kLeaving, "");
  }
}

bool Links::flush(double seconds) {
  const int64_t deadline = monotonic_nanoseconds() + static_cast<int64_t>(seconds * 1e9);
  while (sending_->any() && monotonic_nanoseconds() < deadline) {
    const timespec moment{0, 1000000};
    nanosleep(&moment, nullptr);
  }
  return !sending_->any();
}

}  // namespace vllm_ms
