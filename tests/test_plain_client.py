"""A client generated only from proto/, with gRPC's default settings, can do everything: see plain_client.py."""
import ast
import pathlib
import sys

import numpy as np
import pytest

import int8_blocks
import plain_client
from clusters import SMALL_SHARD_ELEMENTS, SMALL_TENSORS, wait_until
from plain_client import ADAMW, PlainJob, Tensor, bfloat16_bits, detail_of, from_bfloat16_bits, piece_digest, stubs
from test_bad_input import refused

TENSORS = [tensor for tensor in SMALL_TENSORS if tensor.dtype == "F32"]


def random_arrays(seed, tensors=TENSORS, scale=1.0):
    generator = np.random.default_rng(seed)
    return {tensor.name: (scale * generator.standard_normal(tensor.shape)).astype("<f4") for tensor in tensors}


def adamw_float64(weights, gradients_of_steps, lr, beta1, beta2, eps, weight_decay):
    """torch's AdamW in float64."""
    weights = {name: array.astype("f8") for name, array in weights.items()}
    first = {name: np.zeros_like(array) for name, array in weights.items()}
    second = {name: np.zeros_like(array) for name, array in weights.items()}
    for step, gradients in enumerate(gradients_of_steps, start=1):
        for name, gradient in gradients.items():
            gradient = gradient.astype("f8")
            weights[name] *= 1 - lr * weight_decay
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            denominator = np.sqrt(second[name] / (1 - beta2**step)) + eps
            weights[name] -= lr / (1 - beta1**step) * first[name] / denominator
    return weights


def test_plain_client_shares_no_code_of_ours():
    nodes = list(ast.walk(ast.parse(pathlib.Path(plain_client.__file__).read_text())))
    imports = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imports |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imports - set(sys.stdlib_module_names) == {"grpc", "numpy", "xxhash"}


@pytest.mark.parametrize("server_count", [1, 3])
def test_plain_client_creates_pushes_commits_and_pulls(make_cluster, server_count):
    cluster = make_cluster(server_count)
    job = cluster.job("plain", TENSORS, shard_elements=SMALL_SHARD_ELEMENTS)
    created = job.create(seed=1)
    assert (created.existed, created.committed_step) == (False, -1)
    assert job.create(seed=1).existed, "the same manifest again is the same job"
    assert job.configure().changed
    assert not job.configure().changed
    job.join()
    assert len(job.addresses()) == server_count

    weights = random_arrays(1)
    assert job.load(weights).outcome == stubs().job.CommitStepResponse.LOADED
    for name, array in job.pull_all().items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)

    gradients = [random_arrays(seed) for seed in (2, 3, 4)]
    for gradient in gradients:
        answer = job.step(gradient, [ADAMW])
        assert answer.outcome == stubs().job.CommitStepResponse.APPLY
        norm = np.sqrt(sum(np.sum(array.astype("f8")**2) for array in gradient.values()))
        assert answer.gradient_norm == pytest.approx(norm, rel=1e-12)
        assert answer.clip_factor == 1
    expected = adamw_float64(weights, gradients, **ADAMW)
    for name, array in job.pull_all().items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-6, err_msg=name)
    assert job.status().committed_step == 3


def test_plain_client_pushes_int8_with_block_scales(make_cluster):
    """numpy encodes by the description in types.proto; the servers stage the decoded values as bfloat16."""
    cluster, weights, jobs = make_cluster(2), random_arrays(1), []
    for name in ("int8", "decoded"):
        job = cluster.job(name, TENSORS, shard_elements=SMALL_SHARD_ELEMENTS)
        job.create()
        job.configure()
        job.join()
        job.load(weights)
        jobs.append(job)
    for seed in (2, 3):
        gradients = random_arrays(seed)
        answers = [jobs[0].step(gradients, [ADAMW], dtype="I8_BLOCK", encode=int8_blocks.encode),
                   jobs[1].step(gradients, [ADAMW], dtype="BF16",
                                encode=lambda part: bfloat16_bits(int8_blocks.decode(int8_blocks.encode(part))).tobytes())]
        assert answers[0].gradient_norm == answers[1].gradient_norm
    assert jobs[0].snapshot() == jobs[1].snapshot()


