// Checks of what another server has sent, and of what a disk gave back, before a machine uses it:
// every number that a machine indexes or computes with, every list whose length it relies on, and
// the identity of every decision.
//   Threads  The functions are pure and safe from any thread.
//   Cost     O(size of what is checked)
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/participant.h"

namespace orlop::step {

// The largest epoch, generation, step and attempt: one more never overflows.
inline constexpr int64_t kMaxCounter = int64_t{1} << 62;
// A message may be so many epochs ahead. Each recovery raises the epoch by one, and a server that
// has lost its disk begins at zero.
inline constexpr int64_t kMaxEpochRise = int64_t{1} << 32;

// Checks a message from server `from` to server `self`. `epoch` is the highest that this server
// knows of the job.
//   Status  InvalidArgument, naming the sender, the kind of message, the field, its value and the
//           limit.
absl::Status CheckMessage(const JobSpec& spec, ServerId self, ServerId from, int64_t epoch,
                          const Message& message);

// Status: InvalidArgument, naming the field, its value and the limit.
absl::Status CheckDecision(const JobSpec& spec, const DecisionRecord& decision);
// Checks that every box lies in a tensor of the job, so that ExpectedPieces can use it. Whether the
// boxes cover the tensors is ValidateLayout's question.
//   Status  InvalidArgument, naming the rank, the tensor, the value and the limit.
absl::Status CheckBoxes(const JobSpec& spec, const Layout& layout);

// Check what a server has read from its disk.
//   Status  DataLoss, naming the field, its value and the limit.
absl::Status CheckRecord(const JobSpec& spec, const JobRecord& record);
absl::Status CheckImage(const JobSpec& spec, ServerId self, const ParticipantImage& image);

}  // namespace orlop::step
