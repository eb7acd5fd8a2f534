// bench flush: the seconds of a flush of a running job, and the pause that its trainer sees, beside
// a plain write of the same number of bytes. The job has AdamW with 8-bit state on one server. Its
// trainer makes one step after another. Every round has
//   1  steps with no flush
//   2  three plain writes: each is write() of 1 MiB at a time into a new file, and one fdatasync.
//      The first one is not measured.
//   3  a flush, from the request to the answer, and the steps that begin meanwhile
// The baseline is the mean of the two measured plain writes. Their ratio, `flush.plain.again`,
// shows how steady the disk is. The files are in the directory that has the server's data
// directory.
//
// Just before a plain write or a flush is measured, the file of the plain write before is removed.
// So each of them finds the same amount of memory that was just freed. A virtual machine may give
// free memory back to its host after a while, and page cache that has to be taken from there again
// costs several times as much as the write itself.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "bench/bench.h"
#include "bench/job.h"
#include "client/client.h"
#include "orlop/v1/admin.pb.h"

namespace orlop::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kServers = 1;
constexpr int kMebibytes = 256;
// Bytes of state for each byte of bf16 weights, rounded down so that a job has no less than asked.
constexpr uint64_t kStateBytesPerWeightByte = 3;
constexpr uint64_t kWriteBytes = 1 << 20;
constexpr int kQuietSteps = 3;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The seconds of one round.
struct Round {
  double plain_first = 0, plain_second = 0;
  double flush = 0;
  double step = 0;   // median of the steps with no flush
  double pause = 0;  // by which the longest step beside the flush exceeds `step`
  double lost = 0;   // by which all steps beside the flush exceed `step`, added up
};

absl::Status WriteAndSync(int file, absl::Span<const char> source, uint64_t bytes) {
  for (uint64_t written = 0; written < bytes;) {
    const uint64_t at = written % source.size();
    const ssize_t count =
        write(file, &source[at], std::min({kWriteBytes, source.size() - at, bytes - written}));
    if (count < 0) return absl::ErrnoToStatus(errno, "plain write");
    written += static_cast<uint64_t>(count);
  }
  return fdatasync(file) == 0 ? absl::OkStatus() : absl::ErrnoToStatus(errno, "fdatasync");
}

// Writes `bytes` bytes into a new file and returns the seconds until they were on disk. The file
// has the bytes of `source` over and over.
absl::StatusOr<double> PlainWrite(const std::string& path, absl::Span<const char> source,
                                  uint64_t bytes) {
  const Clock::time_point start = Clock::now();
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file < 0) return absl::ErrnoToStatus(errno, path);
  absl::Status status = WriteAndSync(file, source, bytes);
  const double seconds = SecondsSince(start);
  close(file);
  if (!status.ok()) return status;
  return seconds;
}

// Makes a step and returns its seconds, until its new weights are here.
absl::StatusOr<double> Step(BenchJob* job) {
  const Clock::time_point start = Clock::now();
  if (absl::Status status = job->Push(); !status.ok()) return status;
  if (absl::Status status = job->Commit(); !status.ok()) return status;
  if (absl::Status status = job->Pull(); !status.ok()) return status;
  return SecondsSince(start);
}

// Flushes the job and returns the seconds. Status: DataLoss if `step`, which is committed, or a
// later one is not on disk then.
absl::StatusOr<double> Flush(BenchJob* job, int64_t step) {
  const Clock::time_point start = Clock::now();
  const auto flushed = job->client()->FlushJob(BenchJob::kName);
  if (!flushed.ok()) return flushed.status();
  if (flushed->step() < step)
    return absl::DataLossError(absl::StrCat("step ", flushed->step(), " is on disk, not ", step));
  return SecondsSince(start);
}

// Makes steps until the flush, which another thread asks for, has ended.
absl::Status StepBesideFlush(BenchJob* job, Round* round) {
  std::atomic<bool> has_ended = false;
  absl::StatusOr<double> flush = 0.0;
  std::thread flusher([&, step = job->session()->state().committed_step] {
    flush = Flush(job, step);
    has_ended = true;
  });
  absl::Status status;
  do {
    const absl::StatusOr<double> step = Step(job);
    if (!step.ok()) {
      status = step.status();
      break;
    }
    round->pause = std::max(round->pause, *step - round->step);
    round->lost += *step - round->step;
  } while (!has_ended);
  flusher.join();
  if (!status.ok()) return status;
  if (!flush.ok()) return flush.status();
  round->flush = *flush;
  return absl::OkStatus();
}

