// One shard in a flush: its entry in the index and its bulk values.
//
// Under the flush's prefix: "SHARD/SLOT", "SHARD/gradient", "SHARD/piece-N", "SHARD/load-SLOT",
// SHARD being the id in eight hexadecimal digits. Each has its size and its XXH3-64 in the index, 0
// and 0 if there are no bytes. The entry of a shard:
//   shard     = id tensor begin end slot{26} gradient load
//   slot      = dtype bytes
//   gradient  = 0 | 1 dtype bytes staged piece_count piece...
//   piece     = rank region stored dtype digest sum_squares nonfinite_count bytes
//   load      = 0 | 1 staged piece_count (slot dtype stored digest flat offset extent)... bytes{26}
//   staged    = 0 | 1 digest sum_squares nonfinite_count absent
//   bytes     = size xxh3
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/durability/flush_codec.h"
#include "server/shards/shard_image.h"
#include "storage/store.h"

namespace orlop::server {

class FlushedShard {
 public:
  // `prefix`: of the flush, with its slash. `image` outlives this.
  FlushedShard(std::string prefix, ShardImage* image) : prefix_(std::move(prefix)), image_(image) {}

  // Writes the bulk values of the shard and adds its entry to the index.
  //   Status  FailedPrecondition (the shard is at another version), ResourceExhausted, DataLoss
  absl::Status Write(int64_t step, storage::Store* store, Encoder* index) const;
  // Reads the next entry of the index, and replaces the shard by what it names. `with_staged`
  // false: what was staged is left out.
  //   Status  FailedPrecondition (another shard, format or contribution layout), DataLoss,
  //           ResourceExhausted: the shard is a mixture then
  absl::Status Load(int64_t step, bool with_staged, const storage::Store& store, Decoder* index);

 private:
  std::string Key(const std::string& name) const;
  std::string What(const std::string& name) const;

  absl::Status WriteBytes(const std::string& name, const BufferPtr& bytes, storage::Store* store,
                          Encoder* index) const;
  absl::Status WriteGradient(const GradientImage& gradient, storage::Store* store,
                             Encoder* index) const;
  absl::Status WriteLoad(const LoadImage& load, storage::Store* store, Encoder* index) const;

  absl::Status ReadBytes(const storage::Store& store, const std::string& name, uint64_t checksum,
                         Buffer* out) const;
  absl::StatusOr<BufferPtr> ReadStaged(const storage::Store& store, const std::string& name,
                                       bool keep, Decoder* index);
  absl::Status LoadSlot(const storage::Store& store, Slot slot, Decoder* index);
  absl::Status LoadGradient(const storage::Store& store, bool keep, Decoder* index);
  absl::Status LoadLoad(const storage::Store& store, bool keep, Decoder* index);

  const std::string prefix_;
  ShardImage* const image_;
};

}  // namespace orlop::server
