// A fuzz target: one decoder, the property that it must keep for every input, and how its inputs
// are changed. The program orlop_fuzz has all targets; fuzz/main.cc lists them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/types/span.h"

namespace orlop::fuzz {

using Bytes = absl::Span<const uint8_t>;

inline std::string_view AsText(Bytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}
inline Bytes AsBytes(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

struct Target {
  // Decodes an input. It returns for every input, whatever the bytes are.
  std::function<void(Bytes)> run;
  // Returns a changed input of at most `max_size` bytes. The same seed makes the same change.
  std::function<std::string(Bytes, size_t max_size, uint32_t seed)> mutate;
  // The inputs from which the corpus was grown.
  std::vector<std::string> seeds;
};

Target ChunkTarget();        // proto/chunk.h
Target RequestsTarget();     // proto/parse_bound.h, and what handlers decode of each request
Target StatusTarget();       // proto/status.h
Target StepMessageTarget();  // server/job/step_codec.h and server/step/check.h: messages of peers
Target RecordTarget();       // the same: the job record on disk
Target ImageTarget();        // the same: the image of a step machine on disk
Target DefinitionTarget();   // server/job/definition.h
Target ScalarsTarget();      // server/runtime/step_scalars.h
Target FlushTarget();        // server/durability/flush.h
Target ConfigTarget();       // server/config.h
Target RolesTarget();        // server/services/roles.h
Target SafetensorsTarget();  // cli/safetensors.h

// Ends the process, with a message, if a property does not hold.
void Require(bool holds, std::string_view property, std::string_view found = "");

}  // namespace orlop::fuzz
