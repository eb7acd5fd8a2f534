#include "python/core/message.h"

#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>

namespace orlop::python {
namespace nb = nanobind;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

namespace {

constexpr int kSingle = -1;  // not an element of a repeated field

#define ORLOP_READ(Type)                                   \
  (index == kSingle ? reflection.Get##Type(message, field) \
                    : reflection.GetRepeated##Type(message, field, index))

nb::object ReadValue(const Message& message, const Reflection& reflection,
                     const FieldDescriptor* field, int index) {
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return nb::int_(ORLOP_READ(Int32));
    case FieldDescriptor::CPPTYPE_INT64:
      return nb::int_(ORLOP_READ(Int64));
    case FieldDescriptor::CPPTYPE_UINT32:
      return nb::int_(ORLOP_READ(UInt32));
    case FieldDescriptor::CPPTYPE_UINT64:
      return nb::int_(ORLOP_READ(UInt64));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return nb::float_(ORLOP_READ(Double));
    case FieldDescriptor::CPPTYPE_FLOAT:
      return nb::float_(ORLOP_READ(Float));
    case FieldDescriptor::CPPTYPE_BOOL:
      return nb::bool_(ORLOP_READ(Bool));
    case FieldDescriptor::CPPTYPE_ENUM:
      return nb::str(ORLOP_READ(Enum)->name().c_str());
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return ToPython(ORLOP_READ(Message));
    case FieldDescriptor::CPPTYPE_STRING: {
      const std::string text = ORLOP_READ(String);
      if (field->type() == FieldDescriptor::TYPE_BYTES) return nb::bytes(text.data(), text.size());
      return nb::str(text.data(), text.size());
    }
  }
  return nb::none();
}
#undef ORLOP_READ

nb::object ReadMap(const Message& message, const Reflection& reflection,
                   const FieldDescriptor* field) {
  nb::dict entries;
  for (int i = 0; i < reflection.FieldSize(message, field); ++i) {
    nb::dict entry = ToPython(reflection.GetRepeatedMessage(message, field, i));
    entries[entry["key"]] = entry["value"];
  }
  return entries;
}

nb::object ReadField(const Message& message, const Reflection& reflection,
                     const FieldDescriptor* field) {
  if (field->is_map()) return ReadMap(message, reflection, field);
  if (!field->is_repeated()) return ReadValue(message, reflection, field, kSingle);
  nb::list values;
  for (int i = 0; i < reflection.FieldSize(message, field); ++i)
    values.append(ReadValue(message, reflection, field, i));
  return values;
}

#define ORLOP_WRITE(Type, value)                                      \
  (field->is_repeated() ? reflection.Add##Type(message, field, value) \
                        : reflection.Set##Type(message, field, value))

void WriteEnum(nb::handle value, Message* message, const Reflection& reflection,
               const FieldDescriptor* field) {
  const auto name = nb::cast<std::string>(value);
  const auto* number = field->enum_type()->FindValueByName(name);
  if (number == nullptr) throw nb::value_error((field->name() + " has no value " + name).c_str());
  ORLOP_WRITE(Enum, number);
}

void WriteValue(nb::handle value, Message* message, const Reflection& reflection,
                const FieldDescriptor* field) {
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      ORLOP_WRITE(Int32, nb::cast<int32_t>(value));
      break;
    case FieldDescriptor::CPPTYPE_INT64:
      ORLOP_WRITE(Int64, nb::cast<int64_t>(value));
      break;
    case FieldDescriptor::CPPTYPE_UINT32:
      ORLOP_WRITE(UInt32, nb::cast<uint32_t>(value));
      break;
    case FieldDescriptor::CPPTYPE_UINT64:
      ORLOP_WRITE(UInt64, nb::cast<uint64_t>(value));
      break;
    case FieldDescriptor::CPPTYPE_DOUBLE:
      ORLOP_WRITE(Double, nb::cast<double>(value));
      break;
    case FieldDescriptor::CPPTYPE_FLOAT:
      ORLOP_WRITE(Float, nb::cast<float>(value));
      break;
    case FieldDescriptor::CPPTYPE_BOOL:
      ORLOP_WRITE(Bool, nb::cast<bool>(value));
      break;
    case FieldDescriptor::CPPTYPE_ENUM:
      WriteEnum(value, message, reflection, field);
      break;
    case FieldDescriptor::CPPTYPE_STRING:
      ORLOP_WRITE(String, nb::cast<std::string>(value));
      break;
    case FieldDescriptor::CPPTYPE_MESSAGE:
      FromPython(nb::cast<nb::dict>(value), field->is_repeated()
                                                ? reflection.AddMessage(message, field)
                                                : reflection.MutableMessage(message, field));
  }
}
#undef ORLOP_WRITE

void WriteField(nb::handle value, Message* message, const Reflection& reflection,
                const FieldDescriptor* field) {
  if (!field->is_repeated()) return WriteValue(value, message, reflection, field);
  if (!field->is_map()) {
    for (nb::handle element : value) WriteValue(element, message, reflection, field);
    return;
  }
  for (auto [key, entry_value] : nb::cast<nb::dict>(value)) {
    nb::dict entry;
    entry["key"] = key;
    entry["value"] = entry_value;
    FromPython(entry, reflection.AddMessage(message, field));
  }
}

}  // namespace

nb::dict ToPython(const Message& message) {
  nb::dict fields;
  const auto* descriptor = message.GetDescriptor();
  const auto* reflection = message.GetReflection();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const auto* field = descriptor->field(i);
    if (field->has_presence() && !reflection->HasField(message, field)) continue;
    fields[field->name().c_str()] = ReadField(message, *reflection, field);
  }
  return fields;
}

void FromPython(nb::dict fields, Message* message) {
  const auto* descriptor = message->GetDescriptor();
  for (auto [key, value] : fields) {
    const auto name = nb::cast<std::string>(key);
    const auto* field = descriptor->FindFieldByName(name);
    if (field == nullptr)
      throw nb::value_error((descriptor->full_name() + " has no field " + name).c_str());
    try {
      WriteField(value, message, *message->GetReflection(), field);
    } catch (const nb::cast_error&) {
      throw nb::type_error(
          (descriptor->full_name() + "." + name + " cannot be " + nb::repr(value).c_str()).c_str());
    }
  }
}

}  // namespace orlop::python
