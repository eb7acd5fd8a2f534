// The inside of the simulator: hosts, workers and the events between them. See simulator.h.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <queue>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/step/leader.h"
#include "server/step/participant.h"
#include "tests/oracle.h"
#include "tests/simulator.h"

namespace orlop::step {

inline constexpr int64_t kFaultsEndMs = 1500;
inline constexpr int kMaxWorkers = 4;
inline constexpr char kDamageText[] = "a slot cannot be read";

class Random {
 public:
  explicit Random(uint64_t seed) : state_(MixBits(seed, 77)) {}
  uint64_t Next() { return state_ = MixBits(state_, 1); }
  int64_t Below(int64_t limit) { return static_cast<int64_t>(Next() >> 8) % limit; }
  bool OneIn(int64_t count) { return Below(count) == 0; }

 private:
  uint64_t state_;
};

using Values = std::vector<uint64_t>;

// What a shard's staged bytes came to: the sum, or what a LOAD sets.
struct Staged {
  int64_t step = -1;
  int64_t attempt = 0;
  bool is_load = false;
  Values gradient;
};

// Bytes that survive a process. `journal` and `epoch` hold synced writes only.
struct Disk {
  int64_t epoch = 0;
  int64_t incarnation = 0;
  struct Entry {
    JournalRecord record;
    std::vector<Staged> staged;  // kPrepared: by local shard
  };
  std::vector<Entry> journal;
  // The state that the journal starts from.
  std::vector<ShardReport> base;
  DecisionPtr base_decision;
  std::vector<Values> base_values;
  struct Flush {
    RecoverReport::Flush id;
    DecisionPtr decision;
    std::vector<Values> values;
  };
  std::vector<Flush> flushes;  // oldest first, at most two
  struct CleanStop {
    ParticipantImage image;
    std::vector<Values> values;
    std::vector<Staged> staged;
  };
  std::optional<CleanStop> clean_stop;
};

struct Host {
  int life = 0;  // raised by every start and crash: completions of an older life are nobody's
  bool is_up = false;
  std::unique_ptr<Participant> participant;
  std::unique_ptr<Leader> leader;
  Disk disk;
  std::vector<ShardId> shards;
  std::vector<Values> values;                        // by local shard
  std::vector<Staged> staged;                        // by local shard, of the attempt under way
  std::vector<std::function<void(Disk*)>> unsynced;  // writes in order, not yet on disk
  // The decision that this host's leader last sent for preparation, and in which epoch.
  int64_t decided_step = kLoading;
  int64_t decided_epoch = 0;
  bool is_stopping = false;
  Digest room;               // the layout that it has room for
  Digest refused;            // the one it last had no room for
  int64_t leader_start = 0;  // of all leaders' starts, which one `leader` is
};

enum class Asked : uint8_t { kIssue, kJoin, kPush, kCommit, kAbort, kPull, kHold, kRollback };
struct Call {
  int worker = -1;
  Asked asked = Asked::kJoin;
  size_t piece = 0;
  int64_t generation = 0, step = 0, attempt = 0;
  int64_t until_ms = 0;   // a Hold's
  bool is_again = false;  // asked before, the answer was lost or late
  int life = 0;           // of the worker
  std::string client;     // a Join's
};

struct WorkPiece {
  ShardId shard = 0;
  uint64_t region = 0;
  bool acked = false;
  int64_t retry_ms = 0;
  bool is_sent = false;
};

struct Worker {
  Rank rank = 0;
  int life = 0;  // raised by a crash: answers to an older life reach nobody
  int64_t down_until_ms = 0;
  bool is_joined = false;
  int64_t generation = 0;
  Position position;
  int64_t max_committed = -1;
  std::vector<WorkPiece> pieces;
  bool commit_sent = false;
  int64_t retry_ms = 0;  // the pending Join or CommitStep is given up then
  int refusals = 0;      // for lack of room, of this attempt
  bool wants_abort = false;
};

class Simulation {
 public:
  explicit Simulation(uint64_t seed) : seed_(seed), random_(seed) {}
  SimulationResult Run();

 private:
  struct Event {
    int64_t at;
    uint64_t order;
    std::function<void()> run;
    bool operator<(const Event& other) const {
      return std::pair(at, order) > std::pair(other.at, other.order);
    }
  };

  void Build();
  void At(int64_t delay_ms, std::function<void()> run) {
    events_.push({now_ + delay_ms, order_++, std::move(run)});
  }
  // Runs later unless the host has crashed or restarted since.
  void OnHost(ServerId server, int64_t delay_ms, std::function<void(Host&)> run) {
    const int life = hosts_[server].life;
    At(delay_ms, [this, server, life, run = std::move(run)] {
      if (hosts_[server].life == life) run(hosts_[server]);
    });
  }
  void Meet(Met met) { ++result_.met[static_cast<size_t>(met)]; }
  bool FaultsOn() const { return now_ < kFaultsEndMs; }
  int64_t NetworkDelay();
  // The network: loses a message, repeats it, delays it. `repeated` runs before a repetition.
  void Carry(std::function<void()> deliver, std::function<void()> repeated = nullptr);

