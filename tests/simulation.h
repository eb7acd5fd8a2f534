// This header has the internals of the simulator: its hosts (simulated servers), its workers, and
// the queue of events in virtual time. tests/simulator.h is the interface; "The simulator" in
// ARCHITECTURE.md explains what a schedule does.
//
// Everything runs in one thread. Times (`..._ms`) are milliseconds of virtual time since the start
// of the schedule; delays are milliseconds from now. A "local shard" of a host is a position in
// Host::shards.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <queue>
#include <set>
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

// After this time no fault is injected, so that the job must come to rest.
inline constexpr int64_t kFaultsEndMs = 1500;
inline constexpr int kMaxWorkers = 4;
// Injected damage is reported as a DataLoss status with this message. The simulator recognizes the
// status by it.
inline constexpr char kDamageText[] = "a slot cannot be read";

// A Random draws pseudo-random numbers; the same seed gives the same numbers.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(MixBits(seed, 77)) {}
  uint64_t Next() { return state_ = MixBits(state_, 1); }
  // Returns a number in [0, limit). `limit` is at least 1.
  int64_t Below(int64_t limit) { return static_cast<int64_t>(Next() >> 8) % limit; }
  bool OneIn(int64_t count) { return Below(count) == 0; }

 private:
  uint64_t state_;
};

// The elements of a shard are integers here.
using Values = std::vector<uint64_t>;

// A Staged holds what one shard has staged in one attempt.
struct Staged {
  int64_t step = -1;  // -1: nothing is staged
  int64_t attempt = 0;
  bool is_load = false;
  Values gradient;  // the sum over contributors; for a LOAD, the values that the shard is set to
};

// A Disk holds the bytes of a host that survive its process. Writes that are not synced yet are in
// Host::unsynced.
struct Disk {
  int64_t epoch = 0;
  int64_t incarnation = 0;
  struct Entry {
    JournalRecord record;
    std::vector<Staged> staged;  // by local shard; of a kPrepared record only
  };
  std::vector<Entry> journal;
  // The state that the journal's records are applied to, by local shard. If `base` is empty, it is
  // the state before the first LOAD.
  std::vector<ShardReport> base;
  DecisionPtr base_decision;
  std::vector<Values> base_values;
  // A Flush is all state of the host at one step. A rollback restores it.
  struct Flush {
    RecoverReport::Flush id;
    DecisionPtr decision;
    std::vector<Values> values;  // by local shard
  };
  std::vector<Flush> flushes;  // newest first
  // A CleanStop is what a clean stop wrote. The next start takes it.
  struct CleanStop {
    ParticipantImage image;
    std::vector<Values> values;  // by local shard
    std::vector<Staged> staged;  // by local shard
  };
  std::optional<CleanStop> clean_stop;
};

// A Host is one simulated server.
struct Host {
  int life = 0;  // raised by every start, crash and exit; events of an older life are dropped
  bool is_up = false;
  std::unique_ptr<Participant> participant;
  std::unique_ptr<Leader> leader;  // null: none runs here. After a takeover, two hosts have one
  Disk disk;
  std::vector<ShardId> shards;                       // it has a copy of these; ascending
  std::vector<Values> values;                        // by local shard
  std::vector<Staged> staged;                        // by local shard, of the open attempt
  std::vector<std::function<void(Disk*)>> unsynced;  // oldest first; a crash may lose the newest
  // The step and the epoch of the last Prepare that this host's leader sent. kLoading: none.
  int64_t decided_step = kLoading;
  int64_t decided_epoch = 0;
  bool is_stopping = false;
  Digest room;                           // the layout that the host has reserved room for
  Digest refused;                        // the last layout that the host refused for lack of room
  std::vector<PieceKey> refused_pieces;  // its machine knows them, its store could not keep them
  int64_t leader_start = 0;              // number of the start of `leader`, counted over all hosts
};

// These are the kinds of calls. kIssue is the Join that asks for a new generation.
enum class Asked : uint8_t {
  kIssue,
  kJoin,
  kPush,
  kCommit,
  kAbort,
  kPull,
  kHold,
  kRollback,
  kFlush
};
// A Call is a call to a server. The simulator keeps it until the answer arrives.
struct Call {
  int worker = -1;  // the rank of the caller; -1: the operator, or an impostor (ClaimARank)
  Asked asked = Asked::kJoin;
  size_t piece = 0;  // of a push: position in Worker::pieces; of an impostor: the rank it claims
  int64_t generation = 0, step = 0, attempt = 0;
  int64_t until_ms = 0;   // of a hold: its end
  bool is_again = false;  // the worker repeats a call whose answer was lost or late
  int life = 0;           // Worker::life at the call
  std::string client;     // of a Join: the name of the client
};

// A WorkPiece is a piece that a worker has to push in the open attempt.
struct WorkPiece {
  ShardId shard = 0;
  uint64_t region = 0;  // 0 for a gradient; any other number for a LOAD
  bool acked = false;
  int64_t retry_ms = 0;  // if it is not acknowledged by then, it is pushed again
  bool is_sent = false;  // it was pushed before
};

