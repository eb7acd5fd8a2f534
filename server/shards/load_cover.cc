#include "server/shards/load_cover.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "absl/status/status.h"
#include "base/box.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/shard_info.h"
#include "server/shards/slot_mapping.h"

namespace orlop::server {

LoadCover::LoadCover(const ShardInfo& shard, const SlotFormats& formats, Slot covered)
    : shard_(shard), formats_(formats), slot_(covered) {}

absl::Status LoadCover::Add(Slot slot, v1::DType dtype, const Box& box) {
  const auto mapping = MapSlot(shard_, formats_, slot, dtype, "set");
  if (!mapping.ok()) return mapping.status();
  if (mapping->uses(slot_)) {
    Mark(box, &set_);
  } else if (slot_ == Slot::kRemainder && mapping->first == Slot::kWeight && format().exists()) {
    Mark(box, &zeroed_);
  }
  return absl::OkStatus();
}

void LoadCover::Mark(const Box& box, std::vector<bool>* elements) const {
  const SlotFormat& format = this->format();
  elements->resize(format.ElementCount(shard_.count()));
  ForEachRun(box, shard_.tensor->shape, shard_.range(), [&](Range run) {
    if (format.axis != SlotFormat::Axis::kElements) {
      for (uint64_t element = run.begin; element < run.end; ++element)
        (*elements)[format.AxisIndex(element) - format.axis_begin] = true;
      return;
    }
    const uint64_t begin = (run.begin - shard_.range().begin) / format.elements_per,
                   end = format.ElementCount(run.end - shard_.range().begin);
    std::fill(elements->begin() + begin, elements->begin() + end, true);
  });
}

bool LoadCover::is_whole() const {
  return !set_.empty() && std::find(set_.begin(), set_.end(), false) == set_.end();
}

bool LoadCover::is_untouched(bool has_contents) const {
  return set_.empty() && (zeroed_.empty() || !has_contents);
}

void LoadCover::FillRest(const Buffer* base, Buffer* out) const {
  const SlotFormat& format = this->format();
  const uint64_t count = format.ElementCount(shard_.count()), size = ElementBytes(format.dtype);
  for (uint64_t i = 0; i < count; ++i) {
    if (!set_.empty() && set_[i]) continue;
    uint8_t* to = out->data() + i * size;
    const bool is_zeroed = !zeroed_.empty() && zeroed_[i];
    if (is_zeroed || base == nullptr)
      std::memset(to, is_zeroed ? 0 : format.initial_byte, size);
    else
      std::memcpy(to, base->data() + i * size, size);
  }
}

}  // namespace orlop::server
