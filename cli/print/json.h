// Output for programs (--json): protobuf messages as JSON, with the field names of the .proto files
// and 64-bit integers as numbers (protobuf's own JSON writes them as strings).
#pragma once

#include <google/protobuf/message.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace orlop::cli {

// Converts all fields except unset optional ones. Enums are names; numbers that are not finite are
// null.
nlohmann::ordered_json ToJson(const google::protobuf::Message& message);

template <typename Message>
nlohmann::ordered_json ToJsonList(const std::vector<Message>& messages) {
  auto list = nlohmann::ordered_json::array();
  for (const Message& message : messages) list.push_back(ToJson(message));
  return list;
}

// Prints one document with an indent of two.
void PrintJson(const nlohmann::ordered_json& json);

}  // namespace orlop::cli