absl::StatusOr<Round> Measure(BenchJob* job, uint64_t bytes) {
  Round round;
  std::vector<double> steps;
  for (int i = 0; i < kQuietSteps; ++i) {
    const auto step = Step(job);
    if (!step.ok()) return step.status();
    steps.push_back(*step);
  }
  round.step = Median(steps);
  const std::string path = absl::StrCat(job->servers_directory(), "/plain");
  double ignored = 0;
  for (double* seconds : {&ignored, &round.plain_first, &round.plain_second}) {
    const auto written = PlainWrite(path, job->pushed(), bytes);
    if (!written.ok()) return written.status();
    *seconds = *written;
    unlink(path.c_str());
  }
  if (absl::Status status = StepBesideFlush(job, &round); !status.ok()) return status;
  return round;
}

// Returns the bytes of all slots of the job, which a flush writes.
absl::StatusOr<uint64_t> StateBytes(client::Client* client) {
  const auto tensors = client->ListTensors(BenchJob::kName);
  if (!tensors.ok()) return tensors.status();
  uint64_t bytes = 0;
  for (const v1::TensorSummary& tensor : *tensors) bytes += tensor.rest_bytes();
  return bytes;
}

template <typename Value>
std::vector<double> Each(const std::vector<Round>& rounds, Value value) {
  std::vector<double> values;
  values.reserve(rounds.size());
  for (const Round& round : rounds) values.push_back(value(round));
  return values;
}

std::vector<Figure> Figures(const std::vector<Round>& rounds, double state_bytes,
                            double weight_bytes) {
  const double gigabytes = state_bytes / 1e9;
  const std::string plain = "plain write";
  const auto plain_seconds = [](const Round& r) { return (r.plain_first + r.plain_second) / 2; };
  const auto per_gigabyte = [&](auto seconds) {
    return Each(rounds, [=](const Round& r) { return seconds(r) / gigabytes; });
  };
  const auto speed = [&](auto seconds) {
    return Each(rounds, [=](const Round& r) { return gigabytes / seconds(r); });
  };
  const auto flush = [](const Round& r) { return r.flush; };
  const auto pause = [](const Round& r) { return r.pause; };
  const auto lost = [](const Round& r) { return r.lost; };
  const std::vector<double> plain_per_gigabyte = per_gigabyte(plain_seconds);
  return {{"flush.bytes", "MB", "lower", std::vector<double>(rounds.size(), state_bytes / 1e6),
           "weights in bf16", std::vector<double>(rounds.size(), weight_bytes / 1e6)},
          {"flush.seconds", "s", "lower", Each(rounds, flush), plain, Each(rounds, plain_seconds)},
          {"flush.speed", "GB/s", "higher", speed(flush), plain, speed(plain_seconds)},
          {"flush.pause", "s", "lower", Each(rounds, pause), "step with no flush",
           Each(rounds, [](const Round& r) { return r.step; })},
          {"flush.pause.per_gb", "s/GB", "lower", per_gigabyte(pause), plain, plain_per_gigabyte},
          {"flush.lost.per_gb", "s/GB", "lower", per_gigabyte(lost), plain, plain_per_gigabyte},
          {"flush.plain.again", "s", "lower",
           Each(rounds, [](const Round& r) { return r.plain_second; }), plain,
           Each(rounds, [](const Round& r) { return r.plain_first; })}};
}

}  // namespace

absl::StatusOr<std::vector<Figure>> BenchFlush(const Options& options) {
  const uint64_t asked = static_cast<uint64_t>(options.mebibytes.value_or(kMebibytes)) << 20;
  // The state, the gradients of a step and 4 GiB for all else, so that no slot has to leave memory.
  const std::string memory = absl::StrCat(4 + (asked >> 29), "GiB");
  auto job = BenchJob::Create(kServers, asked / kStateBytesPerWeightByte, memory, options.data_dir);
  if (!job.ok()) return job.status();
  const auto bytes = StateBytes((*job)->client());
  if (!bytes.ok()) return bytes.status();
  std::vector<Round> rounds;
  // Round -1 warms up: its times are not kept.
  for (int i = -1; i < options.repetitions; ++i) {
    const auto round = Measure(job->get(), *bytes);
    if (!round.ok()) return round.status();
    if (i >= 0) rounds.push_back(*round);
  }
  return Figures(rounds, static_cast<double>(*bytes), static_cast<double>((*job)->bytes()));
}

}  // namespace orlop::bench
