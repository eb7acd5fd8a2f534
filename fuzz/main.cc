// The entry points of libFuzzer. The environment variable ORLOP_FUZZ names the target. If
// ORLOP_FUZZ_SEEDS is set too, the program writes the target's seeds to that directory and ends.
#include <google/protobuf/stubs/logging.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <ios>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "fuzz/target.h"

namespace orlop::fuzz {
namespace {

struct Named {
  const char* name;
  Target (*make)();
};

constexpr Named kTargets[] = {
    {"chunk", ChunkTarget},           {"requests", RequestsTarget},
    {"status", StatusTarget},         {"step_message", StepMessageTarget},
    {"record", RecordTarget},         {"image", ImageTarget},
    {"definition", DefinitionTarget}, {"scalars", ScalarsTarget},
    {"flush", FlushTarget},           {"config", ConfigTarget},
    {"roles", RolesTarget},           {"safetensors", SafetensorsTarget},
};

Target Choose() {
  const char* const wanted = std::getenv("ORLOP_FUZZ");
  for (const Named& target : kTargets)
    if (wanted != nullptr && std::strcmp(wanted, target.name) == 0) return target.make();
  std::fprintf(stderr, "set ORLOP_FUZZ to one of:");
  for (const Named& target : kTargets) std::fprintf(stderr, " %s", target.name);
  std::fprintf(stderr, "\n");
  std::exit(2);
}

const Target& Chosen() {
  static const auto* const target = new Target(Choose());
  return *target;
}

void WriteSeeds(const std::string& directory) {
  for (const std::string& seed : Chosen().seeds) {
    const std::string name = absl::StrCat(absl::Hex(Checksum64(seed.data(), seed.size())));
    std::ofstream(absl::StrCat(directory, "/", name), std::ios::binary) << seed;
  }
}

}  // namespace

void Require(bool holds, std::string_view property, std::string_view found) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s: %s\n", std::string(property).c_str(),
               std::string(found).c_str());
  std::abort();
}

}  // namespace orlop::fuzz

extern "C" {

int LLVMFuzzerInitialize(int*, char***) {
  google::protobuf::SetLogHandler(nullptr);  // it prints every field that is no UTF-8
  const char* const seeds = std::getenv("ORLOP_FUZZ_SEEDS");
  orlop::fuzz::Chosen();
  if (seeds == nullptr) return 0;
  orlop::fuzz::WriteSeeds(seeds);
  std::exit(0);
}

int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  orlop::fuzz::Chosen().run({bytes, size});
  return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t* bytes, size_t size, size_t max_size, unsigned seed) {
  const std::string changed = orlop::fuzz::Chosen().mutate({bytes, size}, max_size, seed);
  orlop::fuzz::Require(changed.size() <= max_size, "a mutator keeps to the largest size");
  std::copy(changed.begin(), changed.end(), bytes);
  return changed.size();
}

}  // extern "C"
