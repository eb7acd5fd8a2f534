#include "server/services/roles.h"

#include <grpcpp/security/auth_context.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"

#define TOML_HEADER_ONLY 0
#include "toml++/toml.h"

namespace orlop::server {
namespace {

constexpr Role kAll[] = {Role::kWorker,   Role::kReader,  Role::kSaver,
                         Role::kOperator, Role::kAuditor, Role::kPeer};
constexpr Roles kWork{Role::kWorker, Role::kOperator};
constexpr Roles kOperate{Role::kOperator};
constexpr Roles kRead{Role::kWorker, Role::kReader, Role::kSaver, Role::kOperator};
// A follower passes these on to the step leader, as a peer, after it has checked the caller.
constexpr Roles kList{Role::kWorker,   Role::kReader,  Role::kSaver,
                      Role::kOperator, Role::kAuditor, Role::kPeer};

std::optional<Role> RoleOf(std::string_view name) {
  for (const Role role : kAll)
    if (name == RoleName(role)) return role;
  return std::nullopt;
}

bool Matches(std::string_view pattern, std::string_view job) {
  if (!pattern.empty() && pattern.back() == '*')
    return job.substr(0, pattern.size() - 1) == pattern.substr(0, pattern.size() - 1);
  return pattern == job;
}

absl::Status Bad(const std::string& file, const toml::node& at, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(file, ":", at.source().begin.line, ": ", what));
}

// Returns the strings of a list; an error if it is anything else.
absl::StatusOr<std::vector<std::string>> Strings(const toml::node& node, const std::string& key,
                                                 const std::string& file) {
  std::vector<std::string> strings;
  const toml::array* list = node.as_array();
  if (list == nullptr || list->empty())
    return Bad(file, node, absl::StrCat(key, " must be a list of strings that is not empty"));
  for (const toml::node& entry : *list) {
    const auto text = entry.value_exact<std::string>();
    if (!text || text->empty())
      return Bad(file, entry, absl::StrCat(key, " must be a list of strings that are not empty"));
    strings.push_back(*text);
  }
  return strings;
}

struct Entry {
  std::string name;
  Roles roles;
  std::vector<std::string> jobs = {"*"};
};

absl::StatusOr<Entry> ParseEntry(const toml::node& node, const std::string& file) {
  const toml::table* table = node.as_table();
  if (table == nullptr) return Bad(file, node, "a grant is a table: write [[grant]]");
  Entry entry;
  bool has_roles = false;
  for (auto&& [key, value] : *table) {
    if (key.str() == "name") {
      entry.name = value.value_exact<std::string>().value_or("");
    } else if (key.str() == "roles") {
      const auto names = Strings(value, "roles", file);
      if (!names.ok()) return names.status();
      for (const std::string& name : *names) {
        const std::optional<Role> role = RoleOf(name);
        if (!role)
          return Bad(file, value,
                     absl::StrCat("role '", Beginning(name, kMaxNameBytes),
                                  "' is unknown; roles are worker, reader, saver, "
                                  "operator, auditor and peer"));
        entry.roles.Add({*role});
      }
      has_roles = true;
    } else if (key.str() == "jobs") {
      auto jobs = Strings(value, "jobs", file);
      if (!jobs.ok()) return jobs.status();
      entry.jobs = *std::move(jobs);
    } else {
      return Bad(file, value,
                 absl::StrCat("'", std::string(key.str()),
                              "' is unknown; a grant has name, roles and jobs"));
    }
  }
  if (entry.name.empty() || !has_roles)
    return Bad(file, node, "a grant has a name, which is not empty, and roles");
  return entry;
}

absl::StatusOr<std::string> ParseRevoked(const toml::node& node, const std::string& file) {
  const toml::table* table = node.as_table();
  std::string name =
      table == nullptr ? "" : (*table)["name"].value_exact<std::string>().value_or("");
  if (name.empty() || table->size() != 1)
    return Bad(file, node, "an entry of [[revoked]] has a name, which is not empty, and no more");
  return name;
}

}  // namespace

const char* RoleName(Role role) {
  static constexpr const char* kNames[] = {"worker",   "reader",  "saver",
                                           "operator", "auditor", "peer"};
  return kNames[static_cast<size_t>(role)];
}

std::string Roles::ToString() const {
  std::vector<std::string> names;
  for (const Role role : kAll)
    if (Has(role)) names.push_back(RoleName(role));
  return absl::StrJoin(names, " or ");
}

