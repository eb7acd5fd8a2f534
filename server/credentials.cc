#include "server/credentials.h"

#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>

#include <fstream>
#include <ios>
#include <memory>
#include <sstream>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "server/config.h"

namespace orlop::server {
namespace {

constexpr unsigned kRereadSeconds = 2;

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
  if (!options.tls()) return Credentials{nullptr, grpc::InsecureChannelCredentials()};
  absl::StatusOr<std::string> cert = ReadFile("--tls-cert", options.tls_cert);
  absl::StatusOr<std::string> key = ReadFile("--tls-key", options.tls_key);
  absl::StatusOr<std::string> ca = ReadFile("--tls-ca", options.tls_ca);
  for (const absl::Status& status : {cert.status(), key.status(), ca.status()}) {
    if (!status.ok()) return status;
  }
  // The files are read again when they change.
  const auto files = std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
      options.tls_key, options.tls_cert, options.tls_ca, kRereadSeconds);
  grpc::experimental::TlsServerCredentialsOptions server(files);
  server.watch_root_certs();
  server.watch_identity_key_cert_pairs();
  server.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  grpc::experimental::TlsChannelCredentialsOptions channel;
  channel.set_certificate_provider(files);
  channel.watch_root_certs();
  channel.watch_identity_key_cert_pairs();
  return Credentials{[server] { return grpc::experimental::TlsServerCredentials(server); },
                     grpc::experimental::TlsCredentials(channel)};
}

}  // namespace orlop::server
