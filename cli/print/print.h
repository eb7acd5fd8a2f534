// Standard output and exit codes of the commands of `orlop`.
#pragma once

#include <cstdio>
#include <string_view>

namespace orlop::cli {

inline constexpr int kOk = 0, kFailed = 1, kUsage = 2;  // exit codes

// Prints to standard output.
inline void Print(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stdout); }

}  // namespace orlop::cli
