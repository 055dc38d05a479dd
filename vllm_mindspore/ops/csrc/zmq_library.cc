#include "zmq_library.h"

#include <dlfcn.h>

#include <mutex>
#include <stdexcept>
#include <string>

namespace vllm_ms {
namespace {

zmq::Library library;
void *context = nullptr;
std::mutex mutex;

template <class Function>
void find(void *handle, const char *name, Function *&function) {
  void *found = dlsym(handle, name);
  if (found == nullptr) throw std::runtime_error(std::string("libzmq has no ") + name + ": install pyzmq's wheel");
  function = reinterpret_cast<Function *>(found);
}

}  // namespace

void load_zmq(const char *path) {
  const std::lock_guard<std::mutex> guard(mutex);
  if (context != nullptr) return;
  void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(std::string("libzmq: ") + dlerror());
  find(handle, "zmq_ctx_new", library.ctx_new);
  find(handle, "zmq_ctx_set", library.ctx_set);
  find(handle, "zmq_socket", library.socket);
  find(handle, "zmq_close", library.close);
  find(handle, "zmq_setsockopt", library.setsockopt);
  find(handle, "zmq_getsockopt", library.getsockopt);
  find(handle, "zmq_bind", library.bind);
  find(handle, "zmq_connect", library.connect);
  find(handle, "zmq_socket_monitor", library.socket_monitor);
  find(handle, "zmq_poll", library.poll);
  find(handle, "zmq_msg_init", library.msg_init);
  find(handle, "zmq_msg_init_size", library.msg_init_size);
  find(handle, "zmq_msg_init_data", library.msg_init_data);
  find(handle, "zmq_msg_send", library.msg_send);
  find(handle, "zmq_msg_recv", library.msg_recv);
  find(handle, "zmq_msg_move", library.msg_move);
  find(handle, "zmq_msg_close", library.msg_close);
  find(handle, "zmq_msg_data", library.msg_data);
  find(handle, "zmq_msg_size", library.msg_size);
  find(handle, "zmq_msg_more", library.msg_more);
  find(handle, "zmq_msg_get", library.msg_get);
  find(handle, "zmq_errno", library.last_error);
  find(handle, "zmq_strerror", library.strerror);
  context = library.ctx_new();
  library.ctx_set(context, zmq::kZeroCopyReceive, 0);  // small messages too are aligned as values need it
}

const zmq::Library &zmq_library() { return library; }
void *zmq_context() { return context; }

}  // namespace vllm_ms
