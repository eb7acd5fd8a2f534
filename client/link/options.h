// Settings of a client, validated once by Link::Create.
#pragma once

#include <cstdint>
#include <string>

#include "client/link/retry.h"

namespace orlop::client {

// Mutual TLS: three PEM files, all or none.
struct TlsFiles {
  std::string certificate;  // of this client
  std::string key;
  std::string authority;  // that signed the servers' certificates
};

struct ClientOptions {
  std::string server = "127.0.0.1:7070";  // any server of the cluster: host:port or unix:/path
  TlsFiles tls;
  int connections_per_server = 2;  // 1 to 16, for data; control calls have one more
  uint32_t chunk_bytes =
      4 << 20;  // largest payload of a message: 1 MiB to 4 MiB, a multiple of 1 MiB
  Milliseconds control_timeout{60'000};  // of one call, its retries included
  Milliseconds data_timeout{60'000};  // of Push, SetState and Pull, besides the time of their bytes
  Milliseconds connect_timeout{10'000};  // of Connect, its retries included
  RetryOptions retry;
  double slowest_bytes_per_second =
      16 << 20;  // a data call of n bytes may take data_timeout + n / this
};

}  // namespace orlop::client
