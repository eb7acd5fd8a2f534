#include "proto/parse_bound.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"

namespace orlop {
namespace {

using google::protobuf::FieldDescriptor;

// A list doubles its capacity, and the array before lives while its entries are moved.
constexpr uint64_t kListGrowth = 3;
constexpr uint64_t kMapNodeBytes = 64;
// An entry of the set of unknown fields, with the same growth.
constexpr uint64_t kUnknownBytes = kListGrowth * 16 + 64;
// The allocator's header and rounding.
constexpr uint64_t kAllocationBytes = 16;

// Takes bytes from the front of a message.
class Scanner {
 public:
  explicit Scanner(absl::Span<const uint8_t> bytes) : at_(bytes.begin()), end_(bytes.end()) {}

  bool done() const { return at_ == end_; }
  bool Varint(uint64_t* value) {
    *value = 0;
    for (int shift = 0; shift < 70 && at_ != end_; shift += 7) {
      const uint8_t byte = *at_++;
      *value |= static_cast<uint64_t>(byte & 0x7f) << (shift < 64 ? shift : 63);
      if (byte < 0x80) return true;
    }
    return false;
  }
  bool Skip(uint64_t count) {
    if (count > static_cast<uint64_t>(end_ - at_)) return false;
    at_ += count;
    return true;
  }
  bool Take(absl::Span<const uint8_t>* taken) {
    uint64_t count = 0;
    if (!Varint(&count) || count > static_cast<uint64_t>(end_ - at_)) return false;
    *taken = {at_, static_cast<size_t>(count)};
    at_ += count;
    return true;
  }

 private:
  const uint8_t* at_;
  const uint8_t* end_;
};

uint64_t CountVarints(absl::Span<const uint8_t> bytes) {
  uint64_t count = 0;
  for (const uint8_t byte : bytes) count += byte < 0x80;
  return count;
}

absl::Status NoProtobuf(const google::protobuf::Descriptor* type) {
  return absl::InvalidArgumentError(absl::StrCat("the bytes are no ", type->name()));
}

uint64_t StringBytes(uint64_t length) {
  return sizeof(std::string) + kAllocationBytes + (length > 15 ? length + kAllocationBytes : 0);
}

}  // namespace

// What the pass over a message has to know of its type.
struct ParseBound::Type {
  struct Field {
    enum class Kind : uint8_t { kUnknown, kScalar, kString, kMessage } kind = Kind::kUnknown;
    bool is_list = false;
    uint8_t scalar_bytes = 0;  // in memory
    uint8_t fixed_bytes = 0;   // on the wire; 0: a varint
    uint64_t node_bytes = 0;   // of a map
    const Type* type = nullptr;
  };
  const google::protobuf::Descriptor* descriptor = nullptr;
  uint64_t object_bytes = 0;
  std::vector<Field> fields;  // by number

