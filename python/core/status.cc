#include "python/core/status.h"

#include <string>

#include "absl/status/status.h"
#include "proto/status.h"
#include "python/core/message.h"

namespace orlop::python {
namespace nb = nanobind;

void ThrowIfError(const absl::Status& status) {
  if (status.ok()) return;
  const std::string code = absl::StatusCodeToString(status.code());
  const std::string message(status.message());
  nb::object error = nb::module_::import_("orlop.errors")
                         .attr("from_status")(code.c_str(), nb::str(message.data(), message.size()),
                                              ToPython(DetailOf(status)));
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw nb::python_error();
}

}  // namespace orlop::python
