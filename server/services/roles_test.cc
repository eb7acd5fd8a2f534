#include "server/services/roles.h"

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/data.pb.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"

namespace orlop::server {
namespace {

using ::testing::HasSubstr;

TEST(Roles, EveryRpcOfTheProtocolHasOneRule) {
  std::set<std::string> methods;
  for (const auto* file :
       {v1::CreateJobRequest::descriptor()->file(), v1::PullRequest::descriptor()->file(),
        v1::ListJobsRequest::descriptor()->file(), v1::StepMessage::descriptor()->file()}) {
    for (int s = 0; s < file->service_count(); ++s)
      for (int m = 0; m < file->service(s)->method_count(); ++m)
        methods.insert("/" + file->service(s)->full_name() + "/" +
                       file->service(s)->method(m)->name());
  }
  std::set<std::string> ruled;
  for (const Rule& rule : Rules()) EXPECT_TRUE(ruled.insert(rule.method).second) << rule.method;
  EXPECT_EQ(methods, ruled);
  EXPECT_GT(methods.size(), 20u);
  EXPECT_EQ(FindRule("/orlop.v1.Job/Nothing"), nullptr);
}

TEST(Roles, AJobIsAWall) {
  const Identity team{"team a", {{{Role::kWorker}, "a/*"}, {{Role::kReader}, "shared"}}};
  const Rule &join = *FindRule("/orlop.v1.Job/Join"), &pull = *FindRule("/orlop.v1.Data/Pull");
  EXPECT_TRUE(team.Check(join, "a/1").ok());
  EXPECT_TRUE(team.Check(join, "").ok());
  EXPECT_TRUE(team.Check(pull, "shared").ok());
  for (const char* other : {"b", "a", "shared", "A/1", "aa/1"})
    EXPECT_TRUE(absl::IsPermissionDenied(team.Check(join, other))) << other;
  const absl::Status denied = team.Check(join, "shared");
  EXPECT_THAT(std::string(denied.message()),
              testing::AllOf(HasSubstr("team a"), HasSubstr("'shared'"), HasSubstr("worker")));
  EXPECT_EQ(DetailOf(denied).reason(), v1::ErrorDetail::DENIED);
  EXPECT_FALSE(Identity{}.May({Role::kReader}, ""));
}

TEST(Access, GrantsWhatTheFileSaysAndNothingElse) {
  const auto access = Access::Parse(R"(
[[grant]]
name = "trainer"
roles = ["worker", "saver"]
jobs = ["one", "many/*"]
[[grant]]
name = "*"
roles = ["auditor"]
[[revoked]]
name = "lost"
)",
                                    "roles.toml");
  ASSERT_TRUE(access.ok()) << access.status();
  const Identity trainer = access->Of({"host", "trainer"}, "x");
  EXPECT_TRUE(trainer.May({Role::kWorker}, "one"));
  EXPECT_TRUE(trainer.May({Role::kSaver}, "many/2"));
  EXPECT_TRUE(trainer.May({Role::kAuditor}, "other"));
  EXPECT_FALSE(trainer.May({Role::kWorker}, "other"));
  EXPECT_FALSE(trainer.May({Role::kOperator, Role::kPeer}, "one"));
  EXPECT_TRUE(access->Of({}, "x").May({Role::kAuditor}, "x"));
  EXPECT_FALSE(access->Of({"trainer", "lost"}, "x").May({Role::kAuditor, Role::kWorker}, ""));
}

TEST(Access, AFileThatIsWrongIsNamedWithTheLine) {
  const std::vector<std::pair<std::string, std::string>> files = {
      {"", "grants nobody"},
      {"[[grant]]\nname = \"a\"\nroles = [\"wroker\"]", "r.toml:3: role 'wroker'"},
      {"[[grant]]\nname = \"a\"", "roles"},
      {"[[grant]]\nname = \"\"\nroles = [\"worker\"]", "name"},
      {"[[grant]]\nname = \"a\"\nroles = []", "not empty"},
      {"[[grant]]\nname = \"a\"\nroles = \"worker\"", "list of strings"},
      {"[[grant]]\nname = \"a\"\nroles = [\"worker\"]\njob = [\"x\"]", "'job' is unknown"},
      {"[grant]\nname = \"a\"", "'grant' is unknown"},
      {"[[grants]]\nname = \"a\"", "'grants' is unknown"},
      {"[[revoked]]\nname = 3", "[[revoked]]"},
      {"[[grant", "not valid TOML"}};
  for (const auto& [text, says] : files) {
    const absl::Status status = Access::Parse(text, "r.toml").status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << text;
    EXPECT_THAT(std::string(status.message()), HasSubstr(says)) << text;
  }
}

}  // namespace
}  // namespace orlop::server
