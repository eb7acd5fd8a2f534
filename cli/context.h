// What every command of `orlop` gets, and how it ends.
#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cli/print/print.h"
#include "client/client.h"

namespace orlop::cli {

struct Context {
  client::ClientOptions options;
  bool json = false;      // for programs
  bool terminal = false;  // standard output is one: Unicode bars, progress

  absl::StatusOr<std::unique_ptr<client::Client>> Connect() const {
    return client::Client::Connect(options);
  }
};

// Tells a person what failed and what to do next, on standard error; returns kFailed.
int Fail(const Context& context, const absl::Status& status);
// `job`, or the only job of the cluster when empty. FailedPrecondition lists the jobs when there
// are several.
absl::StatusOr<std::string> OnlyJob(client::Client* client, const std::string& job);

}  // namespace orlop::cli
