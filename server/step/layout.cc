#include "server/step/layout.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/box.h"
#include "server/step/identity.h"

namespace orlop::step {
namespace {

absl::Status Invalid(const std::string& tensor, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor, ": ", what));
}

// Splits a flat range into N-d boxes, at most 2 * dimensions - 1 of them. `prefix` has the index in
// each dimension before `dimension`; the range is relative to the sub-tensor at that index.
void FlatToBoxes(const Shape& shape, size_t dimension, Shape prefix, uint64_t begin, uint64_t count,
                 std::vector<Box>* out) {
  uint64_t inner = 1;
  for (size_t d = dimension + 1; d < shape.size(); ++d) inner *= shape[d];
  const auto emit = [&](uint64_t first, uint64_t rows) {
    Box box;
    for (uint64_t at : prefix) box.offset.push_back(at), box.extent.push_back(1);
    box.offset.push_back(first), box.extent.push_back(rows);
    for (size_t d = dimension + 1; d < shape.size(); ++d) {
      box.offset.push_back(0), box.extent.push_back(shape[d]);
    }
    out->push_back(std::move(box));
  };
  const auto descend = [&](uint64_t row, uint64_t from, uint64_t length) {
    Shape deeper = prefix;
    deeper.push_back(row);
    FlatToBoxes(shape, dimension + 1, std::move(deeper), from, length, out);
  };
  const uint64_t head_row = begin / inner;
  if (begin % inner != 0) {
    const uint64_t head = std::min(count, inner - begin % inner);
    descend(head_row, begin % inner, head);
    begin += head;
    count -= head;
  }
  const uint64_t whole = count / inner;
  if (whole > 0) emit(begin / inner, whole);
  if (count % inner != 0) descend(begin / inner + whole, 0, count % inner);
}

struct RankBox {
  Rank rank;
  Box box;           // in N-d coordinates
  const Box* given;  // the contributor's box that it is a part of
};

bool Covers(const Box& box, const std::vector<uint64_t>& element) {
  for (size_t d = 0; d < element.size(); ++d) {
    if (element[d] < box.offset[d] || element[d] >= box.offset[d] + box.extent[d]) return false;
  }
  return true;
}

// Returns how many boxes cover each element, if the number is the same for all elements and from 1
// to `limit`. Otherwise it returns -1, and `odd` is the index of an element that violates this. If
// `work` exceeds kMaxLayoutWork, it returns -1 too, and `odd` has no meaning.
//
// It sweeps one dimension after the other, from odd->size() on. The boundaries of the boxes divide
// the dimension into slabs, and a box either covers all of a slab or none of it. `odd` is the index
// of the current slab's first element in the dimensions swept so far.
int64_t UniformMultiplicity(const Shape& shape, const std::vector<const Box*>& boxes, int64_t limit,
                            std::vector<uint64_t>* odd, int64_t* work) {
  const size_t dimension = odd->size();
  if (dimension == shape.size()) {
    const auto count = static_cast<int64_t>(boxes.size());
    return count >= 1 && count <= limit ? count : -1;
  }
  std::vector<uint64_t> bounds = {0, shape[dimension]};
  for (const Box* box : boxes) {
    bounds.push_back(box->offset[dimension]);
    bounds.push_back(box->offset[dimension] + box->extent[dimension]);
  }
  std::sort(bounds.begin(), bounds.end());
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  int64_t multiplicity = 0;  // of the slabs before this one; 0: none yet
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    std::vector<const Box*> here;
    for (const Box* box : boxes) {
      const uint64_t begin = box->offset[dimension];
      if (begin <= bounds[i] && bounds[i] < begin + box->extent[dimension]) here.push_back(box);
    }
    *work += static_cast<int64_t>(boxes.size()) + 1;
    if (*work > kMaxLayoutWork) return -1;
    odd->push_back(bounds[i]);
    const int64_t slab = UniformMultiplicity(shape, here, limit, odd, work);
    if (slab < 0) return -1;
    if (multiplicity > 0 && slab != multiplicity) {
      odd->resize(shape.size(), 0);  // any element of the slab
      return -1;
    }
    odd->pop_back();
    multiplicity = slab;
  }
  return multiplicity;
}

