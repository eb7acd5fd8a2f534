#include "server/credentials.h"

#include <fstream>
#include <ios>
#include <sstream>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "server/config.h"

namespace orlop::server {
namespace {

absl::StatusOr<std::string> ReadFile(const std::string& flag, const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  if (!in || text.str().empty())
    return absl::InvalidArgumentError(
        absl::StrCat(flag, " ", path, ": cannot be read, or is empty"));
  return text.str();
}

}  // namespace

absl::StatusOr<Credentials> MakeCredentials(const Options& options) {
  if (!options.tls())
    return Credentials{grpc::InsecureServerCredentials(), grpc::InsecureChannelCredentials()};
  absl::StatusOr<std::string> cert = ReadFile("--tls-cert", options.tls_cert);
  absl::StatusOr<std::string> key = ReadFile("--tls-key", options.tls_key);
  absl::StatusOr<std::string> ca = ReadFile("--tls-ca", options.tls_ca);
  for (const absl::Status& status : {cert.status(), key.status(), ca.status()}) {
    if (!status.ok()) return status;
  }
  grpc::SslServerCredentialsOptions server(
      GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  server.pem_root_certs = *ca;
  server.pem_key_cert_pairs.push_back({*key, *cert});
  return Credentials{grpc::SslServerCredentials(server), grpc::SslCredentials({*ca, *key, *cert})};
}

}  // namespace orlop::server
