// The subcommands of `orlop`. Each prints its result or its error and returns an exit code
// (cli/print/print.h).
#pragma once

#include <cstdint>
#include <string>

#include "cli/context.h"

namespace orlop::cli {

int Servers(const Context& context);
// Prints the bytes of every server by tier, job and slot.
int Status(const Context& context);
int Jobs(const Context& context);
int Tensors(const Context& context, const std::string& job, const std::string& name_contains);
// If `job` is empty, uses the only job of the cluster; prints an error if there are several.
int Describe(const Context& context, const std::string& job, const std::string& tensor);
int Rollback(const Context& context, const std::string& job, int64_t to_step);
int Flush(const Context& context, const std::string& job);
int Delete(const Context& context, const std::string& job);
// Writes all weights and buffers of one version to a safetensors file. `dtype`: "fp32", "bf16", or
// empty for the manifest's.
int Export(const Context& context, const std::string& job, const std::string& path,
           const std::string& dtype);
// Loads weights and buffers from a safetensors file as a LOAD step. The caller becomes the job's
// only contributor.
int Import(const Context& context, const std::string& job, const std::string& path);
// Prints a completion script for bash, zsh or fish.
int Completion(const std::string& shell);

}  // namespace orlop::cli
