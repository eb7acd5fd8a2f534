#include "python/core/gil.h"

#include <cxxabi.h>  // IWYU pragma: keep (__forced_unwind)
#include <unistd.h>

namespace orlop::python {

// A daemon thread may return from a call after Python has begun to end. Before version 3.14, Python
// then ends the thread with pthread_exit, which unwinds its stack; a frame on that stack that is
// noexcept (this destructor, nanobind's dispatcher) would abort the process. So the unwinding stops
// here and the thread sleeps until the process ends, as Python does itself from version 3.14 on.
// Python holds no lock at that point.
ReleasedGil::~ReleasedGil() {
  try {
    PyEval_RestoreThread(state_);
  } catch (const abi::__forced_unwind&) {
    while (true) pause();
  }
}

}  // namespace orlop::python
