// What a process made that forks. A child inherits the client's objects and gRPC's locks, but not
// the threads that they wait for: it may neither use the objects, nor destroy them, nor make new
// ones. With GRPC_ENABLE_FORK_SUPPORT one child of five still crashed or did not end (gRPC 1.51).
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <memory>
#include <utility>

namespace orlop::python {

// Raises RuntimeError, which names `process` and the way out, if this process is another one.
void CheckProcess(pid_t process);

// An object of the process that makes the Owned. In a forked child, access raises RuntimeError, and
// the destructor leaks the object.
template <typename T>
class Owned {
 public:
  explicit Owned(std::unique_ptr<T> object) : process_(getpid()), object_(std::move(object)) {}
  Owned(Owned&&) noexcept = default;
  ~Owned() {
    if (getpid() != process_) static_cast<void>(object_.release());
  }

  T* operator->() const {
    CheckProcess(process_);
    return object_.get();
  }
  T& operator*() const { return *operator->(); }

 private:
  pid_t process_;
  std::unique_ptr<T> object_;
};

}  // namespace orlop::python
