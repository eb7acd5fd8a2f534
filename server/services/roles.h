// Who may do what: the roles, the rule of each RPC, and the identities of callers.
//
// A caller's identity comes from its connection, never from a field of a request. A file says which
// names have which roles, and for which jobs; a name that no entry has may do nothing.
//
//   [[grant]]
//   name = "trainer.team-a"   # a DNS name, URI or address among the subject alternative names of
//                             # the certificate; without TLS a user of this host, "user:alice" or
//                             # "user:1001"; "*": every certificate of the authority, every user
//   roles = ["worker", "saver"]
//   jobs = ["team-a/*"]       # names, or beginnings of names with * at their end; all if absent
//
//   [[revoked]]               # a certificate with this name may do nothing, whatever is granted
//   name = "trainer.team-b"
//
//   Threads  Values and functions are safe from any thread.
#pragma once

#include <grpcpp/security/auth_context.h>

#include <cstdint>
#include <initializer_list>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace orlop::server {

enum class Role : uint8_t {
  kWorker,    // trains: creates and configures jobs, joins, pushes, commits, pulls
  kReader,    // pulls
  kSaver,     // pulls, and holds a version meanwhile
  kOperator,  // looks at everything, flushes, rolls back, deletes; also a worker, reader and saver
  kAuditor,   // looks at everything
  kPeer,      // another server of the cluster
};
inline constexpr int kRoleCount = 6;
const char* RoleName(Role role);  // "worker"

class Roles {
 public:
  constexpr Roles() = default;
  constexpr Roles(std::initializer_list<Role> roles) {
    for (const Role role : roles) bits_ |= Bit(role);
  }
  constexpr bool Has(Role role) const { return (bits_ & Bit(role)) != 0; }
  constexpr bool Meets(Roles other) const { return (bits_ & other.bits_) != 0; }
  constexpr void Add(Roles other) { bits_ |= other.bits_; }
  constexpr Roles And(Roles other) const {
    Roles both;
    both.bits_ = bits_ & other.bits_;
    return both;
  }
  std::string ToString() const;  // "worker or operator"

 private:
  static constexpr unsigned Bit(Role role) { return 1u << static_cast<unsigned>(role); }
  unsigned bits_ = 0;
};

// A client may have each of these; kPeer is for servers alone.
inline constexpr Roles kClients{Role::kWorker, Role::kReader, Role::kSaver, Role::kOperator,
                                Role::kAuditor};

// The rule of every RPC: who may call it. An RPC without a rule cannot be served.
struct Rule {
  const char* method;  // "/orlop.v1.Job/Join"
  Roles roles;
};
const std::vector<Rule>& Rules();
// Returns null if the method has no rule.
const Rule* FindRule(std::string_view method);
// Returns the rules as the table of SECURITY.md, in Markdown.
std::string RuleTable();

// What a caller may do.
struct Identity {
  struct Grant {
    Roles roles;
    std::string jobs = "*";  // a name, or the beginning of names with * at its end
  };
  std::string name;  // with all names of it: "certificate '10.0.0.1, trainer.team-a'"
  std::vector<Grant> grants;

  // Whether one of the roles is granted for a job. `job` empty: for any job.
  bool May(Roles roles, std::string_view job) const;
  // Returns OK, or PermissionDenied (DENIED) that names the caller, the method and the job.
  absl::Status Check(const Rule& rule, std::string_view job) const;
};

// The grants of a file.
class Access {
 public:
  // Status: InvalidArgument, naming the file, the line, the value and what is known.
  static absl::StatusOr<Access> Parse(std::string_view text, const std::string& file);

  // Returns the identity of the certificate that a connection has shown.
  Identity Of(const grpc::AuthContext& context) const;
  // Returns what is granted to a caller with these names. `name` is for messages.
  Identity Of(const std::vector<std::string>& names, const std::string& name) const;

 private:
  std::multimap<std::string, Identity::Grant> grants_;  // by name
  std::set<std::string> revoked_;
};

}  // namespace orlop::server
