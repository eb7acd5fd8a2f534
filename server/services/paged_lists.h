// Lists that arrive in several messages, because one message has a limit: manifests and
// contribution layouts.
#pragma once

#include <chrono>
#include <map>
#include <optional>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/tiers/tier.h"

namespace orlop::server {

// Joins the pages of lists. A Key names a list. A Page is a protobuf message with the fields
// `first` (the place of its first tensor in the list), `more` (whether another page follows) and
// `tensors`. A client may repeat its latest pages, from any of them on. A list of several pages is
// kept, for repeats too, until no page has come for kMaxManifestPageAgeSeconds.
//   Memory   kept pages are counted in the server's budget (slot "lists").
//   Threads  all methods are safe from any thread.
template <typename Key, typename Page>
class PagedLists {
 public:
  // `tiers` must outlive this object.
  explicit PagedLists(Tiers* tiers) : tiers_(tiers) {}

  // Adds a page. Returns the whole list if this is its last page, else nullopt. May wait for the
  // disk if memory is short.
  //   Status  InvalidArgument: a page is missing before this one, or the list is over the limits;
  //           ResourceExhausted (BUDGET): no memory, or kMaxUnfinishedLists lists are kept
  absl::StatusOr<std::optional<Page>> Add(const Key& key, const Page& page) {
    if (page.first() == 0 && !page.more()) {
      MutexLock lock(&mutex_);
      lists_.erase(key);
      return page;
    }
    absl::StatusOr<Reservation> room = RoomFor(page);
    if (!room.ok()) return room.status();
    MutexLock lock(&mutex_);
    ForgetOldLocked();
    return Join(key, page, *std::move(room));
  }

  // Forgets lists of which no page has come for kMaxManifestPageAgeSeconds.
  void ForgetOld() {
    MutexLock lock(&mutex_);
    ForgetOldLocked();
  }

 private:
  struct List {
    Page joined;
    std::map<uint64_t, Reservation> room;        // of its pages, by their first
    std::chrono::steady_clock::time_point last;  // when its latest page came
  };
  // A list goes to other servers in one message, which leaves 1 MiB for its other fields.
  static constexpr size_t kMaxBytes = kMaxPeerMessageBytes - (1 << 20);

  absl::StatusOr<Reservation> RoomFor(const Page& page) {
    const uint64_t bytes = page.SpaceUsedLong();
    auto room = tiers_->Reserve({Tier::kDram, "", "lists"}, bytes);
    if (room.ok()) room->SetUsed(bytes).IgnoreError();  // cannot fail: these bytes are reserved
    return room;
  }

  void ForgetOldLocked() REQUIRES(mutex_) {
    const auto now = std::chrono::steady_clock::now();
    std::erase_if(lists_, [&](const auto& entry) {
      return now - entry.second.last > std::chrono::seconds(kMaxManifestPageAgeSeconds);
    });
  }

  absl::Status CheckPlace(const Page& page, bool is_known, uint64_t before) const REQUIRES(mutex_) {
    if (page.first() > before)
      return MakeError(absl::StatusCode::kInvalidArgument,
                       absl::StrCat("`first` is ", page.first(), "; the pages before have brought ",
                                    before, " tensors"),
                       v1::ErrorDetail::BAD_REQUEST);
    if (!is_known && lists_.size() >= kMaxUnfinishedLists)
      return MakeError(absl::StatusCode::kResourceExhausted,
                       absl::StrCat(lists_.size(), " other lists are under way; the limit is ",
                                    kMaxUnfinishedLists, "; an abandoned one ends after ",
                                    kMaxManifestPageAgeSeconds, " seconds"),
                       v1::ErrorDetail::BUDGET);
    return absl::OkStatus();
  }

  absl::StatusOr<std::optional<Page>> Join(const Key& key, const Page& page, Reservation room)
      REQUIRES(mutex_) {
    if (page.first() == 0) lists_.erase(key);
    const auto found = lists_.find(key);
    const bool is_known = found != lists_.end();
    const auto before = is_known ? static_cast<uint64_t>(found->second.joined.tensors_size()) : 0;
    if (absl::Status status = CheckPlace(page, is_known, before); !status.ok()) return status;
    auto& [joined, rooms, last] = lists_[key];
    rooms.erase(rooms.lower_bound(page.first()), rooms.end());  // of what this page replaces
    rooms.emplace(page.first(), std::move(room));
    last = std::chrono::steady_clock::now();
    joined.mutable_tensors()->DeleteSubrange(static_cast<int>(page.first()),
                                             static_cast<int>(before - page.first()));
    const size_t count =
        static_cast<size_t>(joined.tensors_size()) + static_cast<size_t>(page.tensors_size());
    if (count > kMaxTensors || joined.ByteSizeLong() + page.ByteSizeLong() > kMaxBytes) {
      lists_.erase(key);
      return MakeError(absl::StatusCode::kInvalidArgument,
                       absl::StrCat(count, " tensors in all; the limits are ", kMaxTensors, " and ",
                                    kMaxBytes, " bytes"),
                       v1::ErrorDetail::BAD_REQUEST);
    }
    joined.MergeFrom(page);
    joined.set_first(0);
    joined.set_more(page.more());
    if (page.more()) return std::nullopt;
    return joined;
  }

  Tiers* const tiers_;
  Mutex mutex_;
  std::map<Key, List> lists_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
