"""A client of Orlop made only from its .proto files: generated stubs, grpcio with default settings, xxhash and numpy.

Nothing here imports code of Orlop, so any generated client can do the same. Tests use it to control exactly what is sent over the wire.
Arrays of bfloat16 are numpy uint16 arrays of its bits.
"""
import dataclasses
import functools
import importlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import types

import grpc
import numpy as np
import xxhash

PROTO_DIR = pathlib.Path(__file__).resolve().parent.parent / "proto"
LEAF_BYTES = 1 << 20
DEADLINE_SECONDS = 60


def generate_stubs(directory):
    """Run plain grpc_tools.protoc over every .proto file into `directory`.

    It runs in a process of its own, because the compiler's module exports its protobuf symbols to every library loaded after it, for
    example to torch's.
    """
    files = sorted(str(path) for path in (PROTO_DIR / "orlop" / "v1").glob("*.proto"))
    flags = [f"-I{PROTO_DIR}", f"--python_out={directory}", f"--grpc_python_out={directory}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *flags, *files], check=True)
    for package in ("orlop", "orlop/v1"):  # a package that is found before an installed one of the same name
        (pathlib.Path(directory) / package / "__init__.py").touch()


@functools.cache
def stubs():
    """Return the generated modules: types, data, job, admin, peer and, with services, data_grpc, job_grpc, admin_grpc, peer_grpc."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "orlop"}
    with tempfile.TemporaryDirectory(prefix="orlop-stubs-") as directory:
        generate_stubs(directory)
        sys.path.insert(0, directory)
        importlib.invalidate_caches()
        try:
            modules = {name: importlib.import_module(f"orlop.v1.{name}_pb2") for name in ("types", "data", "job", "admin", "peer")}
            for name in ("data", "job", "admin", "peer"):
                modules[f"{name}_grpc"] = importlib.import_module(f"orlop.v1.{name}_pb2_grpc")
        finally:
            sys.path.remove(directory)
            for name in list(sys.modules):
                if name.split(".")[0] == "orlop":
                    del sys.modules[name]
            sys.modules.update(hidden)
    return types.SimpleNamespace(**modules)


NUMPY_OF_DTYPE = {"F32": "<f4", "BF16": "<u2", "F16": "<f2", "U8": "u1", "I16": "<i2", "F64": "<f8", "I8": "i1",
                  "I32": "<i4", "I64": "<i8", "BOOL": "u1"}


def wire_dtype(name):
    return stubs().types.DType.Value(f"DTYPE_{name}")


def dtype_name(value):
    return stubs().types.DType.Name(value).removeprefix("DTYPE_")


def detail_of(error):
    """Return the ErrorDetail of a grpc.RpcError, or an empty one if it has none."""
    detail = stubs().types.ErrorDetail()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            detail.ParseFromString(value)
    return detail


def leaf_hashes(payload):
    return [xxhash.xxh3_64_intdigest(payload[i:i + LEAF_BYTES]) for i in range(0, len(payload), LEAF_BYTES)]


def join_hashes(hashes):
    return b"".join(value.to_bytes(8, "little") for value in hashes)


def chunk_checksum(payload):
    hashes = leaf_hashes(payload)
    return hashes[0] if len(hashes) == 1 else xxhash.xxh3_64_intdigest(join_hashes(hashes))


def piece_digest(payload):
    value = xxhash.xxh3_128_intdigest(join_hashes(leaf_hashes(payload)))
    return stubs().types.Digest(high=value >> 64, low=value & (2**64 - 1))


def manifest_digest(manifest):
    """Return the digest that a server computes of a manifest (server/job/manifest.cc)."""
    whole = type(manifest)()
    whole.CopyFrom(manifest)
    whole.more, whole.first = False, 0
    whole.shard_elements, whole.durability = whole.shard_elements or 1 << 22, whole.durability or 1
    value = xxhash.xxh3_128_intdigest(whole.SerializeToString())
    return stubs().types.Digest(high=value >> 64, low=value & (2**64 - 1))


def chunks_of_piece(region, payload, chunk_bytes=LEAF_BYTES, applied_count=None):
    """Return the Chunk messages of one piece, in order."""
    messages = []
    for offset in range(0, len(payload), chunk_bytes):
        part = payload[offset:offset + chunk_bytes]
        messages.append(stubs().types.Chunk(offset_bytes=offset, checksum=chunk_checksum(part), payload=part))
    messages[0].region.CopyFrom(region)
    if applied_count is not None:
        messages[0].applied_count = applied_count
    messages[-1].piece_digest.CopyFrom(piece_digest(payload))
    return messages


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a manifest."""
    name: str
    shape: tuple
    dtype: str = "F32"
    kind: str = "PARAMETER"
    tied_names: tuple = ()
    whole: bool = False
    may_be_unset: bool = False
    value_digest: str = ""

    @property
    def element_count(self):
        return int(np.prod(self.shape, dtype=np.int64))

    def spec(self):
        kind = stubs().types.TensorKind.Value(f"TENSOR_KIND_{self.kind}")
        return stubs().types.TensorSpec(name=self.name, kind=kind, shape=self.shape, dtype=wire_dtype(self.dtype),
                                        tied_names=self.tied_names, whole=self.whole, may_be_unset=self.may_be_unset,
                                        value_digest=self.value_digest)


def box_message(box):
    """Convert (offset, extent) lists to an N-d Box, (int, int) to a flat one, None to None."""
    if box is None:
        return None
    offset, extent = box
    if isinstance(offset, int):
        return stubs().types.Box(offset=[offset], extent=[extent], flat=True)
    return stubs().types.Box(offset=offset, extent=extent)


class Connections:
    """One channel per address, created at first use."""

    def __init__(self, options=(), credentials=None):
        self._options = list(options)  # empty: gRPC's default settings
        self._credentials = credentials  # None: plaintext
        self._channels = {}

    def channel(self, address):
        if address not in self._channels:
            self._channels[address] = (grpc.secure_channel(address, self._credentials, options=self._options) if self._credentials
                                       else grpc.insecure_channel(address, options=self._options))
        return self._channels[address]

    def data(self, address):
        return stubs().data_grpc.DataStub(self.channel(address))

    def job(self, address):
        return stubs().job_grpc.JobStub(self.channel(address))

    def admin(self, address):
        return stubs().admin_grpc.AdminStub(self.channel(address))

    def reconnect(self):
        """Create new, connected channels. An existing channel to a server that was down would wait out gRPC's backoff first."""
        addresses = list(self._channels)
        self.close()
        for address in addresses:
            grpc.channel_ready_future(self.channel(address)).result(DEADLINE_SECONDS)

    def close(self):
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()


class PlainJob:
    """One training job driven by `world_size` contributors that live in this object."""

    def __init__(self, address, name, tensors, shard_elements=0, options=(), credentials=None):
        self.connections = Connections(options, credentials)
        self.address = address
        self.name = name
        self.tensors = list(tensors)
        self.index = {tensor.name: i for i, tensor in enumerate(self.tensors)}
        self.shard_elements = shard_elements or 1 << 22
        self.owners = {}  # (tensor index, shard) -> address
        self.generation = self.attempt = self.epoch = 0
        self.committed_step = -1
        self.world_size = 1
        self.commit_seconds = DEADLINE_SECONDS
        self.patience_seconds = DEADLINE_SECONDS  # how long to repeat a push that is answered Unavailable
        servers = self.admin().ListServers(stubs().admin.ListServersRequest(), timeout=DEADLINE_SECONDS).placement.servers
        self.leader = next(server.address for server in servers if server.leader)

    @classmethod
    def attach(cls, address, name):
        """Return an existing job, with manifest, placement and committed step read from the servers."""
        job = cls(address, name, [])
        first = 0
        while True:
            page = job.job().GetManifest(stubs().job.GetManifestRequest(job=name, first=first), timeout=DEADLINE_SECONDS)
            job.tensors += [Tensor(spec.name, tuple(spec.shape), dtype_name(spec.dtype),
                                   stubs().types.TensorKind.Name(spec.kind).removeprefix("TENSOR_KIND_")) for spec in page.tensors]
            job.shard_elements, first = page.shard_elements, page.next
            if first == 0:
                break
        job.index = {tensor.name: i for i, tensor in enumerate(job.tensors)}
        job.committed_step = job.status().committed_step
        job.read_placement()
        return job

    # Stubs.
    def admin(self, address=None):
        return self.connections.admin(address or self.address)

    def job(self):
        return self.connections.job(self.leader)

    def data(self, tensor, shard=0):
        return self.connections.data(self.owners[self.index[tensor], shard])

    def addresses(self):
        return sorted(set(self.owners.values()))

    # The job plane.
    def create_request(self, **options):
        return stubs().job.CreateJobRequest(job=self.name, tensors=[tensor.spec() for tensor in self.tensors],
                                            shard_elements=self.shard_elements, **options)

    def create(self, **options):
        response = self.job().CreateJob(self.create_request(**options), timeout=DEADLINE_SECONDS)
        self.epoch, self.committed_step = response.epoch, response.committed_step
        return response

    def groups(self, optimizer="adamw", state="fp32", parts=None, **options):
        """Return optimizer groups. `parts` lists tensor names per group; absent: one group of every parameter."""
        parts = parts or [[tensor.name for tensor in self.tensors if tensor.kind == "PARAMETER"]]
        return [stubs().job.OptimizerGroup(optimizer=optimizer, state=state, tensors=sorted(self.index[name] for name in part),
                                           **options) for part in parts]

    def configure(self, groups=None, **options):
        request = stubs().job.ConfigureOptimizerRequest(job=self.name, groups=groups or self.groups(), **options)
        return self.job().ConfigureOptimizer(request, timeout=DEADLINE_SECONDS)

    def layout(self, mode="EXACTLY_ONCE", preset="WHOLE", boxes=None):
        """Return a contribution layout. `boxes` {tensor: [box]} makes it EXPLICIT."""
        layout = stubs().job.ContributionLayout
        if boxes is None:
            return layout(mode=layout.Mode.Value(mode), preset=layout.Preset.Value(preset))
        tensors = [stubs().job.TensorBoxes(tensor=self.index[name], boxes=[box_message(box) for box in parts])
                   for name, parts in boxes.items()]
        return layout(mode=layout.Mode.Value(mode), preset=layout.EXPLICIT, tensors=tensors)

    def join_request(self, rank, layout, generation=0, world_size=1, client_id=None, min_committed_step=None):
        return stubs().job.JoinRequest(job=self.name, generation=generation, rank=rank, world_size=world_size, layout=layout,
                                       client_id=client_id or f"{os.getpid()}-{id(self)}-{rank}",
                                       min_committed_step=min_committed_step)

    def join(self, layouts=None, generation=0, **options):
        """Let all ranks join. `layouts` has one layout per rank. generation 0: open a new one."""
        layouts = layouts or [self.layout()]
        world = {"world_size": len(layouts), **options}
        if generation == 0:
            request = self.join_request(0, layouts[0], **world)
            generation = self.job().Join(request, timeout=DEADLINE_SECONDS).generation
        calls = [self.job().Join.future(self.join_request(rank, layout, generation, **world), timeout=DEADLINE_SECONDS)
                 for rank, layout in enumerate(layouts)]
        responses = [call.result() for call in calls]
        self.world_size, self.generation, self.epoch = len(layouts), generation, responses[0].epoch
        self.committed_step, self.attempt = responses[0].committed_step, responses[0].attempt
        self.read_placement()
        return responses[0]

    def read_placement(self):
        """Read the whole placement map, page by page."""
        first = 0
        while True:
            request = stubs().job.GetPlacementRequest(job=self.name, first=first)
            response = self.job().GetPlacement(request, timeout=DEADLINE_SECONDS)
            servers = response.placement.servers
            for run in response.placement.runs:
                for shard in range(run.first_shard, run.first_shard + run.shard_count):
                    self.owners[run.tensor, shard] = servers[run.servers[0]].address
            self.epoch, first = response.placement.epoch, response.next
            if first == 0:
                return response

    def commit_request(self, rank=0, groups=(), **options):
        values = [stubs().job.GroupValues(values=group) for group in groups]
        fields = {"epoch": self.epoch, "generation": self.generation, "step": self.committed_step + 1, "attempt": self.attempt,
                  "kind": "STEP", **options}
        return stubs().job.CommitStepRequest(job=self.name, rank=rank, groups=values, **fields)

    def commit(self, groups=(), ranks=None, **options):
        """Call CommitStep for all ranks at once and adopt the committed step. Returns rank 0's answer."""
        calls = [self.job().CommitStep.future(self.commit_request(rank, groups, **options), timeout=self.commit_seconds)
                 for rank in ranks or range(self.world_size)]
        responses = [call.result() for call in calls]
        assert all(response == responses[0] for response in responses), "contributors saw different decisions"
        self.committed_step, self.attempt = responses[0].step, responses[0].next_attempt
        return responses[0]

    def abort(self, reason="test"):
        request = stubs().job.AbortStepRequest(job=self.name, generation=self.generation, step=self.committed_step + 1,
                                               attempt=self.attempt, rank=0, reason=reason)
        self.attempt = self.job().AbortStep(request, timeout=DEADLINE_SECONDS).attempt
        return self.attempt

    def status(self):
        return self.job().JobStatus(stubs().job.JobStatusRequest(job=self.name), timeout=DEADLINE_SECONDS)

    def roll_back(self, to_step, address=None):
        request = stubs().admin.AcceptRollbackRequest(job=self.name, to_step=to_step)
        return self.admin(address).AcceptRollback(request, timeout=DEADLINE_SECONDS)

    def delete(self):
        return self.job().DeleteJob(stubs().job.DeleteJobRequest(job=self.name, confirm=self.name), timeout=DEADLINE_SECONDS)

    # The data plane.
    def key(self, rank=0, **options):
        fields = {"epoch": self.epoch, "generation": self.generation, "step": self.committed_step + 1, "attempt": self.attempt,
                  **options}
        return stubs().types.StreamKey(job=self.name, rank=rank, **fields)

    def region(self, tensor, slot="", dtype=None, box=None, shard=None):
        return stubs().types.Region(tensor=tensor, slot=slot, dtype=wire_dtype(dtype) if dtype else 0, box=box_message(box),
                                    shard=shard)

    def pieces(self, tensor, array, box=None, encode=np.ndarray.tobytes):
        """Cut an array that fills `box` of the tensor into (shard, bytes): its elements in the shard, in flat order, by `encode`."""
        spec = self.tensors[self.index[tensor]]
        if box is None:
            first, array = 0, array.reshape(-1)
            flat = None
        elif isinstance(box[0], int):
            first, flat = box[0], None
        else:
            ranges = tuple(slice(offset, offset + extent) for offset, extent in zip(*box))
            flat = np.arange(spec.element_count).reshape(spec.shape)[ranges].reshape(-1)
            array = array.reshape(-1)
        for shard in range(-(-spec.element_count // self.shard_elements)):
            begin, end = shard * self.shard_elements, (shard + 1) * self.shard_elements
            if flat is not None:
                begin, end = np.searchsorted(flat, [begin, end])
            else:
                begin, end = max(begin - first, 0), max(end - first, 0)
            part = array[begin:end]
            if part.size:
                yield shard, encode(part)

    def streams(self, arrays, key, slot="", dtype=None, chunk_bytes=LEAF_BYTES, boxes=None, applied_counts=None,
                encode=np.ndarray.tobytes):
        """Return {address: [Chunk]} for arrays {tensor: array, or (box, array) pairs}."""
        by_address = {}
        for tensor, value in arrays.items():
            for box, array in value if isinstance(value, list) else [(None, value)]:
                for shard, payload in self.pieces(tensor, array, box, encode):
                    messages = by_address.setdefault(self.owners[self.index[tensor], shard], [])
                    count = (applied_counts or {}).get(tensor)
                    region = self.region(tensor, slot, dtype, box, shard)
                    messages += chunks_of_piece(region, payload, chunk_bytes, count)
        for messages in by_address.values():
            messages[0].key.CopyFrom(key)
        return by_address

    def push(self, gradients, rank=0, **options):
        return self.send("Push", self.streams(gradients, self.key(rank), **options))

    def set_state(self, arrays, rank=0, slot="weight", **options):
        return self.send("SetState", self.streams(arrays, self.key(rank), slot=slot, **options))

    def send(self, method, streams):
        """Send all streams at once, each to its server. Repeats while the server answers Unavailable (it applies the step before)."""
        end, answers = time.monotonic() + self.patience_seconds, []
        while streams:
            calls = {address: getattr(self.connections.data(address), method).future(iter(messages), timeout=DEADLINE_SECONDS)
                     for address, messages in streams.items()}
            for address, call in calls.items():
                try:
                    answers.append(call.result())
                    del streams[address]
                except grpc.RpcError as error:
                    if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                        raise
        return answers

    def hold(self, step, duration_ms, holder="test"):
        request = stubs().job.HoldRequest(job=self.name, step=step, duration_ms=duration_ms, holder=holder)
        return self.job().Hold(request, timeout=DEADLINE_SECONDS)

    def query_push(self, address, rank=0, after=0):
        request = stubs().data.QueryPushRequest(key=self.key(rank), after=after)
        return self.connections.data(address).QueryPush(request, timeout=DEADLINE_SECONDS)

    def load(self, weights, **options):
        """SetState of the weights, then the LOAD commit."""
        self.set_state(weights, **options)
        return self.commit(kind="LOAD")

    def step(self, gradients, groups, **options):
        """Make one whole step of a single contributor."""
        self.push(gradients, **options)
        return self.commit(groups)

    def pull(self, tensor, slot="weight", dtype=None, version=None, box=None, max_chunk_bytes=0, timeout=DEADLINE_SECONDS):
        """Return one slot of one tensor (or a box of it) from every owner as a numpy array. Checks checksums and digests."""
        spec = self.tensors[self.index[tensor]]
        shape = spec.shape if box is None else ((box[1],) if isinstance(box[0], int) else tuple(box[1]))
        out, pieces = None, {}
        version = self.committed_step if version is None else version
        for address in sorted({owner for (index, _), owner in self.owners.items() if index == self.index[tensor]}):
            request = stubs().data.PullRequest(job=self.name, version=version, max_chunk_bytes=max_chunk_bytes,
                                               regions=[self.region(tensor, slot, dtype, box)])
            end = time.monotonic() + self.patience_seconds
            while True:
                try:
                    for region, payload in read_pieces(self.connections.data(address).Pull(request, timeout=timeout), version):
                        pieces[region.shard] = payload
                        out = region.dtype
                    break
                except grpc.RpcError as error:  # an apply may have all memory for a moment
                    if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or time.monotonic() > end:
                        raise
                    time.sleep(0.05)
        flat = np.frombuffer(b"".join(pieces[shard] for shard in sorted(pieces)), NUMPY_OF_DTYPE[dtype_name(out)])
        return flat if slot.endswith("_absmax") else flat.reshape(shape)

    def pull_all(self, version=None, **options):
        return {tensor.name: self.pull(tensor.name, version=version, **options) for tensor in self.tensors}

    def describe(self, tensor, address=None):
        request = stubs().admin.DescribeTensorRequest(job=self.name, tensor=tensor)
        return self.admin(address).DescribeTensor(request, timeout=DEADLINE_SECONDS)

    def snapshot(self):
        """Return every byte of every slot of every tensor, as stored: {(tensor, slot): bytes}."""
        stored = {}
        for tensor in self.tensors:
            for slot in self.describe(tensor.name).shards[0].slots:
                if slot.slot != "gradient":
                    array = self.pull(tensor.name, slot.slot, dtype_name(slot.dtype))
                    stored[tensor.name, slot.slot] = array.tobytes()
        return stored


def read_pieces(stream, version=None):
    """Return (region, bytes) of each piece of a Pull answer. Asserts order, offsets, checksums, digests and the version."""
    region, parts, size, first = None, [], 0, True
    for chunk in stream:
        assert chunk.HasField("key") == first, "the key comes first and only there"
        if first and version is not None:
            assert chunk.key.step == version, f"asked for version {version}, was served {chunk.key.step}"
        first = False
        if chunk.HasField("region"):
            assert region is None, "a piece began before the last one ended"
            region, parts, size = chunk.region, [], 0
        assert chunk.offset_bytes == size, f"chunk at {chunk.offset_bytes}, expected {size}"
        assert chunk.checksum == chunk_checksum(chunk.payload), "wrong checksum"
        parts.append(chunk.payload)
        size += len(chunk.payload)
        if chunk.HasField("piece_digest"):
            payload = b"".join(parts)
            assert chunk.piece_digest == piece_digest(payload), "wrong digest"
            yield region, payload
            region = None
    assert region is None, "the stream ended within a piece"


def bfloat16_bits(array):
    """Convert float32 to bfloat16 bits, nearest even (finite values)."""
    bits = np.ascontiguousarray(array, "<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def from_bfloat16_bits(bits):
    return (bits.astype("<u4") << 16).view("<f4")


ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
SGD = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": 0.0}
