// The log of the program orlopd, on standard error.
//
// A log that cannot be written stops nothing. If the reader of a pipe or a terminal does not read,
// or a file cannot grow, lines are dropped, and a later line says how many.
//   Threads  spdlog's functions are safe from any thread.
#pragma once

#include <string>

namespace orlop::server {

// Makes spdlog write to standard error from now on, what gRPC says too. `level`: trace, debug,
// info, warning or error. Ignores SIGPIPE and SIGXFSZ, so that the write fails instead of the
// process.
void StartLog(const std::string& level);

// Makes a signal by which the process crashes (SIGSEGV, SIGABRT, ...) say so before it ends it.
void ReportCrashes();

}  // namespace orlop::server