  absl::Status Add(absl::Span<const uint8_t> bytes, int depth, uint64_t* sum) const;
  absl::Status AddBytes(const Field& field, absl::Span<const uint8_t> bytes, int depth,
                        uint64_t* sum) const;
};

absl::Status ParseBound::Type::AddBytes(const Field& field, absl::Span<const uint8_t> bytes,
                                        int depth, uint64_t* sum) const {
  if (field.is_list) *sum += kListGrowth * sizeof(void*);
  switch (field.kind) {
    case Field::Kind::kUnknown:
      *sum += kUnknownBytes + StringBytes(bytes.size());
      return absl::OkStatus();
    case Field::Kind::kString:
      *sum += StringBytes(bytes.size());
      return absl::OkStatus();
    case Field::Kind::kScalar: {
      if (!field.is_list) *sum += kUnknownBytes + StringBytes(bytes.size());
      const uint64_t count =
          field.fixed_bytes > 0 ? bytes.size() / field.fixed_bytes : CountVarints(bytes);
      *sum += count * kListGrowth * field.scalar_bytes;
      return absl::OkStatus();
    }
    case Field::Kind::kMessage:
      *sum += field.node_bytes;
      return field.type->Add(bytes, depth + 1, sum);
  }
  return absl::OkStatus();
}

absl::Status ParseBound::Type::Add(absl::Span<const uint8_t> bytes, int depth,
                                   uint64_t* sum) const {
  if (depth > kMaxParseDepth)
    return absl::InvalidArgumentError(
        absl::StrCat("a ", descriptor->name(), " nests deeper than ", kMaxParseDepth));
  *sum += object_bytes + kAllocationBytes;
  static const auto* unknown = new Field();
  for (Scanner scanner(bytes); !scanner.done();) {
    uint64_t tag = 0;
    if (!scanner.Varint(&tag) || tag >> 3 == 0) return NoProtobuf(descriptor);
    const uint64_t number = tag >> 3;
    const Field& field = number < fields.size() ? fields[number] : *unknown;
    uint64_t value = 0;
    bool is_whole = false;
    uint8_t fixed_bytes = 0;
    switch (tag & 7) {
      case 0:
        is_whole = scanner.Varint(&value);
        break;
      case 1:
        fixed_bytes = 8;
        is_whole = scanner.Skip(8);
        break;
      case 5:
        fixed_bytes = 4;
        is_whole = scanner.Skip(4);
        break;
      case 2: {
        absl::Span<const uint8_t> content;
        if (!scanner.Take(&content)) return NoProtobuf(descriptor);
        if (absl::Status status = AddBytes(field, content, depth, sum); !status.ok()) return status;
        continue;
      }
      default:  // groups: proto3 has none
        break;
    }
    if (!is_whole) return NoProtobuf(descriptor);
    if (field.kind != Field::Kind::kScalar || field.fixed_bytes != fixed_bytes) {
      *sum += kUnknownBytes;  // no such field, or one of another wire type
    } else if (field.is_list) {
      *sum += kListGrowth * field.scalar_bytes;
    }
  }
  return absl::OkStatus();
}

ParseBound::ParseBound(const google::protobuf::Message& prototype) : root_(Add(prototype)) {}
ParseBound::~ParseBound() = default;
ParseBound::ParseBound(ParseBound&&) noexcept = default;

const ParseBound::Type* ParseBound::Add(const google::protobuf::Message& prototype) {
  const google::protobuf::Descriptor* descriptor = prototype.GetDescriptor();
  std::unique_ptr<Type>& type = types_[descriptor];
  if (type != nullptr) return type.get();
  type = std::make_unique<Type>();
  Type* made = type.get();
  made->descriptor = descriptor;
  made->object_bytes = prototype.SpaceUsedLong();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    Type::Field entry;
    entry.is_list = field->is_repeated();
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_STRING:
        entry.kind = Type::Field::Kind::kString;
        break;
      case FieldDescriptor::CPPTYPE_MESSAGE:
        entry.kind = Type::Field::Kind::kMessage;
        entry.node_bytes = field->is_map() ? kMapNodeBytes : 0;
        entry.type = Add(*google::protobuf::MessageFactory::generated_factory()->GetPrototype(
            field->message_type()));
        break;
      default:
        entry.kind = Type::Field::Kind::kScalar;
        entry.scalar_bytes = 8;
    }
    switch (field->type()) {
      case FieldDescriptor::TYPE_FIXED32:
      case FieldDescriptor::TYPE_SFIXED32:
      case FieldDescriptor::TYPE_FLOAT:
        entry.fixed_bytes = 4;
        break;
      case FieldDescriptor::TYPE_FIXED64:
      case FieldDescriptor::TYPE_SFIXED64:
      case FieldDescriptor::TYPE_DOUBLE:
        entry.fixed_bytes = 8;
        break;
      default:
        break;
    }
    const auto number = static_cast<size_t>(field->number());
    if (made->fields.size() <= number) made->fields.resize(number + 1);
    made->fields[number] = entry;
  }
  return made;
}

absl::StatusOr<uint64_t> ParseBound::Of(absl::Span<const uint8_t> bytes) const {
  uint64_t sum = 0;
  if (absl::Status status = root_->Add(bytes, 0, &sum); !status.ok()) return status;
  return sum;
}

}  // namespace orlop
