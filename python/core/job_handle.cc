// The classes JobHandle and Push of the Python extension. JobHandle is client::Session, one
// worker's connection to one job. The comments of client/session.h are the contracts of its
// methods; python/orlop/_core.pyi has their Python types. Every call that may block releases the
// GIL. Errors are raised as python/core/status.h says.
//   Parts      lists of tuples, see python/core/parts.h. Their arrays are not copied.
//   Messages   dictionaries, see python/core/message.h
//   Transfers  push and set_state return payload bytes, pull returns (version, payload bytes)
//   Times      seconds
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "client/session.h"
#include "orlop/v1/job.pb.h"
#include "python/core/gil.h"
#include "python/core/message.h"
#include "python/core/module.h"
#include "python/core/owned.h"
#include "python/core/parts.h"
#include "python/core/status.h"

namespace orlop::python {
namespace nb = nanobind;
using namespace nb::literals;
using JobHandle = client::Session;

namespace {

// A push that was started by push_async. It holds the arrays that the push reads. The destructor
// waits for the push.
class Push {
 public:
  Push(std::unique_ptr<client::PendingPush> pending, HeldParts<client::PushPart> held)
      : held_(std::move(held)), pending_(std::move(pending)) {}
  ~Push() {
    WithoutGil([&] { pending_.reset(); });  // waits until the push no longer reads the arrays
  }

  uint64_t Wait() {
    return ValueOrThrow(WithoutGil([&] { return pending_->Wait(); })).bytes;
  }
  bool done() const { return pending_->done(); }
  void Cancel() {
    WithoutGil([&] { pending_->Cancel(); });
  }

