#include "fuzz/mutators.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* bytes, size_t size, size_t max_size);

namespace orlop::fuzz {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

// One change in so many is libFuzzer's own change of bytes.
constexpr uint32_t kBytesEvery = 6;
constexpr int kMostChanges = 4;
constexpr size_t kMostFieldBytes = 300;

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  // Returns a number from 0 to count - 1; 0 if there is none.
  size_t Below(size_t count) { return count == 0 ? 0 : engine_() % count; }
  bool OneIn(size_t count) { return Below(count) == 0; }
  // Returns a number that decoders tend to get wrong, or a small one, or any.
  uint64_t Number() {
    constexpr uint64_t kEdges[] = {0,
                                   1,
                                   2,
                                   UINT64_MAX,
                                   INT64_MAX,
                                   uint64_t{1} << 63,
                                   INT32_MAX,
                                   uint64_t{1} << 31,
                                   UINT32_MAX,
                                   uint64_t{1} << 62,
                                   uint64_t{1} << 32,
                                   255,
                                   256,
                                   1024};
    if (OneIn(3)) return kEdges[Below(std::size(kEdges))];
    return OneIn(4) ? engine_() >> Below(64) : Below(8);
  }
  double Real() {
    constexpr double kEdges[] = {
        0.0, -0.0, 1.0, -1.0, 1e-3, 0.9, 1e300, std::numeric_limits<double>::infinity(), NAN};
    return OneIn(4) ? std::bit_cast<double>(engine_()) : kEdges[Below(std::size(kEdges))];
  }

 private:
  std::mt19937_64 engine_;
};

// Changes one message, in place.
class MessageMutator {
 public:
  MessageMutator(const MessageHints& hints, uint32_t seed) : hints_(hints), random_(seed) {}

  void Mutate(Message* root) {
    for (size_t changes = 1 + random_.Below(kMostChanges); changes > 0; --changes) {
      std::vector<Message*> messages;
      Collect(root, &messages);
      MutateField(messages[random_.Below(messages.size())]);
    }
  }