struct Worker {
  Rank rank = 0;
  int life = 0;  // raised by a crash; answers to an older life are dropped
  int64_t down_until_ms = 0;
  bool is_joined = false;
  int64_t generation = 0;
  Position position;           // as the last Join or CommitStep answered
  int64_t max_committed = -1;  // the newest committed step that it knows of
  std::vector<WorkPiece> pieces;
  bool commit_sent = false;
  int64_t retry_ms = 0;      // if the Join or CommitStep has no answer by then, it is sent again
  int refusals = 0;          // pushes of this attempt that were refused for lack of room
  bool wants_abort = false;  // its next tick calls AbortStep
};

// A Simulation runs one schedule. Call Run once.
class Simulation {
 public:
  explicit Simulation(uint64_t seed)
      : seed_(seed), random_(seed), shortage_(~seed), stage_(MixBits(seed, 78)) {}
  SimulationResult Run();

 private:
  struct Event {
    int64_t at;      // ms
    uint64_t order;  // events of the same ms run in the order in which they were scheduled
    std::function<void()> run;
    // A priority queue returns the greatest element first, so the earliest event is the greatest.
    bool operator<(const Event& other) const {
      return std::pair(at, order) > std::pair(other.at, other.order);
    }
  };

  // Draws the job and the cluster from the seed.
  void Build();
  // Schedules an event after a delay.
  void At(int64_t delay_ms, std::function<void()> run) {
    events_.push({now_ + delay_ms, order_++, std::move(run)});
  }
  // Schedules an event of one host, which is dropped if the host crashes or restarts before.
  void OnHost(ServerId server, int64_t delay_ms, std::function<void(Host&)> run) {
    const int life = hosts_[server].life;
    At(delay_ms, [this, server, life, run = std::move(run)] {
      if (hosts_[server].life == life) run(hosts_[server]);
    });
  }
  // Counts one thing that this schedule has met.
  void Meet(Met met) { ++result_.met[static_cast<size_t>(met)]; }
  bool FaultsOn() const { return now_ < kFaultsEndMs; }
  int64_t NetworkDelay();  // draws a delay
  // Sends a message: the network delays it, and may lose it or deliver it twice. `repeated` is
  // called before the second delivery.
  void Carry(std::function<void()> deliver, std::function<void()> repeated = nullptr);

  // ---- Hosts ----
  void Start(ServerId server);
  void StartLeader(ServerId server);
  // Replays the journal of a host into its values and into the image of its participant.
  void ReadJournal(Host* host, ParticipantImage* image);
  // Ends the process of a host, which starts again later. A prefix of its unsynced writes is kept.
  void Crash(ServerId server, bool lose_disk);
  // Begins a clean stop; Exit ends the process once the participant has stopped.
  void Stop(ServerId server);
  void Exit(ServerId server);
  void MeetCrash(const Host& host);
  // Carries out the actions that a step machine of the host returned; each Do carries out one.
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
  void Do(ServerId server, KeepFlushes& action);
  void Do(ServerId server, PersistRecord& action);
  // Writes to the disk of a host. `done` is called when the write is synced; a crash before that
  // may lose the write, and drops the call.
  void Sync(ServerId server, std::function<void(Disk*)> write, std::function<void(Host&)> done);
  void Deliver(ServerId from, ServerId to, const Message& message);
  // Keeps a piece that the machine has taken. Returns false if the store refuses it: the caller
  // gets an error, and its shard cannot be staged. Fails the schedule if there is no room for the
  // layout of the piece's generation.
  bool KeepPiece(Host* host, const PushPiece& piece);
  // Returns whether the machine knows a piece of the shard that the store refused.
  bool HasRefused(const Host& host, ShardId shard) const;
  // Fails the schedule if `message` reports a failure and `actions` answer a CommitStep with an
  // error that does not name it.
  void CheckReason(const Message& message, const Actions& actions);
  void DeliverForward(ServerId from, ServerId to, Forward forward);
  // Returns the local shard. The host has a copy of the shard.
  int Local(const Host& host, ShardId shard) const;
  // Returns what the action stages, and sets `result` to the report for the participant.
  Staged Reduce(const Host& host, const StageShard& action, ShardStaged* result) const;
  // Makes the next version of a shard in `values`. `staged` is ignored if it is of another attempt.
  void ApplyTo(Values* values, ShardId shard, const DecisionRecord& decision, const Staged& staged);
  // Returns whether every host is up and undamaged, every copy is in sync, and the leader serves.
  bool AllInSync() const;
  // Returns whether the job's level promises to survive a crash of this server now; level MEMORY
  // survives it by a rollback.
  bool MayLose(ServerId server) const;
  // Returns whether damage on this server may be injected: a restart of the server would repair it.
  bool MayDamage(ServerId server) const;
  // Overwrites the shard with bytes of no version, and reports that the apply found damage.
  void Damage(ServerId server, const StartApply& action);
  // Notes if a caller has received the status of injected damage.
  void NoteDamage(const absl::Status& status);
  // Once somebody knows of the damage, restarts the damaged servers.
  void HealDamage();
  void OnPrepareSent(ServerId from, ServerId to, const Prepare& prepare);
  // May crash the server after the delay. Called where a crash is most likely to find a bug.
  void CrashSoon(ServerId server, int64_t delay_ms);
  void MeetRecord(const JobRecord& record);

