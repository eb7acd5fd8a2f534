#pragma once

#include <nanobind/nanobind.h>

namespace orlop::python {

void BindKernels(nanobind::module_& module);
void BindClient(nanobind::module_& module);
void BindJobHandle(nanobind::module_& module);

}  // namespace orlop::python
