// orlop._core: client::Client, client::Session (JobHandle here) and the kernels for Python. The
// package orlop is the public face; the contracts are in the C++ headers. Every call that may wait
// releases the GIL.
#include "python/core/module.h"

#include <malloc.h>

#include "python/core/gil.h"
#include "python/core/owned.h"

namespace orlop::python {
namespace {

// Gives the free pages of malloc back to the system. What is in use stays as it is.
void TrimHeap() {
#if defined(__GLIBC__)
  WithoutGil([] { malloc_trim(0); });
#endif
}

}  // namespace
}  // namespace orlop::python

NB_MODULE(_core, module) {
  module.doc() = "The C++ client of Orlop. Private: use the package orlop.";
  orlop::python::BindJobHandle(module);
  orlop::python::BindClient(module);
  orlop::python::BindKernels(module);
  module.def("check_process", &orlop::python::CheckProcess, nanobind::arg("process"));
  module.def("trim_heap", &orlop::python::TrimHeap);
  module.def("set_leak_warnings", &nanobind::set_leak_warnings, nanobind::arg("value"));
}
