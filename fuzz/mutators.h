// Mutators that know the structure of an input, so that most inputs pass the first checks of a
// decoder. Each falls back to libFuzzer's own changes of bytes in a part of the cases.
#pragma once

#include <google/protobuf/message.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "fuzz/target.h"

namespace orlop::fuzz {

// Returns libFuzzer's own change of bytes.
std::string MutateBytes(std::string_view bytes, size_t max_size);

// What MutateMessage puts into an input, besides random values.
struct MessageHints {
  std::vector<std::string> words;  // for fields that are strings
  // Puts right what a change of other fields has made wrong, as a digest; null: nothing.
  std::function<void(google::protobuf::Message*, uint32_t seed)> repair;
};

// Changes fields of a serialized message: sets, clears, adds, removes, copies and swaps values
// anywhere in it.
std::string MutateMessage(const google::protobuf::Message& prototype, const MessageHints& hints,
                          std::string_view bytes, size_t max_size, uint32_t seed);

// Changes a text that is a list of parts, as lines: adds known parts, removes, repeats and swaps
// them, and replaces words by known ones.
struct TextHints {
  char separator = '\n';
  std::vector<std::string> parts, words;
};
std::string MutateText(const TextHints& hints, std::string_view text, size_t max_size,
                       uint32_t seed);

// Changes a record that is mostly 64-bit numbers: sets, inserts, removes and copies numbers.
std::string MutateNumbers(std::string_view bytes, size_t max_size, uint32_t seed);

}  // namespace orlop::fuzz