bool Overlap(const Box& a, const Box& b) {
  for (size_t d = 0; d < a.offset.size(); ++d) {
    if (a.offset[d] + a.extent[d] <= b.offset[d] || b.offset[d] + b.extent[d] <= a.offset[d]) {
      return false;
    }
  }
  return true;
}

// All boxes of one tensor, in N-d coordinates, with the mode they share.
struct TensorParts {
  bool mentioned = false;
  Mode mode = Mode::kNone;
  Rank first_rank = 0;
  std::vector<RankBox> boxes;
};

absl::Status AddContribution(const TensorSpec& tensor, Rank rank, const Contribution& part,
                             TensorParts* parts) {
  if (!tensor.receives_gradient) {
    return Invalid(tensor.name, absl::StrCat("rank ", rank, " contributes to a buffer"));
  }
  if (parts->mentioned && parts->mode != part.mode) {
    return Invalid(tensor.name, absl::StrCat("ranks ", parts->first_rank, " and ", rank,
                                             " contribute in different modes"));
  }
  if (!parts->mentioned) *parts = {true, part.mode, rank, {}};
  if (part.mode == Mode::kNone && !part.boxes.empty()) {
    return Invalid(tensor.name, absl::StrCat("rank ", rank, " gives boxes to a frozen tensor"));
  }
  const absl::StatusOr<uint64_t> count = ElementCount(tensor.shape);
  if (!count.ok()) return Invalid(tensor.name, std::string(count.status().message()));
  for (const Box& box : part.boxes) {
    if (absl::Status status = ValidateBox(box, tensor.shape, *count); !status.ok())
      return Invalid(tensor.name, std::string(status.message()));
    if (!box.flat) {
      parts->boxes.push_back({rank, box, &box});
      continue;
    }
    std::vector<Box> pieces;
    if (tensor.shape.empty()) {
      pieces.push_back(Box{});
    } else {
      FlatToBoxes(tensor.shape, 0, {}, box.offset[0], box.extent[0], &pieces);
    }
    for (Box& piece : pieces) parts->boxes.push_back({rank, std::move(piece), &box});
  }
  return absl::OkStatus();
}

// Refuses two boxes of one rank that share an element. Sorts the boxes by rank and offset, so that
// each box is compared only with those that begin in its rows.
absl::Status CheckRankOverlap(const TensorSpec& tensor, TensorParts* sorted, int64_t* work) {
  std::sort(sorted->boxes.begin(), sorted->boxes.end(), [](const RankBox& a, const RankBox& b) {
    return std::tie(a.rank, a.box.offset) < std::tie(b.rank, b.box.offset);
  });
  const TensorParts& parts = *sorted;
  const auto ends_before = [](const Box& a, const Box& b) {
    return !a.offset.empty() && a.offset[0] + a.extent[0] <= b.offset[0];
  };
  for (size_t i = 0; i < parts.boxes.size(); ++i) {
    for (size_t j = i + 1; j < parts.boxes.size(); ++j) {
      if (parts.boxes[j].rank != parts.boxes[i].rank) break;
      if (ends_before(parts.boxes[i].box, parts.boxes[j].box)) break;
      if (++*work > kMaxLayoutWork) return absl::OkStatus();  // CheckCover refuses the layout
      if (Overlap(parts.boxes[i].box, parts.boxes[j].box)) {
        return Invalid(tensor.name, absl::StrCat("boxes ", ToString(*parts.boxes[i].given), " and ",
                                                 ToString(*parts.boxes[j].given), " of rank ",
                                                 parts.boxes[i].rank, " overlap"));
      }
    }
  }
  return absl::OkStatus();
}