  // Hosts
  void Start(ServerId server);
  void StartLeader(ServerId server);
  void ReadJournal(Host* host, ParticipantImage* image);
  void Crash(ServerId server, bool lose_disk);
  void Stop(ServerId server);
  void Exit(ServerId server);  // the process of a clean stop ends
  void MeetCrash(const Host& host);
  void Perform(ServerId server, Actions* actions);
  void Do(ServerId server, Send& action);
  void Do(ServerId server, Answer& action);
  void Do(ServerId server, PersistEpoch& action);
  void Do(ServerId server, PersistDecision& action);
  void Do(ServerId server, PersistDiscard& action);
  void Do(ServerId server, TakeLayout& action);
  void Do(ServerId server, StageShard& action);
  void Do(ServerId server, DropStaged& action);
  void Do(ServerId server, StartApply& action);
  void Do(ServerId server, ForwardBytes& action);
  void Do(ServerId server, Serve& action);
  void Do(ServerId server, FetchShard& action);
  void Do(ServerId server, LoadFlush& action);
  void Do(ServerId server, WriteFlush& action);
  void Do(ServerId server, PersistRecord& action);
  void Sync(ServerId server, std::function<void(Disk*)> write, std::function<void(Host&)> done);
  void Deliver(ServerId from, ServerId to, const Message& message);
  void CheckRoom(const Host& host, const PushPiece& piece);
  void CheckReason(const Message& message, const Actions& actions);
  void DeliverForward(ServerId from, ServerId to, Forward forward);
  int Local(const Host& host, ShardId shard) const;
  Staged Reduce(const Host& host, const StageShard& action, ShardStaged* result) const;
  void ApplyTo(Values* values, ShardId shard, const DecisionRecord& decision, const Staged& staged);
  bool AllInSync() const;
  bool MayLose(ServerId server) const;
  bool MayDamage(ServerId server) const;
  void Damage(ServerId server, const StartApply& action);
  void NoteDamage(const absl::Status& status);
  void HealDamage();
  void OnPrepareSent(ServerId from, ServerId to, const Prepare& prepare);
  void CrashSoon(ServerId server, int64_t delay_ms);
  void MeetRecord(const JobRecord& record);

  // Workers
  void Tick();
  void TickWorker(Worker* worker);
  void TickOperator();
  void TickRollback();
  void FindLost();
  void Fault();
  void LosePower();
  void StopAll();
  void CrashWorker(Worker* worker);
  // As many workers as the generation has; drawn anew for each.
  int WorldSize(int64_t generation) const;
  void Ask(ServerId server, Call call, std::function<void(RequestId, Host&, Actions*)> ask);
  void OnAnswer(const Call& call, const Answer& answer, int64_t leader_start);
  void OnJoined(const Call& call, const Answer& answer, Worker* worker);
  void OnPushed(const Call& call, const Answer& answer, Worker* worker);
  void OnCommitted(const Call& call, const Answer& answer, Worker* worker);
  bool IsCurrent(const Call& call, const Answer& answer, const Worker& worker) const;
  void MeetDecision(const DecisionRecord& decision);
  void PullSome(int64_t version);
  void Rejoin(Worker* worker);
  void StartStep(Worker* worker, const Position& position);
  std::vector<Contribution> ContributionsOf(Rank rank, int64_t generation) const;
  JoinRequest BuildJoin(Rank rank, const std::string& client) const;
  void SendJoin(Worker* worker);
  void ClaimARank();
  void CheckHolder(const Call& call, int64_t leader_start);
  void SendPieces(Worker* worker);
  void SendCommit(Worker* worker);
  PushPiece BuildPiece(const Worker& worker, const WorkPiece& piece) const;
  void Fail(std::string what) {
    if (result_.failure.empty()) result_.failure = std::move(what);
  }
  bool IsFinished() const;
  bool IsAtRest() const;
  void CheckFinal();

  uint64_t seed_;
  Random random_;
  SimulationResult result_;
  std::shared_ptr<JobSpec> spec_;
  Workload workload_;
  std::unique_ptr<Oracle> oracle_;
  std::priority_queue<Event> events_;
  int64_t now_ = 0;
  uint64_t order_ = 0;
  std::vector<Host> hosts_;
  std::vector<Worker> workers_;
  JobRecord store_;
  int64_t next_incarnation_ = 0;
  ServerId leader_ = 0;
  int most_workers_ = 1;
  bool is_ending_ = false;  // no further step begins
  bool wants_generation_ = true;
  int64_t generation_ = 0;  // that rank 0 has broadcast
  int64_t generation_retry_ms_ = 0;
  int64_t target_step_ = 4;
  int64_t loss_percent_ = 0;
  int64_t rollback_retry_ms_ = 0;
  bool is_damage_told_ = false;  // to a worker or to the operator
  int64_t stuck_since_ms_ = 0;
  struct Held {
    int64_t step, epoch, until_ms;
  };
  std::vector<Held> holds_;            // that were granted
  std::map<int64_t, Digest> layouts_;  // by generation
  int64_t leader_starts_ = 0;
  // Who was told that it has joined, by leader, generation and rank.
  std::map<std::tuple<int64_t, int64_t, Rank>, std::string> holders_;
  std::map<RequestId, Call> calls_;
  RequestId next_request_ = 1;
};

}  // namespace orlop::step
