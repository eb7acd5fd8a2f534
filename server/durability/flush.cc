#include "server/durability/flush.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/checksum.h"
#include "proto/status.h"
#include "server/durability/flush_codec.h"
#include "server/durability/flush_shard.h"
#include "server/job/slots.h"
#include "server/shards/shard_store.h"
#include "storage/store.h"

namespace orlop::server {
namespace {

// A flush is one head (small value "flush/JOB:SERIAL"; no name holds ':') and bulk values
// "flush/JOB:SERIAL/...": "index" and those of the shards (server/durability/flush_shard.h).
// Example: flush/gpt:000000000000002a/00000007/exp_avg.
//   head   = format job step index_bytes index_xxh3 xxh3-of-all-before
//   index  = manifest optimizer machine shard_count shard...
constexpr uint64_t kFormat = 1;

struct Head {
  FlushInfo info;
  uint64_t index_bytes = 0;
  uint64_t index_checksum = 0;
};

std::string JobKey(const std::string& job) { return absl::StrCat("flush/", job, ":"); }
std::string HeadKey(const std::string& job, uint64_t serial) {
  return JobKey(job) + absl::StrFormat("%016x", serial);
}

std::string EncodeHead(const std::string& job, const Head& head) {
  Encoder out;
  out.Add(kFormat)
      .Add(job)
      .Add(static_cast<uint64_t>(head.info.step))
      .Add(head.index_bytes)
      .Add(head.index_checksum);
  const uint64_t checksum = Checksum64(out.bytes().data(), out.bytes().size());
  return out.Add(checksum).bytes();
}

Head DecodeHead(const std::string& job, uint64_t serial, const std::string& value) {
  Head head{{-1, serial}};
  Decoder in(value);
  const uint64_t format = in.Number();
  const std::string name = in.String();
  head.info.step = static_cast<int64_t>(in.Number());
  head.index_bytes = in.Number();
  head.index_checksum = in.Number();
  const uint64_t checksum = in.Number();
  head.info.damaged = !in.ok() || format != kFormat || name != job ||
                      checksum != Checksum64(value.data(), value.size() - sizeof(checksum));
  return head;
}

// Returns the heads of a job's flushes, newest first, damaged ones included.
absl::StatusOr<std::vector<Head>> Heads(const storage::Store& store, const std::string& job) {
  auto values = store.Scan(JobKey(job));
  if (!values.ok()) return values.status();
  std::vector<Head> heads;
  for (const auto& [key, value] : *values) {
    uint64_t serial = 0;
    if (!absl::SimpleHexAtoi(absl::string_view(key).substr(JobKey(job).size()), &serial))
      return DamagedFlush(key, "is no key of a flush");
    heads.push_back(DecodeHead(job, serial, value));
  }
  std::reverse(heads.begin(), heads.end());
  return heads;
}

absl::StatusOr<Head> FindHead(const storage::Store& store, const std::string& job, int64_t step) {
  auto heads = Heads(store, job);
  if (!heads.ok()) return heads.status();
  for (const Head& head : *heads)
    if (!head.info.damaged && head.info.step == step) return head;
  for (const Head& head : *heads)
    if (head.info.damaged)
      return DamagedFlush(absl::StrCat("head ", HeadKey(job, head.info.serial)),
                          "is damaged or of another format");
  return absl::NotFoundError(absl::StrCat("job '", job, "' has no flush of step ", step, " here"));
}

absl::StatusOr<std::string> ReadIndex(const storage::Store& store, const std::string& job,
                                      const Head& head) {
  std::string index(head.index_bytes, '\0');
  const std::string key = HeadKey(job, head.info.serial) + "/index";
  absl::Status read = store.ReadBulk(key, {reinterpret_cast<uint8_t*>(index.data()), index.size()});
  if (!read.ok()) return DamagedFlush("index", std::string(read.message()));
  if (Checksum64(index.data(), index.size()) != head.index_checksum)
    return DamagedFlush("index", "checksum differs");
  return index;
}

// Returns the batch that erases flushes. It reads none of their bytes.
storage::Batch Erasure(const std::string& job, const std::vector<uint64_t>& serials) {
  storage::Batch batch;
  for (const uint64_t serial : serials) {
    batch.erase.push_back(HeadKey(job, serial));
    batch.erase_bulk_prefixes.push_back(HeadKey(job, serial) + "/");
  }
  return batch;
}

// Writes and syncs the bulk values of a flush. Sets the size and checksum of the index in `head`.
absl::Status WriteBulkValues(storage::Store* store, const FlushHeader& header, bool with_staged,
                             ShardStore* shards, Head* head) {
  const std::string prefix = HeadKey(header.job, head->info.serial) + "/";
  const std::vector<OwnedShard>& owned = shards->layout().shards;
  Encoder index;
  index.Add(header.manifest)
      .Add(header.optimizer)
      .Add(header.machine)
      .Add(static_cast<uint64_t>(owned.size()));
  for (const OwnedShard& shard : owned) {
    auto image = shards->Image(shard.id);
    if (!image.ok()) return image.status();
    absl::Status written =
        FlushedShard(prefix, image->get()).Write(header.step, with_staged, store, &index);
    if (!written.ok()) return written;
  }
  const std::string& bytes = index.bytes();
  head->index_bytes = bytes.size();
  head->index_checksum = Checksum64(bytes.data(), bytes.size());
  absl::Status written = store->WriteBulk(
      prefix + "index", {reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()});
  return written.ok() ? store->Sync() : written;
}

}  // namespace

absl::Status WriteFlush(storage::Store* store, const FlushHeader& header, bool with_staged,
                        ShardStore* shards) {
  auto all = Heads(*store, header.job);
  if (!all.ok()) return all.status();
  Head head;
  head.info = {header.step, all->empty() ? 1 : all->front().info.serial + 1};
  // A flush that did not reach its head may have left values under this serial.
  absl::Status written = store->Commit(Erasure(header.job, {head.info.serial}));
  if (!written.ok()) return written;
  written = WriteBulkValues(store, header, with_staged, shards, &head);
  if (!written.ok()) {
    (void)store->Commit(Erasure(header.job, {head.info.serial}));  // the first error is returned
    return Annotated(written,
                     absl::StrCat("flush of job '", header.job, "' at step ", header.step));
  }
  storage::Batch complete;
  complete.put.emplace_back(HeadKey(header.job, head.info.serial), EncodeHead(header.job, head));
  return store->Commit(complete);
}

absl::Status KeepFlushes(storage::Store* store, const std::string& job,
                         const std::vector<int64_t>& steps) {
  auto heads = Heads(*store, job);
  if (!heads.ok()) return heads.status();
  std::vector<int64_t> wanted = steps;
  std::vector<uint64_t> old;
  for (const Head& head : *heads) {
    const auto step = std::ranges::find(wanted, head.info.step);
    if (head.info.damaged || step == wanted.end()) {
      old.push_back(head.info.serial);
    } else {
      wanted.erase(step);
    }
  }
  return old.empty() ? absl::OkStatus() : store->Commit(Erasure(job, old));
}

absl::Status ReclaimFlushes(storage::Store* store, const std::string& job) {
  return store->Reclaim(JobKey(job));
}

absl::StatusOr<std::vector<FlushInfo>> ListFlushes(const storage::Store& store,
                                                   const std::string& job) {
  auto heads = Heads(store, job);
  if (!heads.ok()) return heads.status();
  std::vector<FlushInfo> flushes;
  for (const Head& head : *heads) flushes.push_back(head.info);
  return flushes;
}

absl::StatusOr<FlushHeader> ReadFlushHeader(const storage::Store& store, const std::string& job,
                                            int64_t step) {
  auto head = FindHead(store, job, step);
  if (!head.ok()) return head.status();
  auto index = ReadIndex(store, job, *head);
  if (!index.ok()) return index.status();
  Decoder in(*index);
  FlushHeader header{job, step};
  header.manifest = in.String();
  header.optimizer = in.String();
  header.machine = in.String();
  return header;
}

absl::Status LoadFlush(const storage::Store& store, const std::string& job, int64_t step,
                       bool with_staged, ShardStore* shards,
                       const std::function<bool()>& is_cancelled) {
  auto head = FindHead(store, job, step);
  if (!head.ok()) return head.status();
  auto index = ReadIndex(store, job, *head);
  if (!index.ok()) return index.status();
  Decoder in(*index);
  for (int i = 0; i < 3; ++i) in.String();  // manifest, optimizer and machine
  const std::string prefix = HeadKey(job, head->info.serial) + "/";
  const std::vector<OwnedShard>& owned = shards->layout().shards;
  shards->BeginRestore();
  if (const uint64_t count = in.Number(); count != owned.size())
    return absl::FailedPreconditionError(absl::StrCat(
        "flush of job '", job, "' has ", count, " shards; ", owned.size(), " are placed here"));
  for (const OwnedShard& shard : owned) {
    if (is_cancelled && is_cancelled()) return absl::CancelledError("the server is to end");
    auto image = shards->Image(shard.id);
    if (!image.ok()) return image.status();
    absl::Status loaded = FlushedShard(prefix, image->get()).Load(step, with_staged, store, &in);
    if (!loaded.ok()) return loaded;
  }
  return in.ok() ? absl::OkStatus() : DamagedFlush("index", "ends early");
}

absl::Status EraseFlushes(storage::Store* store, const std::string& job) {
  auto heads = store->Scan(JobKey(job));
  if (!heads.ok()) return heads.status();
  storage::Batch batch;
  for (const auto& [key, head] : *heads) batch.erase.push_back(key);
  batch.erase_bulk_prefixes = {JobKey(job)};
  absl::Status erased = store->Commit(batch);
  if (erased.ok()) ReclaimFlushes(store, job).IgnoreError();  // it is given back later then
  return erased;
}

}  // namespace orlop::server
