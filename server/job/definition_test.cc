#include "server/job/definition.h"

#include <string>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/convert.h"
#include "server/job/manifest.h"

namespace orlop::server {
namespace {

using testing::HasSubstr;

// Returns a definition of one tensor on one server, with the right digest.
v1::JobDefinition Definition() {
  v1::JobDefinition definition;
  v1::CreateJobRequest& manifest = *definition.mutable_manifest();
  manifest.set_job("job");
  v1::TensorSpec& tensor = *manifest.add_tensors();
  tensor.set_name("w");
  tensor.set_dtype(v1::DTYPE_F32);
  tensor.add_shape(300);
  EXPECT_TRUE(CompleteManifest(&manifest).ok());
  ToWire(ManifestDigest(manifest), definition.mutable_manifest_digest());
  definition.set_server_count(1);
  v1::PlacementRun& run = *definition.add_runs();
  run.set_shard_count(1);
  run.add_servers(0);
  definition.mutable_optimizer()->add_groups()->set_optimizer("adamw");
  return definition;
}

// Returns the text of the refusal; empty: the definition is accepted.
std::string Refusal(const v1::JobDefinition& definition) {
  return std::string(CheckDefinition(definition).status().message());
}

TEST(Definition, IsCompleteAndPlacedAndHasItsDigest) {
  EXPECT_EQ(Refusal(Definition()), "");
  v1::JobDefinition definition = Definition();
  definition.clear_runs();
  EXPECT_THAT(Refusal(definition), HasSubstr("not placed"));
  definition = Definition();
  definition.mutable_manifest_digest()->set_low(1);
  EXPECT_THAT(Refusal(definition), HasSubstr("has digest"));
  definition = Definition();
  definition.mutable_optimizer()->mutable_groups(0)->set_optimizer("none");
  EXPECT_THAT(Refusal(definition), HasSubstr("optimizer 'none'"));
  definition = Definition();
  definition.mutable_manifest()->set_job("..");
  EXPECT_THAT(Refusal(definition), HasSubstr("job '..'"));
}

// The model divides by shard_elements, so a manifest without it must not pass under the digest of
// the complete one.
TEST(Definition, ThatIsNotCompleteIsRefusedUnderTheDigestOfTheCompleteOne) {
  v1::JobDefinition definition = Definition();
  definition.mutable_manifest()->set_shard_elements(0);
  EXPECT_THAT(Refusal(definition), HasSubstr("not complete"));
  definition = Definition();
  definition.mutable_manifest()->set_first(7);
  EXPECT_THAT(Refusal(definition), HasSubstr("not complete"));
}

}  // namespace
}  // namespace orlop::server