 private:
  static void Collect(Message* message, std::vector<Message*>* messages) {
    messages->push_back(message);
    std::vector<const FieldDescriptor*> fields;
    const Reflection* reflection = message->GetReflection();
    reflection->ListFields(*message, &fields);
    for (const FieldDescriptor* field : fields) {
      if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) continue;
      if (!field->is_repeated()) {
        Collect(reflection->MutableMessage(message, field), messages);
        continue;
      }
      for (int i = 0; i < reflection->FieldSize(*message, field); ++i)
        Collect(reflection->MutableRepeatedMessage(message, field, i), messages);
    }
  }

  void MutateField(Message* message) {
    const int count = message->GetDescriptor()->field_count();
    if (count == 0) return;
    const FieldDescriptor* field =
        message->GetDescriptor()->field(static_cast<int>(random_.Below(count)));
    if (field->is_repeated()) {
      MutateList(message, field);
    } else if (random_.OneIn(5)) {
      message->GetReflection()->ClearField(message, field);
    } else {
      Set(message, field);
    }
  }

  void MutateList(Message* message, const FieldDescriptor* field) {
    const Reflection* reflection = message->GetReflection();
    const int size = reflection->FieldSize(*message, field);
    const int at = static_cast<int>(random_.Below(size));
    switch (size == 0 ? 0 : random_.Below(5)) {
      case 0:
        return Add(message, field);
      case 1:
        return reflection->RemoveLast(message, field);
      case 2:
        return reflection->SwapElements(message, field, at, static_cast<int>(random_.Below(size)));
      case 3:  // repeats an entry
        if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) return Add(message, field);
        {
          const std::unique_ptr<Message> copy(
              reflection->GetRepeatedMessage(*message, field, at).New());
          copy->CopyFrom(reflection->GetRepeatedMessage(*message, field, at));
          reflection->AddMessage(message, field)->CopyFrom(*copy);
        }
        return;
      default:
        return SetEntry(message, field, at);
    }
  }

  std::string Text(const std::string& before) {
    if (!hints_.words.empty() && random_.OneIn(2))
      return hints_.words[random_.Below(hints_.words.size())];
    return MutateBytes(std::string_view(before).substr(0, kMostFieldBytes), kMostFieldBytes);
  }

  int Enum(const FieldDescriptor* field) {
    if (random_.OneIn(8)) return static_cast<int>(random_.Number());
    const auto* type = field->enum_type();
    return type->value(static_cast<int>(random_.Below(type->value_count())))->number();
  }

  void Set(Message* message, const FieldDescriptor* field) {
    const Reflection* reflection = message->GetReflection();
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_INT32:
        return reflection->SetInt32(message, field, static_cast<int32_t>(random_.Number()));
      case FieldDescriptor::CPPTYPE_INT64:
        return reflection->SetInt64(message, field, static_cast<int64_t>(random_.Number()));
      case FieldDescriptor::CPPTYPE_UINT32:
        return reflection->SetUInt32(message, field, static_cast<uint32_t>(random_.Number()));
      case FieldDescriptor::CPPTYPE_UINT64:
        return reflection->SetUInt64(message, field, random_.Number());
      case FieldDescriptor::CPPTYPE_DOUBLE:
        return reflection->SetDouble(message, field, random_.Real());
      case FieldDescriptor::CPPTYPE_FLOAT:
        return reflection->SetFloat(message, field, static_cast<float>(random_.Real()));
      case FieldDescriptor::CPPTYPE_BOOL:
        return reflection->SetBool(message, field, random_.OneIn(2));
      case FieldDescriptor::CPPTYPE_ENUM:
        return reflection->SetEnumValue(message, field, Enum(field));
      case FieldDescriptor::CPPTYPE_STRING:
        return reflection->SetString(message, field, Text(reflection->GetString(*message, field)));
      case FieldDescriptor::CPPTYPE_MESSAGE:
        return MutateField(reflection->MutableMessage(message, field));
    }
  }

  void SetEntry(Message* message, const FieldDescriptor* field, int at) {
    const Reflection* reflection = message->GetReflection();
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_INT32:
        return reflection->SetRepeatedInt32(message, field, at,
                                            static_cast<int32_t>(random_.Number()));
      case FieldDescriptor::CPPTYPE_INT64:
        return reflection->SetRepeatedInt64(message, field, at,
                                            static_cast<int64_t>(random_.Number()));
      case FieldDescriptor::CPPTYPE_UINT32:
        return reflection->SetRepeatedUInt32(message, field, at,
                                             static_cast<uint32_t>(random_.Number()));
      case FieldDescriptor::CPPTYPE_UINT64:
        return reflection->SetRepeatedUInt64(message, field, at, random_.Number());
      case FieldDescriptor::CPPTYPE_DOUBLE:
        return reflection->SetRepeatedDouble(message, field, at, random_.Real());
      case FieldDescriptor::CPPTYPE_FLOAT:
        return reflection->SetRepeatedFloat(message, field, at, static_cast<float>(random_.Real()));
      case FieldDescriptor::CPPTYPE_BOOL:
        return reflection->SetRepeatedBool(message, field, at, random_.OneIn(2));
      case FieldDescriptor::CPPTYPE_ENUM:
        return reflection->SetRepeatedEnumValue(message, field, at, Enum(field));
      case FieldDescriptor::CPPTYPE_STRING:
        return reflection->SetRepeatedString(
            message, field, at, Text(reflection->GetRepeatedString(*message, field, at)));
      case FieldDescriptor::CPPTYPE_MESSAGE:
        return MutateField(reflection->MutableRepeatedMessage(message, field, at));
    }
  }

  void Add(Message* message, const FieldDescriptor* field) {
    const Reflection* reflection = message->GetReflection();
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_INT32:
        reflection->AddInt32(message, field, 0);
        break;
      case FieldDescriptor::CPPTYPE_INT64:
        reflection->AddInt64(message, field, 0);
        break;
      case FieldDescriptor::CPPTYPE_UINT32:
        reflection->AddUInt32(message, field, 0);
        break;
      case FieldDescriptor::CPPTYPE_UINT64:
        reflection->AddUInt64(message, field, 0);
        break;
      case FieldDescriptor::CPPTYPE_DOUBLE:
        reflection->AddDouble(message, field, 0);
        break;
      case FieldDescriptor::CPPTYPE_FLOAT:
        reflection->AddFloat(message, field, 0);
        break;
      case FieldDescriptor::CPPTYPE_BOOL:
        reflection->AddBool(message, field, false);
        break;
      case FieldDescriptor::CPPTYPE_ENUM:
        reflection->AddEnumValue(message, field, 0);
        break;
      case FieldDescriptor::CPPTYPE_STRING:
        reflection->AddString(message, field, "");
        break;
      case FieldDescriptor::CPPTYPE_MESSAGE:
        reflection->AddMessage(message, field);
        break;
    }
    SetEntry(message, field, reflection->FieldSize(*message, field) - 1);
  }

  const MessageHints& hints_;
  Random random_;
};

