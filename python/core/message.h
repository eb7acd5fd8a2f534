// Protobuf messages as Python dictionaries, by reflection, so that a new field needs no new code
// here.
//
// Fields keep their names. Enums are their names; bytes are bytes; absent fields with presence are
// left out; everything else is there, also when zero. Called with the GIL held.
#pragma once

#include <google/protobuf/message.h>
#include <nanobind/nanobind.h>

namespace orlop::python {

nanobind::dict ToPython(const google::protobuf::Message& message);

// Fills `message` from a dictionary in the same form. Raises TypeError or ValueError naming the
// field.
void FromPython(nanobind::dict fields, google::protobuf::Message* message);

}  // namespace orlop::python
