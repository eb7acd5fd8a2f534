#include "cli/print/json.h"

#include <google/protobuf/descriptor.h>

#include <string>
#include <utility>

#include "cli/print/print.h"

namespace orlop::cli {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using nlohmann::ordered_json;

// Converts one value: element `index` of a repeated field, or the field itself if `index` is
// negative.
ordered_json Value(const Message& message, const FieldDescriptor* field, int index) {
  const google::protobuf::Reflection* reflection = message.GetReflection();
  const auto get = [&](auto single, auto repeated) {
    return index < 0 ? (reflection->*single)(message, field)
                     : (reflection->*repeated)(message, field, index);
  };
  using R = google::protobuf::Reflection;
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      return get(&R::GetBool, &R::GetRepeatedBool);
    case FieldDescriptor::CPPTYPE_INT32:
      return get(&R::GetInt32, &R::GetRepeatedInt32);
    case FieldDescriptor::CPPTYPE_INT64:
      return get(&R::GetInt64, &R::GetRepeatedInt64);
    case FieldDescriptor::CPPTYPE_UINT32:
      return get(&R::GetUInt32, &R::GetRepeatedUInt32);
    case FieldDescriptor::CPPTYPE_UINT64:
      return get(&R::GetUInt64, &R::GetRepeatedUInt64);
    case FieldDescriptor::CPPTYPE_FLOAT:
      return get(&R::GetFloat, &R::GetRepeatedFloat);
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return get(&R::GetDouble, &R::GetRepeatedDouble);
    case FieldDescriptor::CPPTYPE_STRING:
      return get(&R::GetString, &R::GetRepeatedString);
    case FieldDescriptor::CPPTYPE_ENUM:
      return get(&R::GetEnum, &R::GetRepeatedEnum)->name();
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return ToJson(index < 0 ? reflection->GetMessage(message, field)
                              : reflection->GetRepeatedMessage(message, field, index));
  }
  return nullptr;
}

ordered_json Repeated(const Message& message, const FieldDescriptor* field) {
  const int count = message.GetReflection()->FieldSize(message, field);
  ordered_json json = field->is_map() ? ordered_json::object() : ordered_json::array();
  for (int i = 0; i < count; ++i) {
    ordered_json value = Value(message, field, i);
    if (field->is_map())
      json[value["key"].get<std::string>()] = value["value"];
    else
      json.push_back(std::move(value));
  }
  return json;
}

}  // namespace

ordered_json ToJson(const Message& message) {
  ordered_json json = ordered_json::object();
  const auto* descriptor = message.GetDescriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    if (field->is_repeated())
      json[field->name()] = Repeated(message, field);
    else if (!field->has_presence() || message.GetReflection()->HasField(message, field))
      json[field->name()] = Value(message, field, -1);
  }
  return json;
}

void PrintJson(const ordered_json& json) {
  Print(json.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n");
}

}  // namespace orlop::cli
