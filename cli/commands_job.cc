// The commands `orlop flush`, `rollback`, `delete`, `export` and `import`, by which an operator
// acts on one job.
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "cli/commands.h"
#include "cli/context.h"
#include "cli/print/json.h"
#include "cli/print/print.h"
#include "cli/print/table.h"
#include "cli/safetensors.h"
#include "client/client.h"
#include "client/session.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"

namespace orlop::cli {
namespace {

using client::Session;

// Export and import move this many elements at a time, which bounds their memory.
constexpr uint64_t kPieceElements = uint64_t{1} << 22;
// How long one hold keeps the exported version readable. Export renews it before every pull.
constexpr client::Milliseconds kHold{120'000};

// Returns the dtype of a tensor in the exported file: that of the manifest for buffers and if
// `dtype` is empty, otherwise `dtype`, "fp32" or "bf16".
v1::DType ExportType(const v1::TensorSpec& tensor, const std::string& dtype) {
  if (tensor.kind() == v1::TENSOR_KIND_BUFFER || dtype.empty()) return tensor.dtype();
  return dtype == "fp32" ? v1::DTYPE_F32 : v1::DTYPE_BF16;
}

// Calls visit(box, first, count) for consecutive ranges of a flattened tensor, each as a flat box
// and as the elements [first, first + count), until a call returns an error.
template <typename Visit>
absl::Status ForEachRange(uint64_t element_count, Visit visit) {
  for (uint64_t first = 0; first < element_count; first += kPieceElements) {
    const uint64_t count = std::min(kPieceElements, element_count - first);
    if (absl::Status status = visit(Box{{first}, {count}, true}, first, count); !status.ok())
      return status;
  }
  return absl::OkStatus();
}

// Holds version `step` of a job (Session::Hold) from the first Renew until it is destroyed, however
// the export ends.
class HeldVersion {
 public:
  HeldVersion(Session* session, int64_t step)
      : session_(session), step_(step), holder_(absl::StrCat("orlop export ", getpid())) {}
  ~HeldVersion() { session_->Hold(step_, client::Milliseconds(0), holder_).IgnoreError(); }
  absl::Status Renew() { return session_->Hold(step_, kHold, holder_); }

 private:
  Session* const session_;
  const int64_t step_;
  const std::string holder_;
};

// Pulls tensor number `tensor` at version `step` as `dtype` and appends it to the file.
absl::Status WriteTensor(Session* session, uint32_t tensor, v1::DType dtype, int64_t step,
                         HeldVersion* held, SafetensorsWriter* writer) {
  const size_t element_bytes = ElementBytes(dtype);
  std::vector<std::byte> bytes;
  return ForEachRange(
      session->manifest().element_count(tensor), [&](const Box& box, uint64_t, uint64_t count) {
        if (absl::Status status = held->Renew(); !status.ok()) return status;
        bytes.resize(count * element_bytes);
        const client::PullPart part{
            .tensor = tensor, .dtype = dtype, .box = box, .data = absl::MakeSpan(bytes)};
        if (auto pulled = session->Pull({&part, 1}, {.version = step}); !pulled.ok())
          return pulled.status();
        return writer->Write({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
      });
}

// Returns whether the servers have a value of the tensor: one that may be unset has no slots until
// a LOAD sets it.
absl::StatusOr<bool> IsSet(client::Client* client, const std::string& job,
                           const v1::TensorSpec& tensor) {
  if (!tensor.may_be_unset()) return true;
  const auto described = client->DescribeTensor(job, tensor.name());
  if (!described.ok()) return described.status();
  for (const v1::ShardDescription& shard : described->shards()) {
    if (!shard.error().empty())
      return absl::UnavailableError(absl::StrCat("tensor ", tensor.name(), ": ", shard.error()));
    if (shard.slots_size() == 0) return false;
  }
  return true;
}

// Writes the tensors of the committed step to a file, and adds the bytes of their data to *bytes.
// Those without a value are left out and added to *unset.
absl::Status ExportTo(client::Client* client, Session* session, const std::string& path,
                      const std::string& dtype, uint64_t* bytes, std::vector<std::string>* unset) {
  const client::Manifest& manifest = session->manifest();
  const int64_t step = session->state().committed_step;
  if (step < 0)
    return absl::FailedPreconditionError(
        absl::StrCat("job ", session->job(), " has no weights yet (LOADING)"));
  std::vector<SafetensorsEntry> entries;
  std::vector<uint32_t> exported;
  for (uint32_t i = 0; i < manifest.size(); ++i) {
    const v1::TensorSpec& tensor = manifest.tensor(i);
    const auto is_set = IsSet(client, session->job(), tensor);
    if (!is_set.ok()) return is_set.status();
    if (!*is_set) {
      unset->push_back(tensor.name());
      continue;
    }
    exported.push_back(i);
    entries.push_back(
        {tensor.name(), ExportType(tensor, dtype), {tensor.shape().begin(), tensor.shape().end()}});
  }
  HeldVersion held(session, step);
  if (absl::Status status = held.Renew(); !status.ok()) return status;
  auto writer = SafetensorsWriter::Open(
      path, entries,
      {{"format", "pt"}, {"orlop.job", session->job()}, {"orlop.step", absl::StrCat(step)}});
  if (!writer.ok()) return writer.status();
  for (size_t i = 0; i < exported.size(); ++i) {
    const v1::DType type = entries[i].dtype;
    absl::Status status = WriteTensor(session, exported[i], type, step, &held, &*writer);
    if (!status.ok()) return status;
    *bytes += manifest.element_count(exported[i]) * ElementBytes(type);
  }
  return writer->Close();
}

// Returns the manifest index of the tensor that an entry of the file is for. A buffer must have the
// manifest's dtype; a parameter may have any float dtype.
//   Status  NotFound (no tensor of this name), InvalidArgument (another shape or dtype)
absl::StatusOr<uint32_t> MatchTensor(const SafetensorsEntry& entry,
                                     const client::Manifest& manifest) {
  const auto index = manifest.Find(entry.name);
  if (!index.ok()) return index.status();
  const v1::TensorSpec& tensor = manifest.tensor(*index);
  if (entry.shape != std::vector<uint64_t>(tensor.shape().begin(), tensor.shape().end()))
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", entry.name, " has another shape in the file than in the manifest"));
  const bool fits = tensor.kind() == v1::TENSOR_KIND_BUFFER ? entry.dtype == tensor.dtype()
                                                            : IsFloat(entry.dtype);
  if (!fits)
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", entry.name, " is ", std::string(DTypeName(entry.dtype)), " in the file and ",
        std::string(DTypeName(tensor.dtype())), " in the manifest"));
  return *index;
}

// Returns the slot that values of `dtype` set. fp32 values of a parameter set its "master", which
// is weight and remainder. A buffer has no remainder, so its values set "weight".
std::string SlotOf(const v1::TensorSpec& tensor, v1::DType dtype) {
  return tensor.kind() != v1::TENSOR_KIND_BUFFER && dtype == v1::DTYPE_F32 ? "master" : "weight";
}

// Makes this process the job's only contributor, which sends every tensor whole. Its generation
// supersedes that of the workers.
absl::Status JoinAlone(Session* session) {
  const auto generation = session->StartGeneration(1);
  if (!generation.ok()) return generation.status();
  client::JoinOptions join{.generation = *generation};
  join.layout.set_mode(v1::ContributionLayout::EXACTLY_ONCE);
  join.layout.set_preset(v1::ContributionLayout::WHOLE);
  return session->Join(join).status();
}

// Commits a LOAD step with the tensors of a file and returns the step's number. Adds the bytes of
// their data to *bytes. A tensor that the file lacks keeps its values; if the job has no weights
// yet, the commit fails with FailedPrecondition (LOADING).
absl::StatusOr<int64_t> ImportFrom(Session* session, const std::string& path, uint64_t* bytes) {
  const auto reader = SafetensorsReader::Open(path);
  if (!reader.ok()) return reader.status();
  // All entries are checked before workers lose the job.
  for (const SafetensorsEntry& entry : reader->entries())
    if (auto tensor = MatchTensor(entry, session->manifest()); !tensor.ok()) return tensor.status();
  if (absl::Status status = JoinAlone(session); !status.ok()) return status;
  std::vector<char> buffer;
  for (const SafetensorsEntry& entry : reader->entries()) {
    const uint32_t tensor = *session->manifest().Find(entry.name);
    const size_t element_bytes = ElementBytes(entry.dtype);
    absl::Status status =
        ForEachRange(session->manifest().element_count(tensor),
                     [&](const Box& box, uint64_t first, uint64_t count) {
                       buffer.resize(count * element_bytes);
                       if (absl::Status read =
                               reader->Read(entry, first * element_bytes, absl::MakeSpan(buffer));
                           !read.ok())
                         return read;
                       const client::PushPart part{
                           .tensor = tensor,
                           .slot = SlotOf(session->manifest().tensor(tensor), entry.dtype),
                           .dtype = entry.dtype,
                           .box = box,
                           .data = absl::MakeConstSpan(reinterpret_cast<std::byte*>(buffer.data()),
                                                       buffer.size())};
                       return session->SetState({&part, 1}).status();
                     });
    if (!status.ok()) return status;
    *bytes += entry.end - entry.begin;
  }
  const auto committed = session->Commit({.kind = v1::CommitStepRequest::LOAD});
  if (!committed.ok()) return committed.status();
  return committed->step();
}

}  // namespace

int Rollback(const Context& context, const std::string& job, int64_t to_step) {
  const auto client = context.Connect();
  if (!client.ok()) return Fail(context, client.status());
  const auto response = (*client)->AcceptRollback(job, to_step);
  if (!response.ok()) return Fail(context, response.status());
  if (context.json) return PrintJson(ToJson(*response)), kOk;
  Print(absl::StrCat("job ", job, " is at step ", response->committed_step(), " (epoch ",
                     response->epoch(), ")\n"));
  return kOk;
}

int Flush(const Context& context, const std::string& job) {
  const auto client = context.Connect();
  if (!client.ok()) return Fail(context, client.status());
  const auto response = (*client)->FlushJob(job);
  if (!response.ok()) return Fail(context, response.status());
  if (context.json) return PrintJson(ToJson(*response)), kOk;
  Print(
      absl::StrCat("step ", response->step(), " of job ", job, " is on disk on all its servers\n"));
  return kOk;
}

int Delete(const Context& context, const std::string& job) {
  const auto client = context.Connect();
  if (!client.ok()) return Fail(context, client.status());
  const auto existed = (*client)->DeleteJob(job);
  if (!existed.ok()) return Fail(context, existed.status());
  if (context.json) return PrintJson({{"job", job}, {"existed", *existed}}), kOk;
  Print(absl::StrCat("job ", job, *existed ? " deleted\n" : " did not exist\n"));
  return kOk;
}

int Export(const Context& context, const std::string& job, const std::string& path,
           const std::string& dtype) {
  const auto client = context.Connect();
  if (!client.ok()) return Fail(context, client.status());
  const auto session = (*client)->AttachJob(job);
  if (!session.ok()) return Fail(context, session.status());
  uint64_t bytes = 0;
  std::vector<std::string> unset;
  const absl::Status status = ExportTo(client->get(), session->get(), path, dtype, &bytes, &unset);
  if (!status.ok()) return Fail(context, status);
  if (!unset.empty())
    std::cerr << "orlop: left out, since they stayed with the worker (frozen and unchanged): '"
              << unset.front() << "'"
              << (unset.size() > 1 ? absl::StrCat(" and ", unset.size() - 1, " more") : "")
              << "; session.bind(model, store_frozen=True) keeps them on the servers\n";
  const int64_t step = (*session)->state().committed_step;
  if (context.json)
    return PrintJson({{"job", job},
                      {"step", step},
                      {"path", path},
                      {"bytes", bytes},
                      {"left_out", unset}}),
           kOk;
  Print(absl::StrCat("step ", step, " of job ", job, " written to ", path, ": ",
                     (*session)->manifest().size() - unset.size(), " tensors, ", HumanBytes(bytes),
                     "\n"));
  return kOk;
}

int Import(const Context& context, const std::string& job, const std::string& path) {
  const auto client = context.Connect();
  if (!client.ok()) return Fail(context, client.status());
  const auto session = (*client)->AttachJob(job);
  if (!session.ok()) return Fail(context, session.status());
  uint64_t bytes = 0;
  const auto step = ImportFrom(session->get(), path, &bytes);
  if (!step.ok()) return Fail(context, step.status());
  if (context.json)
    return PrintJson({{"job", job}, {"step", *step}, {"path", path}, {"bytes", bytes}}), kOk;
  Print(absl::StrCat(path, " loaded into job ", job, " as step ", *step, ": ", HumanBytes(bytes),
                     "\n"));
  return kOk;
}

}  // namespace orlop::cli
