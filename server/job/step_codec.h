// The step machine's plain structs on the wire and on disk (proto/orlop/v1/peer.proto), and back.
// Pure; any thread.
#pragma once

#include "absl/status/statusor.h"
#include "base/checksum.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/convert.h"
#include "server/step/messages.h"
#include "server/step/participant.h"

namespace orlop::server {

inline Digest128 ToStep(const v1::Digest& digest) { return FromWire(digest); }

// The detail of an error of the machines: the detail that the shell gave it, if any, completed with
// the machine's reason and shard. The only map from step::Reason to the wire.
v1::ErrorDetail DetailOfStep(const absl::Status& status);

void ToWire(const step::DecisionRecord& decision, v1::DecisionBody* out);
step::DecisionPtr ToStep(const v1::DecisionBody& decision);

void ToWire(const step::Layout& layout, v1::LayoutBody* out);
std::shared_ptr<const step::Layout> ToStep(const v1::LayoutBody& layout);

// A message of the peer plane. Unimplemented for CatchUp and Forward, which no job of one copy
// sends.
absl::StatusOr<v1::StepMessage> ToWire(const step::Message& message);
// InvalidArgument if the body is missing or its lists disagree.
absl::StatusOr<step::Message> ToStep(const v1::StepMessage& message);

std::string Serialize(const step::JobRecord& record);
absl::StatusOr<step::JobRecord> ParseJobRecord(const std::string& bytes);  // DataLoss

// `layout` is the one that the image's pieces belong to; null: none.
std::string Serialize(const step::ParticipantImage& image, const step::Layout* layout);
struct StoredImage {
  step::ParticipantImage image;
  std::shared_ptr<const step::Layout> layout;
};
absl::StatusOr<StoredImage> ParseImage(const std::string& bytes);  // DataLoss

}  // namespace orlop::server