 private:
  HeldParts<client::PushPart> held_;
  std::unique_ptr<client::PendingPush> pending_;
};

// The fields of client::StepState under their own names.
nb::dict StateOf(const client::StepState& state) {
  nb::dict fields;
  fields["epoch"] = state.epoch;
  fields["generation"] = state.generation;
  fields["rank"] = state.rank;
  fields["committed_step"] = state.committed_step;
  fields["attempt"] = state.attempt;
  return fields;
}

nb::list TensorsOf(const Owned<JobHandle>& self) {
  nb::list tensors;
  for (const auto& tensor : self->manifest().tensors()) tensors.append(ToPython(tensor));
  return tensors;
}

Owned<Push> PushAsync(Owned<JobHandle>& self, nb::list parts, double loss_scale) {
  auto held = PushPartsOf(parts);
  auto pending =
      WithoutGil([&] { return self->PushAsync(held.parts, {.loss_scale = loss_scale}); });
  return Owned(std::make_unique<Push>(ValueOrThrow(std::move(pending)), std::move(held)));
}

uint64_t SetState(Owned<JobHandle>& self, nb::list parts) {
  auto held = PushPartsOf(parts);
  return ValueOrThrow(WithoutGil([&] { return self->SetState(held.parts); })).bytes;
}

nb::tuple Pull(Owned<JobHandle>& self, nb::list parts, std::optional<int64_t> version,
               bool latest) {
  auto held = PullPartsOf(parts);
  auto transfer = ValueOrThrow(
      WithoutGil([&] { return self->Pull(held.parts, {.version = version, .latest = latest}); }));
  return nb::make_tuple(transfer.version, transfer.bytes);
}

nb::dict Join(Owned<JobHandle>& self, uint64_t generation, uint32_t rank, uint32_t world_size,
              nb::dict layout, std::optional<int64_t> min_committed_step) {
  client::JoinOptions options{.generation = generation,
                              .rank = rank,
                              .world_size = world_size,
                              .min_committed_step = min_committed_step};
  FromPython(layout, &options.layout);
  return StateOf(ValueOrThrow(WithoutGil([&] { return self->Join(options); })));
}

// `groups`: for each group of the optimizer its hyper-parameters by name.
nb::dict Commit(Owned<JobHandle>& self, bool load, nb::list groups,
                std::vector<uint32_t> absent_tensors, double loss_scale) {
  client::CommitOptions options;
  options.kind = load ? v1::CommitStepRequest::LOAD : v1::CommitStepRequest::STEP;
  for (nb::handle values : groups) {
    nb::dict fields;
    fields["values"] = values;
    FromPython(fields, &options.groups.emplace_back());
  }
  options.absent_tensors = std::move(absent_tensors);
  options.loss_scale = loss_scale;
  return ToPython(ValueOrThrow(WithoutGil([&] { return self->Commit(options); })));
}

nb::dict TimingsOf(const client::Timings& timings) {
  nb::dict fields;
  fields["push_bytes"] = timings.push_bytes;
  fields["pull_bytes"] = timings.pull_bytes;
  fields["push_seconds"] = timings.push_seconds;
  fields["pull_seconds"] = timings.pull_seconds;
  fields["commit_seconds"] = timings.commit_seconds;
  fields["retries"] = timings.retries;
  return fields;
}

nb::object GetOptimizer(Owned<JobHandle>& self) {
  auto configured = ValueOrThrow(WithoutGil([&] { return self->GetOptimizer(); }));
  if (!configured.has_value()) return nb::none();
  return ToPython(*configured);
}

bool ConfigureOptimizer(Owned<JobHandle>& self, nb::dict fields) {
  v1::ConfigureOptimizerRequest request;
  FromPython(fields, &request);
  return ValueOrThrow(WithoutGil([&] { return self->ConfigureOptimizer(std::move(request)); }));
}

}  // namespace

void BindJobHandle(nb::module_& module) {
  nb::class_<Owned<Push>>(module, "Push")
      .def("wait", [](Owned<Push>& self) { return self->Wait(); })
      .def_prop_ro("done", [](const Owned<Push>& self) { return self->done(); })
      .def("cancel", [](Owned<Push>& self) { self->Cancel(); });

  nb::class_<Owned<JobHandle>>(module, "JobHandle")
      .def_prop_ro("job", [](const Owned<JobHandle>& self) { return self->job(); })
      .def_prop_ro("existed", [](const Owned<JobHandle>& self) { return self->existed(); })
      .def_prop_ro("shard_elements",
                   [](const Owned<JobHandle>& self) { return self->manifest().shard_elements(); })
      .def_prop_ro("tensors", &TensorsOf)
      .def_prop_ro("state", [](const Owned<JobHandle>& self) { return StateOf(self->state()); })
      .def("configure_optimizer", &ConfigureOptimizer, "request"_a)
      .def("get_optimizer", &GetOptimizer)
      .def(
          "start_generation",
          [](Owned<JobHandle>& self, uint32_t world_size,
             std::optional<int64_t> min_committed_step) {
            return ValueOrThrow(
                WithoutGil([&] { return self->StartGeneration(world_size, min_committed_step); }));
          },
          "world_size"_a, "min_committed_step"_a = nb::none())
      .def("join", &Join, "generation"_a, "rank"_a, "world_size"_a, "layout"_a,
           "min_committed_step"_a = nb::none())
      .def("push_async", &PushAsync, "parts"_a, "loss_scale"_a = 1.0, nb::keep_alive<0, 1>())
      .def("set_state", &SetState, "parts"_a)
      .def("pull", &Pull, "parts"_a, "version"_a = nb::none(), "latest"_a = false)
      .def("commit", &Commit, "load"_a = false, "groups"_a = nb::list(),
           "absent_tensors"_a = std::vector<uint32_t>(), "loss_scale"_a = 1.0)
      .def(
          "abort",
          [](Owned<JobHandle>& self, const std::string& reason) {
            return ValueOrThrow(WithoutGil([&] { return self->Abort(reason); }));
          },
          "reason"_a)
      .def(
          "hold",
          [](Owned<JobHandle>& self, int64_t step, double seconds, const std::string& holder) {
            ThrowIfError(WithoutGil([&] {
              return self->Hold(step, client::Milliseconds(static_cast<int64_t>(seconds * 1000)),
                                holder);
            }));
          },
          "step"_a, "seconds"_a, "holder"_a)
      .def("status",
           [](Owned<JobHandle>& self) {
             return ToPython(ValueOrThrow(WithoutGil([&] { return self->Status(); })));
           })
      .def(
          "refresh",
          [](Owned<JobHandle>& self) { ThrowIfError(WithoutGil([&] { return self->Refresh(); })); })
      .def("take_timings", [](Owned<JobHandle>& self) { return TimingsOf(self->TakeTimings()); });
}

}  // namespace orlop::python