bool IsOfWord(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

// Replaces one word of a text by a known one.
void ReplaceWord(const std::vector<std::string>& words, Random* random, std::string* text) {
  if (text->empty() || words.empty()) return;
  size_t begin = random->Below(text->size());
  while (begin < text->size() && !IsOfWord((*text)[begin])) ++begin;
  size_t end = begin;
  while (begin > 0 && IsOfWord((*text)[begin - 1])) --begin;
  while (end < text->size() && IsOfWord((*text)[end])) ++end;
  text->replace(begin, end - begin, words[random->Below(words.size())]);
}

void MutateParts(const TextHints& hints, Random* random, std::vector<std::string>* parts) {
  const size_t at = random->Below(parts->size());
  const std::string known =
      hints.parts.empty() ? "" : hints.parts[random->Below(hints.parts.size())];
  switch (random->Below(6)) {
    case 0:
      parts->insert(parts->begin() + static_cast<ptrdiff_t>(at), known);
      break;
    case 1:
      parts->push_back(known);
      break;
    case 2:
      parts->erase(parts->begin() + static_cast<ptrdiff_t>(at));
      break;
    case 3: {
      const std::string copy = (*parts)[at];
      parts->push_back(copy);
      break;
    }
    case 4:
      std::swap((*parts)[at], (*parts)[random->Below(parts->size())]);
      break;
    default:
      ReplaceWord(hints.words, random, &(*parts)[at]);
  }
}

}  // namespace

std::string MutateBytes(std::string_view bytes, size_t max_size) {
  std::string changed(bytes.substr(0, max_size));
  const size_t size = changed.size();
  changed.resize(max_size);
  changed.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(changed.data()), size, max_size));
  return changed;
}

std::string MutateMessage(const google::protobuf::Message& prototype, const MessageHints& hints,
                          std::string_view bytes, size_t max_size, uint32_t seed) {
  if (seed % kBytesEvery == 0) return MutateBytes(bytes, max_size);
  const std::unique_ptr<Message> message(prototype.New());
  if (!message->ParsePartialFromArray(bytes.data(), static_cast<int>(bytes.size())))
    message->Clear();
  MessageMutator(hints, seed).Mutate(message.get());
  if (hints.repair) hints.repair(message.get(), seed);
  std::string changed = message->SerializePartialAsString();
  return changed.size() <= max_size ? changed : MutateBytes(bytes, max_size);
}

std::string MutateText(const TextHints& hints, std::string_view text, size_t max_size,
                       uint32_t seed) {
  if (seed % kBytesEvery == 0) return MutateBytes(text, max_size);
  Random random(seed);
  std::vector<std::string> parts = absl::StrSplit(std::string(text), hints.separator);
  for (size_t changes = 1 + random.Below(kMostChanges); changes > 0 && !parts.empty(); --changes)
    MutateParts(hints, &random, &parts);
  std::string changed = absl::StrJoin(parts, std::string(1, hints.separator));
  return changed.size() <= max_size ? changed : MutateBytes(text, max_size);
}

std::string MutateNumbers(std::string_view bytes, size_t max_size, uint32_t seed) {
  if (seed % kBytesEvery == 0) return MutateBytes(bytes, max_size);
  Random random(seed);
  std::string changed(bytes);
  for (size_t changes = 1 + random.Below(kMostChanges); changes > 0; --changes) {
    const uint64_t number = random.Number();
    const std::string word(reinterpret_cast<const char*>(&number), sizeof(number));
    // Strings in a record may shift the numbers behind them, so any byte may be a number's first.
    const size_t at = random.OneIn(3) ? random.Below(changed.size())
                                      : random.Below(changed.size() / sizeof(number)) * 8;
    switch (random.Below(5)) {
      case 0:
        changed.insert(at, word);
        break;
      case 1:
        changed.erase(at, sizeof(number));
        break;
      case 2:
        changed.insert(random.Below(changed.size()) / 8 * 8, changed.substr(at, 8));
        break;
      default:
        changed.replace(at, std::min(sizeof(number), changed.size() - at), word);
    }
  }
  return changed.size() <= max_size ? changed : MutateBytes(bytes, max_size);
}

}  // namespace orlop::fuzz
