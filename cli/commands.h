// The subcommands of `orlop`. Each returns an exit code (cli/context.h), having printed its result
// or what failed.
#pragma once

#include <cstdint>
#include <string>

#include "cli/context.h"

namespace orlop::cli {

int Servers(const Context& context);
int Status(const Context& context);  // bytes by tier, job and slot of every server
int Jobs(const Context& context);
int Tensors(const Context& context, const std::string& job, const std::string& name_contains);
int Describe(const Context& context, const std::string& job,
             const std::string& tensor);  // job empty: the only one
int Rollback(const Context& context, const std::string& job, int64_t to_step);
int Delete(const Context& context, const std::string& job);
// Writes all weights and buffers of one version. dtype: "fp32", "bf16" or empty (the manifest's).
int Export(const Context& context, const std::string& job, const std::string& path,
           const std::string& dtype);
// Loads weights and buffers from a safetensors file as a LOAD step; the caller becomes the job's
// only contributor.
int Import(const Context& context, const std::string& job, const std::string& path);
int Completion(const std::string& shell);  // prints a script for bash, zsh or fish

}  // namespace orlop::cli
