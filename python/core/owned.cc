#include "python/core/owned.h"

#include <sys/types.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

namespace orlop::python {

void CheckProcess(pid_t process) {
  if (getpid() == process) return;
  throw std::runtime_error(
      "the session belongs to process " + std::to_string(process) + ", and gRPC does not work in " +
      std::to_string(getpid()) +
      ", which was forked from it: start a process anew (multiprocessing's \"spawn\", subprocess), "
      "and there call orlop.connect(session.address, job=\"its own\")");
}

}  // namespace orlop::python
