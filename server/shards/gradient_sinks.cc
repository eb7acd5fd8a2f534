#include "server/shards/gradient_sinks.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "kernels/int8_blocks.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"
#include "proto/status.h"
#include "server/memory/accountant.h"
#include "server/shards/piece_writer.h"
#include "server/shards/run_cursor.h"
#include "server/shards/shard_info.h"

namespace orlop::server {
namespace {

class Flat : public PieceSink {
 public:
  Flat(BufferPtr owner, uint64_t offset_bytes)
      : owner_(std::move(owner)), offset_bytes_(offset_bytes) {}
  uint8_t* Destination() override { return owner_->data() + offset_bytes_; }

 private:
  const BufferPtr owner_;
  const uint64_t offset_bytes_;
};

class Scatter : public PieceSink {
 public:
  Scatter(BufferPtr owner, const ShardInfo& shard, const Box& box, size_t element_bytes)
      : owner_(std::move(owner)), element_bytes_(element_bytes), cursor_(shard, box) {}
  absl::Status Write(uint64_t, absl::Span<const uint8_t> bytes) override {
    return cursor_.Advance(
        bytes.size() / element_bytes_, [&](uint64_t local, uint64_t count, uint64_t first) {
          std::memcpy(owner_->data() + local * element_bytes_,
                      bytes.data() + first * element_bytes_, count * element_bytes_);
          return absl::OkStatus();
        });
  }

 private:
  const BufferPtr owner_;
  const size_t element_bytes_;
  RunCursor cursor_;
};

class Int8 : public PieceSink {
 public:
  // The sink takes 252 whole int8 blocks at once, about 64 KiB.
  static constexpr uint64_t kSinkBytes = 252 * kernels::kInt8BlockBytes;

  Int8(std::unique_ptr<PieceSink> sink, std::string name)
      : sink_(std::move(sink)), name_(std::move(name)), destination_(sink_->Destination()) {}
  absl::Status Write(uint64_t offset_bytes, absl::Span<const uint8_t> bytes) override {
    const uint64_t first = kernels::Int8Count(offset_bytes),
                   count = kernels::Int8Count(bytes.size());
    uint16_t* values = reinterpret_cast<uint16_t*>(destination_) + first;
    if (destination_ == nullptr) {
      decoded_.resize(count);
      values = decoded_.data();
    }
    if (absl::Status status = kernels::DecodeInt8(bytes, {values, count}); !status.ok())
      return MakeError(status.code(),
                       absl::StrCat(name_, ", elements from ", first,
                                    " of the piece: ", std::string(status.message())),
                       v1::ErrorDetail::BAD_REQUEST);
    if (destination_ != nullptr) return absl::OkStatus();
    return sink_->Write(first * sizeof(uint16_t),
                        {reinterpret_cast<const uint8_t*>(values), count * sizeof(uint16_t)});
  }

 private:
  const std::unique_ptr<PieceSink> sink_;
  const std::string name_;
  // The memory of `sink_` for decoded values. Null: `sink_` gets them from decoded_ by Write.
  uint8_t* const destination_;
  std::vector<uint16_t> decoded_;
};

}  // namespace

std::unique_ptr<PieceSink> FlatSink(BufferPtr owner, uint64_t offset_bytes) {
  return std::make_unique<Flat>(std::move(owner), offset_bytes);
}

std::unique_ptr<PieceSink> BoxSink(BufferPtr owner, const ShardInfo& shard, const Box& box,
                                   v1::DType dtype) {
  const uint64_t element_bytes = ElementBytes(dtype);
  if (!box.flat) return std::make_unique<Scatter>(std::move(owner), shard, box, element_bytes);
  const uint64_t first = std::max(box.offset[0], shard.range().begin) - shard.range().begin;
  return FlatSink(std::move(owner), first * element_bytes);
}

std::unique_ptr<PieceSink> Int8Sink(std::unique_ptr<PieceSink> sink,
                                    PieceWriter::Options* options) {
  options->sink_bytes = Int8::kSinkBytes;
  return std::make_unique<Int8>(std::move(sink), options->name);
}

}  // namespace orlop::server
