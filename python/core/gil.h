// The global interpreter lock of Python (GIL), released around calls that may wait.
#pragma once

#include <nanobind/nanobind.h>

#include <utility>

namespace orlop::python {

// Releases the GIL for the life of this object. Created with the GIL held.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  // Takes the GIL back. In a thread that Python has outlived this never returns.
  ~ReleasedGil();
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state_;
};

// Runs a call of the client without the GIL.
template <typename Call>
auto WithoutGil(Call&& call) {
  ReleasedGil released;
  return std::forward<Call>(call)();
}

}  // namespace orlop::python
