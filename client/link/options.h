// Settings of a client. Link::Create validates them once.
#pragma once

#include <cstdint>
#include <string>

#include "client/link/retry.h"

namespace orlop::client {

// The PEM files of mutual TLS: give all three or none.
struct TlsFiles {
  // This client's certificate.
  std::string certificate;
  // The private key of `certificate`.
  std::string key;
  // The certificate authority that signed the servers' certificates.
  std::string authority;
};

struct ClientOptions {
  // Any server of the cluster: host:port or unix:/path.
  std::string server = "127.0.0.1:7070";
  TlsFiles tls;
  // Connections to each server for data, 1 to 16. Control calls use one more.
  int connections_per_server = 2;
  // Largest payload of a message in bytes: 1 MiB to 4 MiB, a multiple of 1 MiB.
  uint32_t chunk_bytes = 4 << 20;
  // Limit of a control call, its retries included.
  Milliseconds control_timeout{60'000};
  // Limit of a Push, SetState or Pull, its retries included; the time for its bytes is added.
  Milliseconds data_timeout{60'000};
  // Limit of Connect, its retries included.
  Milliseconds connect_timeout{10'000};
  RetryOptions retry;
  // A data call of n bytes may take data_timeout + n / slowest_bytes_per_second.
  double slowest_bytes_per_second = 16 << 20;
};

}  // namespace orlop::client
