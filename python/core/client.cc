// Client: the connection to the servers, jobs, and what operators read.
#include "client/client.h"

#include <nanobind/stl/string.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "client/session.h"
#include "orlop/v1/types.pb.h"
#include "python/core/gil.h"
#include "python/core/message.h"
#include "python/core/module.h"
#include "python/core/owned.h"
#include "python/core/status.h"

namespace orlop::python {
namespace nb = nanobind;
using namespace nb::literals;
using client::Client;
using JobHandle = client::Session;

namespace {

client::Milliseconds MillisecondsOf(double seconds) {
  return client::Milliseconds(static_cast<int64_t>(seconds * 1000));
}

template <typename Message>
nb::list ListOf(const std::vector<Message>& messages) {
  nb::list list;
  for (const auto& message : messages) list.append(ToPython(message));
  return list;
}

Owned<Client> Connect(const std::string& server, const std::string& certificate,
                      const std::string& key, const std::string& authority, double timeout_seconds,
                      double connect_timeout_seconds) {
  static const auto process = getpid();  // the first to use gRPC
  CheckProcess(process);
  client::ClientOptions options;
  options.server = server;
  options.tls = {certificate, key, authority};
  options.control_timeout = MillisecondsOf(timeout_seconds);
  options.data_timeout = MillisecondsOf(timeout_seconds);
  options.connect_timeout = MillisecondsOf(connect_timeout_seconds);
  return Owned(ValueOrThrow(WithoutGil([&] { return Client::Connect(std::move(options)); })));
}

v1::Durability DurabilityOf(const std::string& name) {
  v1::Durability level = v1::DURABILITY_UNSPECIFIED;
  if (!name.empty() && !v1::Durability_Parse("DURABILITY_" + name, &level))
    throw nb::value_error(("unknown durability level " + name).c_str());
  return level;
}

Owned<JobHandle> CreateJob(Owned<Client>& self, const std::string& job, nb::list tensors,
                           uint64_t shard_elements, uint64_t seed, const std::string& durability) {
  client::JobSpec spec{.job = job,
                       .shard_elements = shard_elements,
                       .seed = seed,
                       .durability = DurabilityOf(durability)};
  for (nb::handle fields : tensors)
    FromPython(nb::cast<nb::dict>(fields), &spec.tensors.emplace_back());
  return Owned(ValueOrThrow(WithoutGil([&] { return self->CreateJob(spec); })));
}

// What a client can see of a cluster.
void BindLists(nb::class_<Owned<Client>>* client) {
  (*client)
      .def("list_servers",
           [](Owned<Client>& self) {
             return ListOf(ValueOrThrow(WithoutGil([&] { return self->ListServers(); })));
           })
      .def("list_jobs",
           [](Owned<Client>& self) {
             return ListOf(ValueOrThrow(WithoutGil([&] { return self->ListJobs(); })));
           })
      .def(
          "list_tensors",
          [](Owned<Client>& self, const std::string& job, const std::string& name_contains) {
            return ListOf(
                ValueOrThrow(WithoutGil([&] { return self->ListTensors(job, name_contains); })));
          },
          "job"_a, "name_contains"_a = "")
      .def(
          "describe_tensor",
          [](Owned<Client>& self, const std::string& job, const std::string& tensor) {
            return ToPython(
                ValueOrThrow(WithoutGil([&] { return self->DescribeTensor(job, tensor); })));
          },
          "job"_a, "tensor"_a)
      .def(
          "server_status",
          [](Owned<Client>& self, const std::string& server_name) {
            return ToPython(
                ValueOrThrow(WithoutGil([&] { return self->ServerStatus(server_name); })));
          },
          "server_name"_a = "");
}

}  // namespace

void BindClient(nb::module_& module) {
  nb::class_<Owned<Client>> client(module, "Client");
  BindLists(&client);
  client
      .def_static("connect", &Connect, "server"_a, "certificate"_a = "", "key"_a = "",
                  "authority"_a = "", "timeout_seconds"_a = 60.0,
                  "connect_timeout_seconds"_a = 10.0)
      .def("create_job", &CreateJob, "job"_a, "tensors"_a, "shard_elements"_a = 0, "seed"_a = 0,
           "durability"_a = "")
      .def(
          "attach_job",
          [](Owned<Client>& self, const std::string& job) {
            return Owned(ValueOrThrow(WithoutGil([&] { return self->AttachJob(job); })));
          },
          "job"_a)
      .def(
          "delete_job",
          [](Owned<Client>& self, const std::string& job) {
            return ValueOrThrow(WithoutGil([&] { return self->DeleteJob(job); }));
          },
          "job"_a)
      .def(
          "job_status",
          [](Owned<Client>& self, const std::string& job) {
            return ToPython(ValueOrThrow(WithoutGil([&] { return self->JobStatus(job); })));
          },
          "job"_a)
      .def(
          "accept_rollback",
          [](Owned<Client>& self, const std::string& job, int64_t to_step) {
            return ToPython(
                ValueOrThrow(WithoutGil([&] { return self->AcceptRollback(job, to_step); })));
          },
          "job"_a, "to_step"_a)
      .def(
          "flush_job",
          [](Owned<Client>& self, const std::string& job) {
            return ToPython(ValueOrThrow(WithoutGil([&] { return self->FlushJob(job); })));
          },
          "job"_a);
}

}  // namespace orlop::python