def test_committed_step_returns_the_kept_decision_when_repeated(make_cluster):
    job = make_cluster(2).job("repeat", TENSORS, shard_elements=SMALL_SHARD_ELEMENTS)
    job.create()
    job.configure()
    job.join()
    job.load(random_arrays(1))
    job.push(random_arrays(2))
    request = job.commit_request(groups=[ADAMW])
    answer = job.commit([ADAMW])
    assert job.job().CommitStep(request, timeout=60) == answer


def test_boxes_of_any_shape_and_dtype_are_pulled(make_cluster):
    job = make_cluster(2).job("boxes", TENSORS, shard_elements=SMALL_SHARD_ELEMENTS)
    job.create()
    job.configure()
    job.join()
    weights = random_arrays(5)
    job.load(weights)
    whole = weights["layers.0.weight"]
    np.testing.assert_array_equal(job.pull("layers.0.weight", box=([400, 10], [300, 500])), whole[400:700, 10:510])
    np.testing.assert_array_equal(job.pull("layers.0.weight", box=(500_000, 100_001)), whole.reshape(-1)[500_000:600_001])
    half = job.pull("layers.0.weight", dtype="F16")
    np.testing.assert_array_equal(half, whole.astype("<f2"))
    # Ties of bfloat16 round away from zero (ARCHITECTURE.md); random float32 values almost never are ties.
    brain = job.pull("layers.0.weight", dtype="BF16")
    assert np.mean(brain != bfloat16_bits(whole)) < 1e-3
    np.testing.assert_allclose(from_bfloat16_bits(brain), whole, rtol=2**-8)


def test_torch_state_enters_by_set_state_with_its_step_count(make_cluster):
    """A job that continues from another's weights, averages and applied_count makes the same next step, bit for bit."""
    cluster = make_cluster(2)
    gradients = [random_arrays(seed) for seed in (11, 12)]
    jobs = []
    for name in ("first", "continued"):
        job = cluster.job(name, TENSORS, shard_elements=SMALL_SHARD_ELEMENTS)
        job.create()
        job.configure()
        job.join()
        jobs.append(job)
    first, continued = jobs
    first.load(random_arrays(10))
    first.step(gradients[0], [ADAMW])
    counts = {tensor.name: 1 for tensor in TENSORS}
    for slot in ("master", "exp_avg", "exp_avg_sq"):
        arrays = {tensor.name: first.pull(tensor.name, slot, "F32") for tensor in TENSORS}
        continued.set_state(arrays, slot=slot, dtype="F32", applied_counts=counts)
    continued.commit(kind="LOAD")
    for job in jobs:
        job.step(gradients[1], [ADAMW])
    assert first.snapshot() == continued.snapshot()


def test_lists_and_manifests_are_paged(make_cluster):
    tensors = [Tensor(f"layer.{i}.weight", (4,)) for i in range(5000)]
    cluster = make_cluster(2)
    job = cluster.job("paged", tensors)
    pages = [PlainJob(cluster.address, "paged", part).create_request(first=first, more=more)
             for part, first, more in ((tensors[:2000], 0, True), (tensors[2000:3500], 2000, True), (tensors[3500:], 3500, False))]
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "first", 2000, 0):
        job.job().CreateJob(pages[1], timeout=60)
    for page in (0, 1, 1):  # a page may be repeated
        assert job.job().CreateJob(pages[page], timeout=60).manifest_digest == stubs().types.Digest()
    created = job.job().CreateJob(pages[2], timeout=60)
    again = job.job().CreateJob(pages[2], timeout=60)
    assert created.manifest_digest == again.manifest_digest != stubs().types.Digest()
    assert (created.existed, again.existed) == (False, True)

    first, names = 0, []
    while True:
        page = job.job().GetManifest(stubs().job.GetManifestRequest(job="paged", first=first), timeout=60)
        assert len(page.tensors) <= 4096 and page.ByteSize() < 4 << 20
        names += [spec.name for spec in page.tensors]
        first = page.next
        if first == 0:
            break
    assert names == [tensor.name for tensor in tensors]
    first, names = 0, []
    while True:
        page = job.admin().ListTensors(stubs().admin.ListTensorsRequest(job="paged", first=first), timeout=60)
        assert len(page.tensors) <= 1024
        names += [summary.spec.name for summary in page.tensors]
        first = page.next
        if first == 0:
            break
    assert names == [tensor.name for tensor in tensors]
    job.read_placement()
    assert len(job.owners) == 5000


