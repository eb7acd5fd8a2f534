#include "server/step/messages.h"

#include <type_traits>
#include <variant>

namespace orlop::step {

bool ForLeader(const Message& message) {
  return std::visit(
      [](const auto& content) {
        using T = std::decay_t<decltype(content)>;
        return std::is_same_v<T, Register> || std::is_same_v<T, RecoverReport> ||
               std::is_same_v<T, StageReport> || std::is_same_v<T, RestoreReply> ||
               std::is_same_v<T, CatchUpReply> || std::is_same_v<T, OpenReply> ||
               std::is_same_v<T, FlushReply> || std::is_same_v<T, AbsentReply> ||
               std::is_same_v<T, SealReply> || std::is_same_v<T, Prepared> ||
               std::is_same_v<T, Applied> || std::is_same_v<T, Discarded> ||
               std::is_same_v<T, Fenced>;
      },
      message);
}

}  // namespace orlop::step
