// The options that every command of `orlop` gets, and how a command reports an error.
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
  // Print JSON for programs.
  bool json = false;
  // Standard output is a terminal: print Unicode bars and progress.
  bool terminal = false;

  absl::StatusOr<std::unique_ptr<client::Client>> Connect() const {
    return client::Client::Connect(options);
  }
};

// Prints on standard error what failed and what to do next. Returns kFailed.
int Fail(const Context& context, const absl::Status& status);
// Returns `job`, or if it is empty the only job of the cluster. Status: FailedPrecondition, with a
// list of the jobs, if there are several.
absl::StatusOr<std::string> OnlyJob(client::Client* client, const std::string& job);

}  // namespace orlop::cli
