#include "links.h"

#include <errno.h>
#include <time.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "waiting.h"

namespace vllm_ms {
namespace {

constexpr int kMostDepth = 16;
constexpr int kHello = -1, kFailure = -2, kLeaving = -3, kTaken = -4;  // kinds of messages beside those of rounds
constexpr double kHeartbeatSeconds = 1;
constexpr int kNever = 1 << 30;  // milliseconds

// What goes before the bytes.
struct Header {
  uint32_t round;
  int32_t kind;
  int64_t bytes, offset, length;
};

int milliseconds(double seconds) { return static_cast<int>(seconds * 1000); }

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

struct Links::Sending {
  std::array<std::atomic<int>, kMostDepth> rounds{};
  std::atomic<int> texts{0};

  bool any() const {
    const auto busy = [](const std::atomic<int> &counter) { return counter.load(std::memory_order_acquire) > 0; };
    return busy(texts) || std::any_of(rounds.begin(), rounds.end(), busy);
  }
};

Links::Links(const LinkOptions &options, const std::string &address, const std::vector<int> &others)
    : options_(options), address_(address), peers_(options.size), sending_(new Sending) {
  require(options_.depth <= kMostDepth, "too many rounds under way");
  for (const int other : others) {
    require(other >= 0 && other < options_.size && other != options_.rank, "no rank " + std::to_string(other));
    peers_[other] = std::make_unique<Peer>();
    peers_[other]->rounds.resize(2 * options_.depth);
    open(other);
  }
}

Links::~Links() {
  for (const auto &peer : peers_) {
    if (peer == nullptr) continue;
    for (Arrived &arrived : peer->rounds) {
      if (arrived.filled) zmq_library().msg_close(&arrived.message);
    }
    zmq_library().socket_monitor(peer->socket, nullptr, 0);
    zmq_library().close(peer->monitor);
    zmq_library().close(peer->socket);
  }
  if (!sending_->any()) delete sending_;
}

void Links::require(bool condition, const std::string &what) const {
  if (!condition) throw std::runtime_error("group " + options_.group + ": " + what);
}

void Links::set(void *socket, int option, int value) const {
  require(zmq_library().setsockopt(socket, option, &value, sizeof(value)) == 0,
          "libzmq has no option " + std::to_string(option));
}

void Links::open(int other) {
  const zmq::Library &library = zmq_library();
  Peer &peer = *peers_[other];
  peer.socket = library.socket(zmq_context(), zmq::kPair);
  peer.monitor = library.socket(zmq_context(), zmq::kPair);
  require(peer.socket != nullptr && peer.monitor != nullptr, library.strerror(library.last_error()));
  set(peer.socket, zmq::kLinger, 0);
  set(peer.socket, zmq::kSendMark, 0);
  set(peer.socket, zmq::kReceiveMark, 0);
  set(peer.socket, zmq::kReconnectInterval, kNever);
  set(peer.socket, zmq::kIPv6, address_.find(':') != std::string::npos);
  set(peer.socket, zmq::kHeartbeatInterval, milliseconds(std::min(kHeartbeatSeconds, options_.silence)));
  set(peer.socket, zmq::kHeartbeatTimeout, milliseconds(options_.silence));
  set(peer.socket, zmq::kHeartbeatTimeToLive, milliseconds(options_.silence));
  set(peer.socket, zmq::kUnacknowledged, milliseconds(options_.silence));
  const std::string events = "inproc://vllm_ms-" + std::to_string(reinterpret_cast<uintptr_t>(&peer));
  set(peer.monitor, zmq::kLinger, 0);
  require(library.socket_monitor(peer.socket, events.c_str(), zmq::kDisconnected) == 0 &&
              library.connect(peer.monitor, events.c_str()) == 0,
          library.strerror(library.last_error()));
  if (other < options_.rank) return;
  const bool six = address_.find(':') != std::string::npos;
  const std::string any_port = "tcp://" + (six ? "[" + address_ + "]" : address_) + ":*";
  require(library.bind(peer.socket, any_port.c_str()) == 0,
          "cannot listen on " + any_port + ": " + library.strerror(library.last_error()) +
              ". Set VLLM_HOST_IP to an address of this host.");
  char text[256] = "";
  size_t size = sizeof(text);
  library.getsockopt(peer.socket, zmq::kLastEndpoint, text, &size);
  peer.endpoint = text;
}

std::string Links::endpoint(int other) const { return peers_[other] == nullptr ? "" : peers_[other]->endpoint; }

void Links::connect(int other, const std::string &process, const std::string &host, const std::string &endpoint) {
  require(other >= 0 && other < options_.size && peers_[other] != nullptr, "no rank on another host");
  Peer &peer = *peers_[other];
  peer.process = process;
  peer.host = host;
  if (other > options_.rank) return;
  peer.endpoint = endpoint;
  const zmq::Library &library = zmq_library();
  require(library.connect(peer.socket, endpoint.c_str()) == 0,
          "cannot connect to " + endpoint + ": " + library.strerror(library.last_error()));
  send_text(other, kHello, options_.token);
}

void Links::greet(double seconds) {
  const int64_t deadline = monotonic_nanoseconds() + static_cast<int64_t>(seconds * 1e9);
  for (int other = 0; other < options_.size; ++other) {
    while (peers_[other] != nullptr && !peers_[other]->greeted) {
      receive(100);
      if (peers_[other]->greeted || monotonic_nanoseconds() < deadline) continue;
      std::ostringstream text;
      text << describe(other) << " has not answered at " << peers_[other]->endpoint << " within " << seconds
           << " s. All ports must be open between the hosts; VLLM_HOST_IP says which address is used.";
      require(false, text.str());
    }
  }
}

std::string Links::describe(int rank) const {
  const Peer &peer = *peers_[rank];
  return "rank " + std::to_string(rank) + " (process " + peer.process + " on host " + peer.host + ")";
}

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
      if (other > options_.rank) send_text(other, kHello, options_.token);
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