const std::vector<Rule>& Rules() {
  static const auto* rules = new std::vector<Rule>{
      {"/orlop.v1.Job/CreateJob", kWork},
      {"/orlop.v1.Job/GetManifest", kClients},
      {"/orlop.v1.Job/GetPlacement", kClients},
      {"/orlop.v1.Job/ConfigureOptimizer", kWork},
      {"/orlop.v1.Job/Join", kWork},
      {"/orlop.v1.Job/CommitStep", kWork},
      {"/orlop.v1.Job/AbortStep", kWork},
      {"/orlop.v1.Job/Hold", {Role::kSaver, Role::kOperator}},
      {"/orlop.v1.Job/JobStatus", kClients},
      {"/orlop.v1.Job/DeleteJob", kOperate},
      {"/orlop.v1.Data/Push", kWork},
      {"/orlop.v1.Data/SetState", kWork},
      {"/orlop.v1.Data/QueryPush", kWork},
      {"/orlop.v1.Data/Pull", kRead},
      {"/orlop.v1.Admin/ListServers", kClients},
      {"/orlop.v1.Admin/ListJobs", kList},
      {"/orlop.v1.Admin/ListTensors", kClients},
      {"/orlop.v1.Admin/DescribeTensor", kClients},
      {"/orlop.v1.Admin/ServerStatus", {Role::kOperator, Role::kAuditor}},
      {"/orlop.v1.Admin/AcceptRollback", {Role::kOperator, Role::kPeer}},
      {"/orlop.v1.Admin/FlushJob", {Role::kWorker, Role::kOperator, Role::kPeer}},
      {"/orlop.v1.Peer/PutJob", {Role::kPeer}},
      {"/orlop.v1.Peer/DropJob", {Role::kPeer}},
      {"/orlop.v1.Peer/Step", {Role::kPeer}},
      {"/orlop.v1.Peer/Identify", {Role::kPeer}},
      {"/orlop.v1.Peer/DescribeShards", {Role::kPeer}},
  };
  return *rules;
}

const Rule* FindRule(std::string_view method) {
  for (const Rule& rule : Rules())
    if (method == rule.method) return &rule;
  return nullptr;
}

std::string RuleTable() {
  std::string table = "| RPC |";
  for (const Role role : kAll) absl::StrAppend(&table, " ", RoleName(role), " |");
  absl::StrAppend(&table, "\n|---|---|---|---|---|---|---|\n");
  for (const Rule& rule : Rules()) {
    const std::string_view method(rule.method);
    const std::string shown(method.substr(method.rfind('.') + 1));  // Job/Join
    absl::StrAppend(&table, "| ", shown, " |");
    for (const Role role : kAll) absl::StrAppend(&table, rule.roles.Has(role) ? " yes |" : " - |");
    absl::StrAppend(&table, "\n");
  }
  return table;
}

bool Identity::May(Roles roles, std::string_view job) const {
  return std::any_of(grants.begin(), grants.end(), [&](const Grant& grant) {
    return grant.roles.Meets(roles) && (job.empty() || Matches(grant.jobs, job));
  });
}

absl::Status Identity::Check(const Rule& rule, std::string_view job) const {
  if (May(rule.roles, job)) return absl::OkStatus();
  const std::string shown = Beginning(job, kMaxNameBytes);
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::DENIED);
  detail.set_job(shown);
  detail.set_limit(rule.roles.ToString());
  return MakeError(absl::StatusCode::kPermissionDenied,
                   absl::StrCat(Beginning(name, kMaxNameBytes), " may not call ", rule.method,
                                shown.empty() ? "" : absl::StrCat(" for job '", shown, "'"),
                                ": that needs role ", rule.roles.ToString()),
                   detail);
}

absl::StatusOr<Access> Access::Parse(std::string_view text, const std::string& file) {
  toml::table root;
  try {
    root = toml::parse(text, file);
  } catch (const toml::parse_error& error) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ":", error.source().begin.line,
                     ": not valid TOML: ", std::string(error.description())));
  }
  Access access;
  for (auto&& [key, node] : root) {
    const toml::array* list = node.as_array();
    if ((key.str() != "grant" && key.str() != "revoked") || list == nullptr)
      return Bad(file, node,
                 absl::StrCat("'", std::string(key.str()),
                              "' is unknown; the file has lists of [[grant]] and [[revoked]]"));
    for (const toml::node& item : *list) {
      if (key.str() == "revoked") {
        const absl::StatusOr<std::string> name = ParseRevoked(item, file);
        if (!name.ok()) return name.status();
        access.revoked_.insert(*name);
        continue;
      }
      const absl::StatusOr<Entry> entry = ParseEntry(item, file);
      if (!entry.ok()) return entry.status();
      for (const std::string& jobs : entry->jobs)
        access.grants_.emplace(entry->name, Identity::Grant{entry->roles, jobs});
    }
  }
  if (access.grants_.empty())
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": grants nobody anything; write at least one [[grant]]"));
  return access;
}

Identity Access::Of(const std::vector<std::string>& names, const std::string& name) const {
  Identity identity;
  identity.name = name;
  for (const std::string& revoked : names)
    if (revoked_.contains(revoked)) return identity;
  std::vector<std::string> keys = names;
  keys.push_back("*");
  for (const std::string& key : keys) {
    const auto [begin, end] = grants_.equal_range(key);
    for (auto grant = begin; grant != end; ++grant) identity.grants.push_back(grant->second);
  }
  return identity;
}

Identity Access::Of(const grpc::AuthContext& context) const {
  std::vector<std::string> names;
  for (const grpc::string_ref& name : context.FindPropertyValues("x509_subject_alternative_name"))
    names.emplace_back(name.data(), name.size());
  const std::string all = names.empty() ? "without a name" : absl::StrJoin(names, ", ");
  return Of(names, absl::StrCat("certificate '", all, "'"));
}

}  // namespace orlop::server
