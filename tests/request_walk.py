"""A job that is walked through all its phases by honest requests, with changed requests of every RPC sent in each phase.

`Door` sends requests to a cluster, checks each answer, and keeps what was sent. `Walk` is one job.
"""
import collections
import contextlib
import queue
import random
import re

import grpc
import numpy as np
from google.protobuf import text_format

from clusters import wait_until
from plain_client import ADAMW, DEADLINE_SECONDS, SGD, PlainJob, Tensor, bfloat16_bits, chunk_checksum, detail_of, manifest_digest, stubs
from request_fuzz import change, damage, fields_of, methods, serialized, sign

# Codes that an RPC may answer besides those of every RPC. They are the codes that its comment in the .proto file names, and
# FAILED_PRECONDITION where a server that does not lead may be asked.
OF_EVERY_RPC = "OK INVALID_ARGUMENT RESOURCE_EXHAUSTED"
MAY_ANSWER = {
    "Job/CreateJob": "ALREADY_EXISTS UNIMPLEMENTED UNAVAILABLE FAILED_PRECONDITION",
    "Job/GetManifest": "NOT_FOUND FAILED_PRECONDITION",
    "Job/GetPlacement": "NOT_FOUND UNAVAILABLE FAILED_PRECONDITION",
    "Job/ConfigureOptimizer": "NOT_FOUND FAILED_PRECONDITION UNAVAILABLE",
    "Job/Join": "NOT_FOUND ALREADY_EXISTS FAILED_PRECONDITION DATA_LOSS DEADLINE_EXCEEDED UNAVAILABLE",
    "Job/CommitStep": "NOT_FOUND ALREADY_EXISTS FAILED_PRECONDITION ABORTED DEADLINE_EXCEEDED DATA_LOSS UNAVAILABLE",
    "Job/AbortStep": "NOT_FOUND FAILED_PRECONDITION UNAVAILABLE",
    "Job/Hold": "NOT_FOUND OUT_OF_RANGE FAILED_PRECONDITION UNAVAILABLE",
    "Job/JobStatus": "NOT_FOUND FAILED_PRECONDITION",
    "Job/DeleteJob": "UNAVAILABLE FAILED_PRECONDITION",
    "Data/Push": "NOT_FOUND ABORTED FAILED_PRECONDITION ALREADY_EXISTS DATA_LOSS DEADLINE_EXCEEDED UNAVAILABLE",
    "Data/SetState": "NOT_FOUND ABORTED FAILED_PRECONDITION ALREADY_EXISTS DATA_LOSS DEADLINE_EXCEEDED UNAVAILABLE",
    "Data/Pull": "NOT_FOUND OUT_OF_RANGE FAILED_PRECONDITION ABORTED DATA_LOSS DEADLINE_EXCEEDED UNAVAILABLE",
    "Data/QueryPush": "NOT_FOUND FAILED_PRECONDITION ABORTED DEADLINE_EXCEEDED UNAVAILABLE",
    "Admin/ListServers": "NOT_FOUND UNAVAILABLE",
    "Admin/ListJobs": "UNAVAILABLE",
    "Admin/ListTensors": "NOT_FOUND",
    "Admin/DescribeTensor": "NOT_FOUND UNAVAILABLE",
    "Admin/ServerStatus": "",
    "Admin/AcceptRollback": "NOT_FOUND FAILED_PRECONDITION UNAVAILABLE DEADLINE_EXCEEDED",
    "Admin/FlushJob": "NOT_FOUND FAILED_PRECONDITION DATA_LOSS UNAVAILABLE DEADLINE_EXCEEDED",
    "Peer/PutJob": "ALREADY_EXISTS FAILED_PRECONDITION UNAVAILABLE",
    "Peer/DropJob": "UNAVAILABLE",
    "Peer/Step": "NOT_FOUND UNAVAILABLE FAILED_PRECONDITION",
    "Peer/Identify": "UNAVAILABLE",
    "Peer/DescribeShards": "NOT_FOUND",
}
MAY_WAIT = {name for name, codes in MAY_ANSWER.items() if "DEADLINE_EXCEEDED" in codes}
WEIGHTS = {"Job/CreateJob": 4, "Job/ConfigureOptimizer": 3, "Job/Join": 5, "Job/CommitStep": 5, "Job/AbortStep": 2, "Job/Hold": 2,
           "Data/Push": 6, "Data/SetState": 5, "Data/Pull": 5, "Data/QueryPush": 3, "Peer/Step": 14, "Peer/PutJob": 4,
           "Peer/DropJob": 0.3, "Job/DeleteJob": 0.5, "Peer/Identify": 0.5, "Admin/ListJobs": 0.5, "Admin/ServerStatus": 0.5}
