// libzmq, which carries messages between hosts: its C interface, found in an installed library when it is needed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vllm_ms {

// The part of zmq.h that links.cc uses; https://libzmq.readthedocs.io/en/latest/ describes it.
namespace zmq {

struct alignas(void *) Message {
  unsigned char opaque[64];
};

struct PollItem {
  void *socket;
  int file;
  int16_t wanted, ready;
};

constexpr int kPair = 0;
constexpr int kDontWait = 1, kMore = 2;
constexpr int16_t kPollIn = 1;
constexpr int kSourceFile = 2;  // a property of messages
constexpr int kDisconnected = 0x200;
// Options of contexts, and of sockets.
constexpr int kZeroCopyReceive = 10;
constexpr int kLinger = 17, kReconnectInterval = 18, kSendMark = 23, kReceiveMark = 24, kLastEndpoint = 32, kIPv6 = 42;
constexpr int kHeartbeatInterval = 75, kHeartbeatTimeToLive = 76, kHeartbeatTimeout = 77;
constexpr int kUnacknowledged = 80;  // TCP_MAXRT: milliseconds for which sent data may stay unacknowledged

using Free = void(void *data, void *hint);

struct Library {
  void *(*ctx_new)();
  int (*ctx_set)(void *, int, int);
  void *(*socket)(void *, int);
  int (*close)(void *);
  int (*setsockopt)(void *, int, const void *, size_t);
  int (*getsockopt)(void *, int, void *, size_t *);
  int (*bind)(void *, const char *);
  int (*connect)(void *, const char *);
  int (*socket_monitor)(void *, const char *, int);
  int (*poll)(PollItem *, int, long);
  int (*msg_init)(Message *);
  int (*msg_init_size)(Message *, size_t);
  int (*msg_init_data)(Message *, void *, size_t, Free *, void *);
  int (*msg_send)(Message *, void *, int);
  int (*msg_recv)(Message *, void *, int);
  int (*msg_move)(Message *, Message *);
  int (*msg_close)(Message *);
  void *(*msg_data)(Message *);
  size_t (*msg_size)(const Message *);
  int (*msg_more)(const Message *);
  int (*msg_get)(const Message *, int);
  int (*last_error)();
  const char *(*strerror)(int);
};

}  // namespace zmq

// Finds it through the shared object `path`, which is linked with it. Throws std::runtime_error where it is not there.
void load_zmq(const char *path);

// What load_zmq has found, and the context of this process, whose thread sends and receives.
const zmq::Library &zmq_library();
void *zmq_context();

}  // namespace vllm_ms
