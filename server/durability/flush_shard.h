// One shard in a flush: its entry in the index, and its bulk values.
//
// The key of a bulk value is the flush's prefix and SHARD/SLOT (a slot), SHARD/gradient (a staged
// gradient), SHARD/piece-N (a staged piece with bytes of its own) or SHARD/load-SLOT (a plane of a
// staged LOAD). SHARD is the id in eight hexadecimal digits. `bytes` in the entry are the size and
// the XXH3-64 of such a value, or 0 and 0 if there is no value. {26} repeats a word for each stored
// slot. A line with | is 0, or 1 and all that follows it. The entry of a shard:
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
  // `prefix` begins the flush's keys and ends with a slash. `image` must outlive this object.
  FlushedShard(std::string prefix, ShardImage* image) : prefix_(std::move(prefix)), image_(image) {}

  // Writes the bulk values of the shard and adds its entry to the index. Staged pieces are written
  // if `with_staged`.
  //   Status  FailedPrecondition (the shard is not at version `step`), ResourceExhausted, DataLoss.
  absl::Status Write(int64_t step, bool with_staged, storage::Store* store, Encoder* index) const;
  // Reads the next entry of the index and replaces the shard's state by its values. The version
  // becomes `step`. Staged pieces are loaded if `with_staged`.
  //   Status  FailedPrecondition (another shard, format or contribution layout), DataLoss,
  //           ResourceExhausted. After an error the shard has old and new state mixed.
  absl::Status Load(int64_t step, bool with_staged, const storage::Store& store, Decoder* index);

 private:
  std::string Key(const std::string& name) const;   // of a bulk value
  std::string What(const std::string& name) const;  // names the value in messages

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
  // Without `keep`, these two read their part of the index and load nothing.
  absl::Status LoadGradient(const storage::Store& store, bool keep, Decoder* index);
  absl::Status LoadLoad(const storage::Store& store, bool keep, Decoder* index);

  const std::string prefix_;
  ShardImage* const image_;
};

}  // namespace orlop::server
