// Of links.h: how connections are made.
#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "links.h"
#include "waiting.h"

namespace vllm_ms {
namespace {

constexpr double kHeartbeatSeconds = 1;
constexpr int kNever = 1 << 30;  // milliseconds

int milliseconds(double seconds) { return static_cast<int>(seconds * 1000); }

}  // namespace

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
  send_hello(other);
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

}  // namespace vllm_ms
