// Converts the structs of the step machine (server/step) to the messages of
// proto/orlop/v1/peer.proto, for the wire and for the disk, and back.
//   Threads  The functions are pure and safe from any thread.
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

// Returns the detail of an error of the step machine: the ErrorDetail that the error carries, with
// the machine's reason if it has none, and with the shard that the machine named. No other function
// converts step::Reason to the wire.
v1::ErrorDetail DetailOfStep(const absl::Status& status);

// No ToStep returns null. Nothing is checked here but the form: use step::CheckMessage on what a
// peer has sent, CheckRecord and CheckImage on what was stored. A number that no enumerator has
// becomes a value that these refuse.
void ToWire(const step::DecisionRecord& decision, v1::DecisionBody* out);
step::DecisionPtr ToStep(const v1::DecisionBody& decision);

void ToWire(const step::Layout& layout, v1::LayoutBody* out);
std::shared_ptr<const step::Layout> ToStep(const v1::LayoutBody& layout);

// Status: Unimplemented for CatchUp, Forward and their replies, which only a job of several copies
// would send.
absl::StatusOr<v1::StepMessage> ToWire(const step::Message& message);
// Status: InvalidArgument if the body is missing.
absl::StatusOr<step::Message> ToStep(const v1::StepMessage& message);

std::string Serialize(const step::JobRecord& record);
// Status: DataLoss.
absl::StatusOr<step::JobRecord> ParseJobRecord(const std::string& bytes);

// `layout` is the contribution layout of the image's pieces; null: none. The fields has_memory and
// flushes are not stored: the reader fills them in.
std::string Serialize(const step::ParticipantImage& image, const step::Layout* layout);
struct StoredImage {
  step::ParticipantImage image;
  std::shared_ptr<const step::Layout> layout;
};
// Status: DataLoss.
absl::StatusOr<StoredImage> ParseImage(const std::string& bytes);

}  // namespace orlop::server