def test_layout_is_joined_by_pages_that_may_be_repeated(make_cluster):
    job = make_cluster(2).job("paged", TENSORS, shard_elements=SMALL_SHARD_ELEMENTS)
    job.create()
    job.configure()
    generation = job.job().Join(job.join_request(0, job.layout()), timeout=60).generation
    boxes = [{tensor.name: [(0, tensor.element_count)]} for tensor in TENSORS]
    for index in [*range(len(boxes)), len(boxes) - 1]:
        layout = job.layout(boxes=boxes[index])
        layout.first, layout.more = index, index + 1 < len(boxes)
        for _ in range(2):
            response = job.job().Join(job.join_request(0, layout, generation), timeout=60)
            assert response.generation == (0 if layout.more else generation)
    job.generation, job.epoch, job.attempt, job.committed_step = generation, response.epoch, response.attempt, response.committed_step
    job.read_placement()
    job.load(random_arrays(1))
    job.step(random_arrays(2), [ADAMW])


def test_exports_of_two_holders_overlap(make_cluster):
    """The version is kept until both are done; commits continue meanwhile."""
    job = make_cluster(2).job("held", TENSORS, shard_elements=SMALL_SHARD_ELEMENTS)
    job.create()
    job.configure()
    job.join()
    job.load(random_arrays(1))
    held = job.pull_all()
    job.hold(0, 60_000, "first")
    job.hold(0, 60_000, "second")
    assert job.step(random_arrays(2), [ADAMW]).step == 1
    job.hold(0, 0, "first")
    for name, array in job.pull_all(version=0).items():
        np.testing.assert_array_equal(array, held[name], err_msg=name)
    job.hold(0, 0, "second")
    assert not np.array_equal(job.pull("layers.0.weight", version=1), held["layers.0.weight"])
    with refused("OUT_OF_RANGE", "VERSION_GONE", 0, 1):
        job.pull("layers.0.weight", version=0)


def test_query_push_tells_slot_and_box_of_new_contents(make_cluster):
    job = make_cluster(1).job("told", TENSORS, shard_elements=SMALL_SHARD_ELEMENTS)
    job.create()
    job.configure()
    job.join()
    weights = random_arrays(1)
    parts = {"layers.0.weight": [(([0, 0], [10, 500]), weights["layers.0.weight"][:10, :500]),
                                 ((50_000, 256), weights["layers.0.weight"].reshape(-1)[50_000:50_256])]}
    job.set_state(parts)
    job.set_state({"layers.0.bias": weights["layers.0.bias"]}, slot="exp_avg")
    answer = job.query_push(job.addresses()[0])
    told = {(piece.region.tensor, piece.region.shard, piece.region.slot, tuple(piece.region.box.offset), tuple(piece.region.box.extent),
             piece.region.box.flat): piece.digest for piece in answer.pieces}
    assert told == {
        ("layers.0.weight", 0, "weight", (0, 0), (10, 500), False): piece_digest(weights["layers.0.weight"][:10, :500].tobytes()),
        ("layers.0.weight", 0, "weight", (50_000,), (256,), True):
            piece_digest(weights["layers.0.weight"].reshape(-1)[50_000:50_256].tobytes()),
        ("layers.0.bias", 0, "exp_avg", (0,), (300,), True): piece_digest(weights["layers.0.bias"].tobytes())}
    assert not answer.complete


def test_any_server_answers_the_admin_plane_and_only_the_leader_the_job_plane(make_cluster):
    cluster = make_cluster(3)
    job = cluster.job("asked", TENSORS, shard_elements=SMALL_SHARD_ELEMENTS)
    job.create()
    job.configure()
    job.join()
    job.load(random_arrays(1))
    messages = stubs().admin
    leader, others = cluster.servers[0].address, [server.address for server in cluster.servers[1:]]
    for method, request in [("ListServers", messages.ListServersRequest(job=job.name)), ("ListJobs", messages.ListJobsRequest()),
                            ("ListTensors", messages.ListTensorsRequest(job=job.name)),
                            ("DescribeTensor", messages.DescribeTensorRequest(job=job.name, tensor="layers.0.weight"))]:
        answers = [getattr(job.admin(address), method)(request, timeout=60) for address in (leader, *others)]
        assert answers[1:] == answers[:1] * 2, method
    for address, name in zip(others, cluster.names[1:]):
        assert job.admin(address).ServerStatus(messages.ServerStatusRequest(), timeout=60).name == name
        with refused("FAILED_PRECONDITION", "WRONG_STEP", job.name):
            job.admin(address).AcceptRollback(messages.AcceptRollbackRequest(job=job.name, to_step=0), timeout=60)
        with refused("FAILED_PRECONDITION", "NOT_LEADER", cluster.names[0]) as caught:
            job.connections.job(address).JobStatus(stubs().job.JobStatusRequest(job=job.name), timeout=60)
        assert detail_of(caught.value).server == cluster.names[0]