  // ---- Workers, the operator and faults ----
  void Tick();  // every 20 ms
  void TickWorker(Worker* worker);
  void TickOperator();
  // Accepts the newest rollback that the leader offers (level MEMORY).
  void TickRollback();
  // Has the servers write the committed step to their disks.
  void AskForFlush();
  // Takes note of the newest step of which every server has a flush.
  void FindCommonFlush();
  // Ends the schedule with a lost job. Fails it if the job could have been restored.
  void FindLost();
  void Fault();      // injects one random fault
  void LosePower();  // crashes every host
  void StopAll();
  void CrashWorker(Worker* worker);
  // Returns the number of workers of a generation, which is drawn for each generation.
  int WorldSize(int64_t generation) const;
  // Sends a call to a server. `ask` passes it to a step machine when it arrives.
  void Ask(ServerId server, Call call, std::function<void(RequestId, Host&, Actions*)> ask);
  void OnAnswer(const Call& call, const Answer& answer, int64_t leader_start);
  void OnJoined(const Call& call, const Answer& answer, Worker* worker);
  void OnPushed(const Call& call, const Answer& answer, Worker* worker);
  void OnCommitted(const Call& call, const Answer& answer, Worker* worker);
  bool IsCurrent(const Call& call, const Answer& answer, const Worker& worker) const;
  void MeetDecision(const DecisionRecord& decision);
  void PullSome(int64_t version);  // pulls a random shard
  void Rejoin(Worker* worker);
  void StartStep(Worker* worker, const Position& position);
  std::vector<Contribution> ContributionsOf(Rank rank, int64_t generation) const;
  JoinRequest BuildJoin(Rank rank, const std::string& client) const;
  void SendJoin(Worker* worker);
  // Sends a Join of another client, as a rank that a worker has or may soon have.
  void ClaimARank();
  // Fails the schedule if one leader has let two clients join as the same rank of a generation.
  void CheckHolder(const Call& call, int64_t leader_start);
  void SendPieces(Worker* worker);
  void SendCommit(Worker* worker);
  PushPiece BuildPiece(const Worker& worker, const WorkPiece& piece) const;
  // Ends the schedule with a failure. The first one is kept.
  void Fail(std::string what) {
    if (result_.failure.empty()) result_.failure = std::move(what);
  }
  // Returns whether faults have ended and the last step is acknowledged.
  bool IsFinished() const;
  // Returns whether the job serves and every copy has applied the committed step.
  bool IsAtRest() const;
  // Compares every in-sync copy with the oracle's replay.
  void CheckFinal();

  uint64_t seed_;
  Random random_;
  Random shortage_;  // whether a disk has room for one flush more
  Random stage_;     // whether the job has a buffer, and which pieces the stores refuse
  SimulationResult result_;
  std::shared_ptr<JobSpec> spec_;
  Workload workload_;
  std::unique_ptr<Oracle> oracle_;
  std::priority_queue<Event> events_;
  int64_t now_ = 0;
  uint64_t order_ = 0;
  std::vector<Host> hosts_;
  std::vector<Worker> workers_;
  JobRecord store_;  // the job record, in a store that survives every fault
  int64_t next_incarnation_ = 0;
  ServerId leader_ = 0;     // the host whose leader the workers call
  int most_workers_ = 1;    // the largest number of workers of any generation
  bool is_ending_ = false;  // workers begin no further step
  bool wants_generation_ = true;
  int64_t generation_ = 0;  // the newest one that the workers know; 0: none
  int64_t generation_retry_ms_ = 0;
  int64_t target_step_ = 4;  // the last step of the schedule
  int64_t loss_percent_ = 0;
  int64_t rollback_retry_ms_ = 0;
  // The newest step of which every server has had a flush at one time, or of which a flush was
  // acknowledged. A job at level MEMORY never goes back behind it.
  int64_t common_flush_ = kLoading;
  bool is_damage_told_ = false;  // a worker or the operator knows of damage
  int64_t stuck_since_ms_ = 0;   // when the job last served, or some host was down
  struct Held {
    int64_t step, epoch, until_ms;
  };
  std::vector<Held> holds_;            // the holds that a leader granted
  std::map<int64_t, Digest> layouts_;  // by generation
  int64_t leader_starts_ = 0;
  // The client whose Join succeeded, by leader start, generation and rank.
  std::map<std::tuple<int64_t, int64_t, Rank>, std::string> holders_;
  std::map<RequestId, Call> calls_;     // the calls without an answer yet
  std::set<RequestId> refused_pushes_;  // whose answer is an error, whatever the machine says
  RequestId next_request_ = 1;
};

}  // namespace orlop::step