// Returns an error that names an element with a wrong number of contributors, and them.
absl::Status OddElement(const TensorSpec& tensor, const TensorParts& parts,
                        const std::vector<uint64_t>& element, uint64_t total) {
  std::vector<std::string> by;
  uint64_t flat = 0;
  for (size_t d = 0; d < element.size(); ++d) flat = flat * tensor.shape[d] + element[d];
  for (const RankBox& part : parts.boxes) {
    if (!Covers(part.box, element)) continue;
    by.push_back(absl::StrCat("rank ", part.rank, " in ", ToString(*part.given)));
  }
  const std::string what =
      absl::StrCat("element [", absl::StrJoin(element, ","), "] (flat index ", flat, " of ", total,
                   ") comes from ", by.size(), " contributors");
  if (by.empty()) return Invalid(tensor.name, absl::StrCat("gap: ", what));
  const std::string who = absl::StrCat(what, " (", absl::StrJoin(by, ", "), ")");
  if (parts.mode == Mode::kExactlyOnce) {
    return Invalid(tensor.name, absl::StrCat("overlap: ", who, "; exactly one is the limit"));
  }
  return Invalid(tensor.name,
                 absl::StrCat("uneven multiplicity: ", who, ", others from another number"));
}

// Refuses a tensor whose elements have a wrong number of contributors. Needs CheckRankOverlap
// before.
absl::Status CheckCover(const TensorSpec& tensor, const TensorParts& parts, int64_t* work) {
  const uint64_t total = *ElementCount(tensor.shape);  // AddContribution has checked the shape
  // In the common case every rank covers the whole tensor. That needs no sweep: the boxes of one
  // rank are disjoint, so it suffices to count their elements.
  std::vector<const Box*> boxes;
  Rank rank = -1;
  uint64_t rank_sum = 0;
  int64_t whole_ranks = 0, ranks = 0;
  for (const RankBox& part : parts.boxes) {
    if (part.rank != rank) rank = part.rank, rank_sum = 0, ++ranks;
    rank_sum += BoxElementCount(part.box);
    whole_ranks += rank_sum == total;
    boxes.push_back(&part.box);
  }
  const int64_t limit = parts.mode == Mode::kExactlyOnce ? 1 : INT64_MAX;
  const bool is_disjoint = *work <= kMaxLayoutWork;  // CheckRankOverlap saw every pair
  if (is_disjoint && ranks > 0 && ranks == whole_ranks && ranks <= limit) return absl::OkStatus();
  std::vector<uint64_t> odd;
  if (UniformMultiplicity(tensor.shape, boxes, limit, &odd, work) > 0) return absl::OkStatus();
  if (*work > kMaxLayoutWork) {
    return absl::ResourceExhaustedError(
        absl::StrCat("tensor ", tensor.name, ": layout too intricate to check within ",
                     kMaxLayoutWork, " box visits; use fewer or more regular boxes"));
  }
  return OddElement(tensor, parts, odd, total);
}

}  // namespace

Digest DigestContributions(const std::vector<Contribution>& contributions) {
  DigestBuilder builder;
  builder.Add(contributions.size());
  for (const Contribution& part : contributions) {
    builder.Add(part.tensor).Add(static_cast<uint64_t>(part.mode)).Add(part.boxes.size());
    for (const Box& box : part.boxes) {
      builder.Add(box.offset.size());
      for (uint64_t at : box.offset) builder.Add(at);
      for (uint64_t length : box.extent) builder.Add(length);
    }
  }
  return builder.Finish();
}

Digest DigestLayout(const std::vector<std::vector<Contribution>>& by_rank) {
  DigestBuilder builder;
  builder.Add(by_rank.size());
  for (const auto& contributions : by_rank) builder.Add(DigestContributions(contributions));
  return builder.Finish();
}