def test_standard_health_and_reflection_services_answer(make_cluster):
    """Checks the bytes on the wire: SERVING of grpc.health.v1 is field 1 = 1; reflection answers list_services."""
    cluster = make_cluster(1)
    channel = cluster.job("health", TENSORS).connections.channel(cluster.address)
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    assert check(b"", timeout=60) == b"\x08\x01"
    reflect = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    listed = b"".join(reflect(iter([b"\x3a\x01*"]), timeout=60))
    for service in (b"orlop.v1.Data", b"orlop.v1.Job", b"orlop.v1.Admin"):
        assert service in listed


def test_job_is_deleted_with_all_its_state(make_cluster, job_name):
    job = make_cluster(2).job(job_name, TENSORS, shard_elements=SMALL_SHARD_ELEMENTS)

    def uses(address):
        status = job.admin(address).ServerStatus(stubs().admin.ServerStatusRequest(), timeout=60)
        return [use for use in status.uses if use.job == job_name]

    job.create()
    job.configure()
    job.join()
    job.load(random_arrays(1))
    assert all(uses(address) for address in job.addresses())
    assert job.delete().existed
    assert not job.delete().existed
    for address in job.addresses():
        assert [use for use in uses(address) if use.bytes] == []
        wait_until(lambda: uses(address) == [])  # a call in progress may hold the last of it for a moment


def test_another_configuration_drops_a_load_left_half_way(make_cluster, job_name):
    cluster = make_cluster(2)
    weights = {"w": np.random.default_rng(1).standard_normal((128, 64)).astype("<f4")}
    job = cluster.job(job_name, [Tensor("w", (128, 64))], shard_elements=2048)
    job.create(seed=7)
    job.configure(job.groups(state="8bit"))
    job.join()
    job.set_state(weights)
    job.set_state({"w": np.ones((128, 64), "<f4")}, slot="exp_avg")
    assert job.configure(job.groups(state="fp32")).changed
    job.join()
    job.load(weights)
    assert np.array_equal(job.pull("w", "exp_avg"), np.zeros((128, 64), "<f4"))
    job.step(weights, [ADAMW])
    assert np.array_equal(job.pull("w", "exp_avg").astype("<f4"), np.float32(0.1) * weights["w"])


def test_a_world_of_the_largest_size_makes_a_step(make_cluster):
    """Every rank's Join and CommitStep wait at the same time, and the ranks push meanwhile."""
    ranks = 512  # kMaxWorldSize
    cluster = make_cluster(2)
    job = cluster.job("many", (Tensor("w", (256 * ranks,)),), shard_elements=128 * ranks)
    job.create()
    job.configure()
    job.join([job.layout(preset="FLAT_SLICES")] * ranks)
    weights, gradient = (np.random.default_rng(seed).standard_normal(256 * ranks).astype("f4") for seed in (1, 2))
    job.load({"w": weights})
    last = ranks - 1
    commits = [job.job().CommitStep.future(job.commit_request(rank, [ADAMW]), timeout=120) for rank in range(last)]
    for rank in range(ranks):
        job.push({"w": [((256 * rank, 256), gradient[256 * rank:256 * (rank + 1)])]}, rank=rank)
    response = job.job().CommitStep(job.commit_request(last, [ADAMW]), timeout=120)
    assert all(commit.result() == response for commit in commits)
    job.committed_step = response.step
    alone = cluster.job("one", (Tensor("w", (256 * ranks,)),), shard_elements=128 * ranks)
    alone.create()
    alone.configure()
    alone.join()
    alone.load({"w": weights})
    alone.step({"w": gradient}, [ADAMW])
    np.testing.assert_array_equal(job.pull("w"), alone.pull("w"))
