// This header formats output for programs (--json). Protobuf messages become JSON with the field
// names of the .proto files. 64-bit integers are numbers, where protobuf's own JSON writes strings.
#pragma once

#include <google/protobuf/message.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace orlop::cli {

// Returns one message as a JSON object. Fields are in the order of the .proto file. A field that is
// absent (an unset `optional` field, message or member of a oneof) is left out. Every other field
// is there, even at its default. An enum is its name, a map is an object, and a map must have
// string keys. A number that is not finite is printed as null.
nlohmann::ordered_json ToJson(const google::protobuf::Message& message);

// Returns an array of the messages.
template <typename Message>
nlohmann::ordered_json ToJsonList(const std::vector<Message>& messages) {
  auto list = nlohmann::ordered_json::array();
  for (const Message& message : messages) list.push_back(ToJson(message));
  return list;
}

// Prints one document to the standard output, with an indent of two and a newline at the end. Bytes
// that are not UTF-8 are replaced.
void PrintJson(const nlohmann::ordered_json& json);

}  // namespace orlop::cli