namespace {

uint64_t VarintBytes(uint64_t value) {
  uint64_t bytes = 1;
  for (; value >= 0x80; value >>= 7) ++bytes;
  return bytes;
}

// A field of these bytes, with its tag and length.
uint64_t FieldBytes(uint64_t content) { return 1 + VarintBytes(content) + content; }

uint64_t PackedBytes(const std::vector<uint64_t>& values) {
  uint64_t content = 0;
  for (const uint64_t value : values) content += VarintBytes(value);
  return values.empty() ? 0 : FieldBytes(content);
}

uint64_t ContributionBytes(const Contribution& part) {
  uint64_t bytes = 0;
  if (part.tensor != 0) bytes += 1 + VarintBytes(static_cast<uint64_t>(part.tensor));
  if (part.mode != Mode::kSum) bytes += 2;
  for (const Box& box : part.boxes)
    bytes += FieldBytes(PackedBytes(box.offset) + PackedBytes(box.extent));
  return bytes;
}

}  // namespace

uint64_t EncodedBytes(const Layout& layout) {
  uint64_t bytes = 0;
  for (const std::vector<Contribution>& rank : layout.by_rank) {
    uint64_t content = 0;
    for (const Contribution& part : rank) content += FieldBytes(ContributionBytes(part));
    bytes += FieldBytes(content);
  }
  return bytes;
}

uint64_t HeldBytes(const std::vector<Contribution>& contributions) {
  constexpr uint64_t kAllocation = 16;  // the allocator's header and rounding
  uint64_t bytes = sizeof(std::vector<Contribution>) + kAllocation;
  for (const Contribution& part : contributions) {
    bytes += sizeof(part) + kAllocation;
    for (const Box& box : part.boxes)
      bytes += sizeof(box) + 2 * kAllocation +
               sizeof(uint64_t) * (box.offset.capacity() + box.extent.capacity());
  }
  return bytes;
}

absl::Status ValidateLayout(const std::vector<TensorSpec>& tensors, const Layout& layout) {
  std::vector<TensorParts> parts(tensors.size());
  for (Rank rank = 0; rank < layout.world_size(); ++rank) {
    std::vector<bool> seen(tensors.size(), false);
    for (const Contribution& part : layout.by_rank[rank]) {
      if (part.tensor < 0 || part.tensor >= static_cast<TensorId>(tensors.size())) {
        return absl::InvalidArgumentError(absl::StrCat(
            "rank ", rank, " contributes to tensor number ", part.tensor, " of ", tensors.size()));
      }
      const TensorSpec& tensor = tensors[part.tensor];
      if (seen[part.tensor]) {
        return Invalid(tensor.name, absl::StrCat("rank ", rank, " contributes twice"));
      }
      seen[part.tensor] = true;
      absl::Status status = AddContribution(tensor, rank, part, &parts[part.tensor]);
      if (!status.ok()) return status;
    }
  }
  int64_t work = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].receives_gradient) continue;
    if (!parts[i].mentioned) return Invalid(tensors[i].name, "gap: no contributor mentions it");
    if (parts[i].mode == Mode::kNone) continue;
    absl::Status status = CheckRankOverlap(tensors[i], &parts[i], &work);
    if (status.ok()) status = CheckCover(tensors[i], parts[i], &work);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

std::vector<ExpectedPiece> ExpectedPieces(const std::vector<TensorSpec>& tensors,
                                          const ShardSpec& shard, const Layout& layout) {
  std::vector<ExpectedPiece> pieces;
  for (Rank rank = 0; rank < layout.world_size(); ++rank) {
    for (const Contribution& part : layout.by_rank[rank]) {
      if (part.tensor != shard.tensor) continue;
      for (size_t region = 0; region < part.boxes.size(); ++region) {
        const Range piece = BoxPart(part.boxes[region], tensors[shard.tensor].shape, shard.range);
        if (piece.empty()) continue;
        pieces.push_back({rank, static_cast<int32_t>(region), piece});
      }
    }
  }
  return pieces;
}

}  // namespace orlop::step