ANSWER_SECONDS = 60  # within which a call that may not wait must answer
MOST_IN_FLIGHT = 24
SHOWN_BYTES = 700


def raw(message):
    return message


class Door:
    """Sends bytes to the servers of a cluster and checks what is answered."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.channels = {}
        self.codes = collections.Counter()  # (method, code, reason)
        self.changed = collections.Counter()  # (method, path)
        self.met = collections.Counter()  # (phase, method)
        self.sent = 0
        self.history = collections.deque(maxlen=150)  # texts of what was sent last
        # A changed message of a peer may keep a job in recovery, for which these two wait.
        self.may_wait = MAY_WAIT | ({"Job/CreateJob", "Job/ConfigureOptimizer"} if len(cluster.servers) > 1 else set())
        self.in_flight = collections.deque()
        self.faults = {}  # (method, code, reason, beginning of the message): text

    def channel(self, address):
        if address not in self.channels:
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
            self.channels[address] = grpc.insecure_channel(address, options=options)
        return self.channels[address]

    def close(self):
        for channel in self.channels.values():
            channel.close()
        self.channels.clear()

    def note(self, text, messages=()):
        self.history.append((text, messages))

    def told(self, most=150):
        """Return what was sent last, oldest first."""
        lines = ["  ".join([text, "; ".join(map(shown, messages))]) for text, messages in list(self.history)[-most:]]
        return "\n".join(["--- sent before, oldest first:", *lines])

    def fault(self, number, method, failed, code, reason):
        """Note an answer that no RPC may give. The first of each kind is kept with what led to it."""
        said = re.sub(r"[0-9]+", "N", failed.details() or "")[:60]
        if (str(method), code, reason, said) not in self.faults:
            told = f"#{number} {method} answers {code} {reason}: {failed.details()}\n{self.told(30)}"
            self.faults[str(method), code, reason, said] = told

    def send(self, method, address, parts, messages, changes, timeout, cancel_after=None):
        """Begin a call with the bytes of its messages. With `cancel_after`, the client cancels it after so many messages."""
        self.sent += 1
        number = self.sent
        self.note(f"#{number} {method} to {address.rsplit('/', 1)[-1]} timeout {timeout}"
                  f"{'' if cancel_after is None else f' cancelled after {cancel_after} messages'} [{', '.join(changes)}]", messages)
        channel, arguments = self.channel(address), {"request_serializer": raw, "response_deserializer": raw}
        if method.streams_in:
            begun = queue.Queue()  # of the call, which reads its messages before it has a name here

            def stream():
                yield from parts[:cancel_after]
                if cancel_after is not None:
                    begun.get().cancel()
            call = channel.stream_unary(method.path, **arguments).future(stream(), timeout=timeout)
            begun.put(call)
        elif method.streams_out:
            call = channel.unary_stream(method.path, **arguments)(parts[0], timeout=timeout)
        else:
            call = channel.unary_unary(method.path, **arguments).future(parts[0], timeout=timeout)
        entry = (number, method, call, timeout, cancel_after is not None)
        if str(method) in MAY_WAIT:
            self.in_flight.append(entry)
            while len(self.in_flight) > MOST_IN_FLIGHT:
                self.take(self.in_flight.popleft())
            return None
        return self.take(entry)

    def take(self, entry):
        """Wait for the answer of a call, check it, and return it (bytes), or None for an error."""
        number, method, call, timeout, is_cancelled = entry
        answer = None
        try:
            answer = list(call) if method.streams_out else call.result(2 * ANSWER_SECONDS)
            code, reason = "OK", ""
        except grpc.FutureTimeoutError:
            raise AssertionError(f"#{number} {method} neither answers nor ends\n{self.told()}") from None
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            answer, failed = None, error if isinstance(error, grpc.RpcError) else call
            code, detail = failed.code().name, detail_of(failed)
            reason = stubs().types.ErrorDetail.Reason.Name(detail.reason)
            if code == "CANCELLED":
                is_right = is_cancelled
            elif code == "DEADLINE_EXCEEDED":
                is_right = str(method) in self.may_wait or timeout < ANSWER_SECONDS
            elif code == "RESOURCE_EXHAUSTED" and failed.details().startswith("Received message larger than max"):
                is_right = True  # gRPC's own answer, with the size and the limit: the message never reaches the server's code
            else:
                is_right = code in OF_EVERY_RPC.split() + MAY_ANSWER[str(method)].split() and reason != "REASON_UNSPECIFIED"
                if len(self.cluster.servers) == 1:  # else it may be what a changed message of a peer has told
                    is_right = is_right and (code != "UNAVAILABLE" or reason == "STOPPING") and bool(failed.details())
            if code == "UNAVAILABLE":
                self.check_alive()
            if not is_right:
                self.fault(number, method, failed, code, reason)
        self.codes[str(method), code, reason] += 1
        return answer

    def settle(self, cancel=False):
        """Take all calls in flight, cancelled if `cancel`."""
        while self.in_flight:
            number, method, call, timeout, is_cancelled = self.in_flight.popleft()
            if cancel:
                call.cancel()
            self.take((number, method, call, timeout, is_cancelled or cancel))

    def check_alive(self):
        for server in self.cluster.servers:
            if not server.running():
                raise AssertionError(f"{server.address} ended with {server.process.poll()}:\n{server.log()[-4000:]}\n{self.told()}")


class EndOfWalk(Exception):
    """A changed request has moved the job, so that an honest one was refused. The walk ends."""


def shown(message):
    """Return a message as text, without its payload and long names."""
    kept = type(message)()
    kept.CopyFrom(message)
    payload = ""
    if kept.DESCRIPTOR.name == "Chunk" and kept.payload:
        payload = f" and {len(kept.payload)} bytes"
        kept.ClearField("payload")
    text = re.sub(r'(.)\1{70,}', lambda run: f"{run[1]}*{len(run[0])}", text_format.MessageToString(kept, as_one_line=True))
    return f"{message.DESCRIPTOR.name} {{ {text[:SHOWN_BYTES]} }}{payload}"


class Walk:
    """One job, its honest requests, and the changed ones."""

    def __init__(self, door, seed, number, kept, led, names):
        self.rng = random.Random(f"{seed}/{number}")
        self.door, self.number, self.kept, self.led, self.names = door, number, kept, led, list(names)
        rng = self.rng
        shapes = [Tensor("w", (40, 64)), Tensor("b", (300,), "BF16", tied_names=("b.tied",)), Tensor("s", ()),
                  Tensor("mask", (10, 3), "I64", "BUFFER"), Tensor("q", (72, 64)), Tensor("two.chunks", (600, 512))]
        self.tensors = shapes[:rng.choice((2, 4, 5, 5, 5)) if rng.random() < 0.95 else 6]
        self.shard_elements = rng.choice((256, 1024, 1024, 1 << 19))
        if len(self.tensors) == 6:
            self.shard_elements = 1 << 19
        self.world_size = rng.choice((1, 1, 2, 3))
        # Messages of peers may stop a job that they are about, so most walks are without them.
        self.has_peers = len(door.cluster.servers) > 1 and rng.random() < 0.3
        self.optimizer = rng.choice(("adamw", "adamw", "sgd"))
        self.values = ADAMW if self.optimizer == "adamw" else SGD
        self.state = rng.choice(("8bit", "fp32", "4bit"))
        self.job = PlainJob(door.cluster.address, f"walk/{number}", self.tensors, self.shard_elements)
        self.name = self.job.name
        self.job.patience_seconds = 20
        self.decision = stubs().types.Digest()
        self.manifest_digest = stubs().types.Digest()
        self.steps, self.phase_name, self.waiting = 0, "absent", []
        self.names += [self.name, *(tensor.name for tensor in self.tensors), *door.cluster.names, "walk"]

    # Honest contents.
    def arrays(self, with_buffers):
        generator = np.random.default_rng(self.rng.randrange(1 << 32))
        made = {}
        for tensor in self.tensors:
            values = generator.standard_normal(tensor.shape).astype("<f4")
            if tensor.kind == "PARAMETER":
                made[tensor.name] = bfloat16_bits(values).reshape(tensor.shape) if tensor.dtype == "BF16" else values
            elif with_buffers:
                made[tensor.name] = np.arange(tensor.element_count, dtype="<i8").reshape(tensor.shape)
        return made

    def slices(self, arrays, rank):
        """What a rank pushes: its flat slice of each tensor, or with one rank all of it."""
        if self.world_size == 1:
            return arrays
        parts = {}
        for name, array in arrays.items():
            count = array.size
            each = (count + self.world_size * 256 - 1) // (self.world_size * 256) * 256
            begin, end = min(rank * each, count), min((rank + 1) * each, count)
            if end > begin:
                parts[name] = [((begin, end - begin), array.reshape(-1)[begin:end])]
        return parts

    def layout(self):
        return self.job.layout(preset="WHOLE" if self.world_size == 1 else "FLAT_SLICES")

    def groups(self):
        return self.job.groups(self.optimizer, self.state)

    def commit_of(self, rank, **options):
        is_load = self.job.committed_step < 0
        return self.job.commit_request(rank, [] if is_load else [self.values], kind="LOAD" if is_load else "STEP", **options)

    def join_of(self, rank, generation):
        return self.job.join_request(rank, self.layout(), generation, self.world_size, client_id=f"{self.name}-{rank}")

    def placed(self):
        """Whether the walk knows where its shards are."""
        return bool(self.job.owners)

    # Requests as an honest caller would send them now.
    def honest(self, method):
        """Return (address, messages) of an honest request."""
        pb, job, rng = stubs(), self.job, self.rng
        rank = rng.randrange(self.world_size)
        leader = job.leader
        if rng.random() < 0.1:
            leader = rng.choice(self.door.cluster.servers).address
        name = f"{method.service}/{method.name}"
        if name in ("Data/Push", "Data/SetState"):
            return self.honest_stream(method, rank)
        if method.service == "Peer":
            return self.honest_peer(method)
        tensor = rng.choice(self.tensors)
        requests = {
            "Job/CreateJob": lambda: job.create_request(seed=3, durability=1),
            "Job/GetManifest": lambda: pb.job.GetManifestRequest(job=self.name),
            "Job/GetPlacement": lambda: pb.job.GetPlacementRequest(job=self.name),
            "Job/ConfigureOptimizer": lambda: pb.job.ConfigureOptimizerRequest(job=self.name, groups=self.groups(), max_norm=1.0),
            "Job/Join": lambda: self.join_of(rank, rng.choice((0, job.generation, job.generation))),
            "Job/CommitStep": lambda: self.commit_of(rank),
            "Job/AbortStep": lambda: pb.job.AbortStepRequest(job=self.name, generation=job.generation, step=job.committed_step + 1,
                                                             attempt=job.attempt, rank=rank, reason="fuzz"),
            "Job/Hold": lambda: pb.job.HoldRequest(job=self.name, step=job.committed_step, duration_ms=rng.choice((0, 1, 50)),
                                                   holder="fuzz"),
            "Job/JobStatus": lambda: pb.job.JobStatusRequest(job=self.name),
            "Job/DeleteJob": lambda: pb.job.DeleteJobRequest(job=self.name, confirm=rng.choice((self.name, "no"))),
            "Data/Pull": lambda: pb.data.PullRequest(
                job=self.name, version=rng.choice((job.committed_step, job.committed_step + 1)), epoch=job.epoch,
                regions=[job.region(tensor.name, rng.choice(("", "master", "exp_avg")), box=(0, tensor.element_count)),
                         job.region(tensor.name, shard=0)]),
            "Data/QueryPush": lambda: pb.data.QueryPushRequest(key=job.key(rank)),
            "Admin/ListServers": lambda: pb.admin.ListServersRequest(job=self.name),
            "Admin/ListJobs": pb.admin.ListJobsRequest,
            "Admin/ListTensors": lambda: pb.admin.ListTensorsRequest(job=self.name, name_contains="w"),
            "Admin/DescribeTensor": lambda: pb.admin.DescribeTensorRequest(job=self.name, tensor=tensor.name),
            "Admin/ServerStatus": pb.admin.ServerStatusRequest,
            "Admin/AcceptRollback": lambda: pb.admin.AcceptRollbackRequest(job=self.name, to_step=job.committed_step),
            "Admin/FlushJob": lambda: pb.admin.FlushJobRequest(job=self.name),
        }
        if name == "Data/Pull" and self.placed():
            leader = rng.choice(job.addresses())
        return leader, [requests[name]()]

    def honest_stream(self, method, rank):
        job, rng = self.job, self.rng
        is_load = method.name == "SetState"
        arrays = self.arrays(with_buffers=is_load)
        kept = rng.sample(sorted(arrays), min(len(arrays), rng.choice((1, 2))))
        arrays = self.slices({name: arrays[name] for name in kept}, rank)
        if not self.placed():  # before there is a placement: all of it to the leader
            job.owners = {(index, shard): job.leader for index, tensor in enumerate(self.tensors)
                          for shard in range(-(-tensor.element_count // self.shard_elements))}
            streams = job.streams(arrays, job.key(rank), slot="weight" if is_load else "")
            job.owners = {}
        else:
            streams = job.streams(arrays, job.key(rank), slot="weight" if is_load else "")
        if not streams:
            return job.leader, [stubs().types.Chunk(key=job.key(rank))]
        address = rng.choice(sorted(streams))
        if is_load and rng.random() < 0.3:
            streams[address][0].applied_count = 5
        return address, streams[address]

    def honest_peer(self, method):
        pb, rng = stubs(), self.rng
        servers = self.door.cluster.servers
        to = rng.randrange(len(servers))
        if method.name == "PutJob":
            manifest = self.job.create_request(seed=3, durability=1)
            manifest.job = rng.choice((self.name, "put")) if self.has_peers else "put"
            definition = pb.peer.JobDefinition(manifest=manifest, manifest_digest=manifest_digest(manifest),
                                               server_count=len(servers), revision=1)
            for index, tensor in enumerate(self.tensors):
                definition.runs.add(tensor=index, shard_count=-(-tensor.element_count // self.shard_elements), servers=[index % 2],
                                    reason="fuzz")
            if rng.random() < 0.5:
                definition.optimizer.CopyFrom(pb.job.ConfigureOptimizerRequest(job=manifest.job, groups=self.groups()))
                definition.revision = rng.choice((2, 3, 9))
            message = definition
        elif method.name == "DropJob":
            message = pb.peer.DropJobRequest(job="put")
        elif method.name == "Step":
            return self.honest_step_message(to)
        elif method.name == "Identify":
            message = pb.peer.IdentifyRequest()
        else:
            message = pb.admin.DescribeTensorRequest(job=self.name, tensor="w")
        return servers[to].peer_address, [message]

    def honest_step_message(self, to):
        """Return a message of the step machine of another server."""
        subject = self if self.has_peers else self.led
        pb, rng, job = stubs().peer, self.rng, subject.job
        kind = rng.choice([field.name for field in pb.StepMessage.DESCRIPTOR.oneofs_by_name["body"].fields])
        tensors, shards = len(job.tensors), sorted(job.owners)
        addresses = [server.address for server in self.door.cluster.servers]
        sender = (to + 1) % len(addresses)
        place = {"epoch": job.epoch, "generation": job.generation, "step": job.committed_step + 1, "attempt": job.attempt}
        decision = sign(pb.DecisionBody(**place, kind=rng.randrange(3), arithmetic_version=4, previous=subject.decision, scale=1.0,
                                        staged={"high": 1, "low": 2}, sum_of_squares=1.0, applied_count=[1] * tensors,
                                        untouched=bytes(tensors)))
        theirs = [number for number, shard in enumerate(shards) if job.owners[shard] == addresses[sender]]
        placement = {"shards": [{"server": [addresses.index(job.owners[shard])], "incarnation": [1]} for shard in shards]}
        layout = {"ranks": [{"tensors": [{"tensor": 0, "mode": 1, "boxes": [{"offset": [0], "extent": [2560]}]}]}]}
        key = {**place, "decision": rng.choice((subject.decision, subject.manifest_digest, decision.identity))}
        digest = {"high": 3, "low": 4}
        bodies = {
            "register": {"incarnation": 1, "epoch": job.epoch},
            "recover_report": {"epoch": job.epoch, "incarnation": 1, "generation": job.generation, "flushes": [{"step": 0}],
                               "shards": [{"shard": shard, "applied_step": job.committed_step, "applied": subject.decision}
                                          for shard in theirs]},
            "stage_report": {**place, "is_load": job.committed_step < 0, "has_scale": True, "scale": 1.0,
                             "shards": [{"shard": shard, "digest": digest, "sum_of_squares": 1.0, "loaded_applied_count": -1}
                                        for shard in theirs]},
            "open_job": {"epoch": job.epoch, "generation": job.generation, "committed_step": job.committed_step, "attempt": job.attempt,
                         "manifest_digest": subject.manifest_digest, "layout": layout, "placement": placement,
                         "kept": {"step": 0, "decision": subject.decision}},
            "absent": {**place, "rank": 0, "tensors": [0]},
            "absent_reply": {**place, "rank": 0, "tensors": [0]},
            "prepare": {"epoch": job.epoch, "decision": decision},
            "flush": {"epoch": job.epoch, "step": job.committed_step, "decision": subject.decision, "kept": {"step": 0}},
        }
        message = pb.StepMessage(job=job.name, **{"from": sender, kind: bodies.get(kind, key)})
        return self.door.cluster.servers[to].peer_address, [message]

    # Changed requests.
    def changed_request(self, method):
        """Return (address, messages, what was changed)."""
        rng = self.rng
        address, messages = self.honest(method)
        changes = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            at = rng.choice((0, 0, rng.randrange(len(messages)), len(messages) - 1))
            message = messages[at]
            path = rng.choice(fields_of(message.DESCRIPTOR)) if message.DESCRIPTOR.fields else None
            if path is None:
                continue
            if method.name == "Step" and len(path) > 1 and rng.random() < 0.7:  # of the kind of message that it is
                own = message.WhichOneof("body")
                path = rng.choice([each for each in fields_of(message.DESCRIPTOR) if each[0] == own]) if own else path
            change(rng, message, path, self.names)
            changes.append(f"{at}:{'.'.join(path)}")
            self.door.changed[str(method), path] += 1
            # What a decision or a piece says of its own bytes is made to fit, so that the next check is met.
            if method.name == "Step" and rng.random() < 0.7 and message.WhichOneof("body") == "prepare":
                sign(message.prepare.decision)
            if method.streams_in and rng.random() < 0.5 and message.payload:
                message.checksum = chunk_checksum(message.payload)
            if method.name == "PutJob" and rng.random() < 0.7:
                message.manifest_digest.CopyFrom(manifest_digest(message.manifest))
        return address, messages, changes

    def harms_kept(self, method, message):
        """Whether an answer of OK could rightly change a job that must stay as it is."""
        if method.name == "Step":  # the job that peers lead may stop until its servers start again
            return message.job in self.kept and message.job != self.led.job.name
        if method.name == "DropJob":
            return message.job in self.kept
        if method.name == "PutJob":
            return message.manifest.job in self.kept
        if method.name == "DeleteJob":
            return message.job == message.confirm and message.job in self.kept
        if method.name == "Hold":
            return message.job in self.kept and message.duration_ms > 100
        return method.name == "CommitStep" and message.job in self.kept and message.generation > 3

    def fuzz_one(self):
        rng = self.rng
        names = [name for name in methods() if not name.startswith("Peer/") or len(self.door.cluster.servers) > 1]
        method = methods()[rng.choices(names, [WEIGHTS.get(name, 1) for name in names])[0]]
        address, messages, changes = self.changed_request(method)
        while self.harms_kept(method, messages[0]):
            address, messages, changes = self.changed_request(method)
        parts, cancel_after = [serialized(message) for message in messages], None
        if method.name == "Hold" and messages[0].duration_ms > 2000 and rng.random() < 0.9:
            messages[0].duration_ms = 20
            parts = [serialized(messages[0])]
        if rng.random() < 0.15 and not (method.name in ("DropJob", "Step", "PutJob") and not self.has_peers):
            at = rng.randrange(len(parts))
            damaged = damage(rng, parts[at])
            if not any(kept.encode() in damaged for kept in self.kept):
                parts[at] = damaged
                changes.append(f"{at}:damaged to {damaged[:100].hex()}")
        if method.streams_in:
            choice = rng.randrange(12)
            if choice == 0:
                parts = parts[:rng.randrange(len(parts) + 1)]
                changes.append(f"closed after {len(parts)}")
            elif choice == 1:
                cancel_after = rng.randrange(len(parts) + 1)
                parts.append(parts[-1])
            elif choice == 2:
                parts.insert(rng.randrange(len(parts) + 1), rng.choice(parts))
                changes.append("a message repeated")
            elif choice == 3:
                rng.shuffle(parts)
                changes.append("shuffled")
        timeout = rng.choice((0, 0.001, 0.02, 0.05, 0.1, 0.2)) if str(method) in MAY_WAIT else ANSWER_SECONDS
        if rng.random() < 0.05:
            timeout = 4 if str(method) in MAY_WAIT else rng.choice((0, 0.001))
        self.door.met[self.phase_name, str(method)] += 1
        self.door.send(method, address, parts, messages[:3], changes, timeout, cancel_after)

    def phase(self, name):
        """Send changed requests in this phase of the job."""
        self.phase_name = name
        self.door.note(f"== {self.name}: {name} (step {self.job.committed_step}, generation {self.job.generation}, attempt "
                       f"{self.job.attempt}, epoch {self.job.epoch}, {self.world_size} ranks{', peers' if self.has_peers else ''})")
        for _ in range(self.rng.choice((2, 5, 12))):
            self.fuzz_one()
        if self.rng.random() < 0.5:
            self.door.settle(cancel=self.rng.random() < 0.5)

    def do(self, what, *arguments, **options):
        """Call an honest request, which another request may have made impossible."""
        try:
            answer = what(*arguments, **options)
            self.door.codes["honest", "OK", ""] += 1
            return answer
        except grpc.RpcError as error:
            code, detail = error.code().name, detail_of(error)
            self.door.codes["honest", code, stubs().types.ErrorDetail.Reason.Name(detail.reason)] += 1
            self.door.note(f"   honest {getattr(what, '__name__', what)}: {code} {error.details()}")
            assert code not in ("UNKNOWN", "INTERNAL", "CANCELLED"), f"{what}: {code} {error.details()}\n{self.door.told()}"
            raise EndOfWalk from None

    # The walk.
    def run(self):
        try:
            with contextlib.suppress(EndOfWalk):
                self.to_open()
                for _ in range(self.rng.choice((2, 3, 4))):
                    self.step_or_rejoin()
        finally:
            for call in self.waiting:
                call.cancel()
        self.door.settle()
        self.door.check_alive()
        self.delete()
        self.phase("deleted")
        self.door.settle(cancel=True)
        self.job.connections.close()

    def to_open(self):
        job, rng = self.job, self.rng
        self.phase("absent")
        whole = job.create_request(seed=3, durability=1)
        if rng.random() < 0.5:
            page = job.create_request(seed=3, durability=1)
            del page.tensors[1:]
            page.more = True
            self.do(job.job().CreateJob, page, timeout=DEADLINE_SECONDS)
            self.phase("creating")
            del whole.tensors[:1]
            whole.first = 1
        created = self.do(job.job().CreateJob, whole, timeout=DEADLINE_SECONDS)
        job.epoch, self.manifest_digest = created.epoch, created.manifest_digest
        self.phase("created")
        self.do(job.configure, self.groups(), max_norm=1.0)
        self.phase("configured")
        self.join()

    def to_open_and_lost(self, lose):
        """Walk to a step that is staged in part, let `lose` lose the memory of the servers, and delete the job.

        A job that changed requests of a peer have ended (dropped from a server and put there with another manifest) does not recover, and
        is deleted before.
        """
        try:
            self.to_open()
            self.step()
        except EndOfWalk:
            self.delete()
        finally:
            for call in self.waiting:
                call.cancel()
        lose()
        self.door.settle(cancel=True)
        self.delete()
        self.job.connections.close()

    def join(self):
        job = self.job
        job.generation = self.do(job.job().Join, self.join_of(0, 0), timeout=DEADLINE_SECONDS).generation
        self.phase("joining")
        calls = []
        for rank in range(self.world_size):
            calls.append(job.job().Join.future(self.join_of(rank, job.generation), timeout=10))
            if rank == 0 and self.world_size > 1:
                self.waiting = calls
                self.phase("joining")
        answers = [self.do(call.result) for call in calls]
        job.world_size, job.epoch, job.committed_step = self.world_size, answers[0].epoch, answers[0].committed_step
        job.attempt = answers[0].attempt
        self.do(job.read_placement)

    def step_or_rejoin(self):
        """Make a step. If a changed request has moved the job on, join it again as a worker would."""
        try:
            self.step()
        except EndOfWalk:
            self.door.settle()
            self.join()

    def push(self, ranks, arrays):
        is_load = self.job.committed_step < 0
        for rank in ranks:
            if is_load and rank > 0:
                continue
            self.do(self.job.set_state if is_load else self.job.push, arrays if is_load else self.slices(arrays, rank), rank=rank)

    def step(self):
        """Make one step: the LOAD if none is committed."""
        job, rng = self.job, self.rng
        load = "loading " if job.committed_step < 0 else ""
        arrays = self.arrays(with_buffers=job.committed_step < 0)
        self.phase(load + "open")
        ranks = range(self.world_size)
        if rng.random() < 0.3:
            self.push(ranks[:1], arrays)
            self.phase(load + "pushed")
            self.do(job.abort)
            self.phase(load + "aborted")
        if rng.random() < 0.2:
            self.join()
        self.push(ranks[:1], arrays)
        self.phase(load + "pushed")
        job.attempt = self.do(job.status).attempt or job.attempt
        self.push(ranks, arrays)
        calls = []
        for rank in ranks:
            calls.append(job.job().CommitStep.future(self.commit_of(rank), timeout=10))
            if rank == 0 and self.world_size > 1:
                self.waiting = calls
                self.phase(load + "committing")
        answers = [self.do(call.result) for call in calls]
        job.committed_step, job.attempt, self.decision = answers[0].step, answers[0].next_attempt, answers[0].decision
        self.door.codes["honest", "step", ""] += 1
        self.phase("committed")
        if rng.random() < 0.3:
            self.do(job.hold, job.committed_step, 10_000)
            self.phase("held")
            self.do(job.hold, job.committed_step, 0)
        if rng.random() < 0.2:
            self.do(job.admin().FlushJob, stubs().admin.FlushJobRequest(job=self.name), timeout=DEADLINE_SECONDS)
            self.phase("flushed")

    def delete(self):
        """Delete the job, and every other that changed requests have made. That must not fail."""
        if len(self.door.cluster.servers) == 1:
            assert self.delete_once(), self.door.told()
        else:  # a server gives a job back to one that has dropped it at the word of a peer
            wait_until(self.delete_once)
        self.job.owners, self.job.committed_step = {}, -1

    def delete_once(self):
        """Delete every job that is not kept, and return whether no other is there then."""
        pb, door = stubs(), self.door
        admin = self.job.connections.admin(self.job.leader)

        def listed():
            jobs = admin.ListJobs(pb.admin.ListJobsRequest(), timeout=DEADLINE_SECONDS).jobs
            return {entry.job: pb.job.JobStatusResponse.State.Name(entry.state) for entry in jobs if entry.job not in self.kept}
        hidden = {}  # jobs that a changed message has put on another server alone
        for server in self.door.cluster.servers:
            status = self.job.connections.admin(server.address).ServerStatus(pb.admin.ServerStatusRequest(), timeout=DEADLINE_SECONDS)
            hidden |= {use.job: "not listed" for use in status.uses if use.job and use.job not in self.kept}
        for name, state in {**hidden, **listed()}.items():
            door.note(f"   delete {name}, which is {state}")
            try:
                self.job.job().DeleteJob(pb.job.DeleteJobRequest(job=name, confirm=name), timeout=DEADLINE_SECONDS)
            except grpc.RpcError as error:
                raise AssertionError(f"job '{name}' cannot be deleted: {error.code().name} {error.details()}\n{door.told()}") from None
        return not listed()
