"""Slices, buckets and the collectives of a group, against brute force."""

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from orlop.job.workers import Bucket, Workers, slice_of


def test_slices_cover_every_element_once_on_block_boundaries():
    for count in (1, 255, 256, 257, 1000, 4096, 70001):
        for world_size in (1, 2, 3, 7):
            slices = [slice_of(count, rank, world_size) for rank in range(world_size)]
            assert [i for begin, end in slices for i in range(begin, end)] == list(range(count))
            assert all(begin % 256 == 0 for begin, end in slices if begin < end)


def test_buckets_hold_every_tensor_once_and_keep_dtypes_apart():
    tensors = {3: torch.zeros(1000), 5: torch.zeros(300, dtype=torch.bfloat16), 9: torch.zeros(9 << 20), 11: torch.zeros(10)}
    buckets = Bucket.pack(tensors, 2)
    for index, tensor in tensors.items():
        pieces = [p for b in buckets for segment in b.segments for p in segment if p.index == index]
        assert sum(p.end - p.begin for p in pieces) == tensor.numel()
        assert all(b.dtype == tensor.dtype for b in buckets for s in b.segments for p in s if p.index == index)


def _averages_and_gathers(rank: int, world_size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    workers = Workers()
    everyone = [{0: torch.randn(1000, generator=torch.Generator().manual_seed(r)),
                 1: torch.randn(5, generator=torch.Generator().manual_seed(r + 99))} for r in range(world_size)]
    gradients = dict(everyone[rank])
    if rank == 0:
        del gradients[1]  # counts as zero
    (bucket,) = Bucket.pack(everyone[0], world_size)
    expected = {0: sum(g[0] for g in everyone) / world_size, 1: sum(g[1] for g in everyone[1:]) / world_size}
    for piece, values in workers.average(bucket, gradients):
        torch.testing.assert_close(values, expected[piece.index][piece.begin:piece.end], rtol=1e-6, atol=1e-7)
    own = torch.arange(bucket.sizes[rank], dtype=torch.float32) + 1000 * rank
    for other, segment in enumerate(workers.gather(bucket, own)):
        assert torch.equal(segment, torch.arange(bucket.sizes[other], dtype=torch.float32) + 1000 * other)
    assert workers.any_of([rank == 0, rank == 1, False]) == [True, True, False]
    assert workers.agree({"rank": rank}) == {"rank": 0}
    assert workers.all_of({"rank": [rank] * rank * 1000}) == [{"rank": []}, {"rank": [1] * 1000}]
    dist.destroy_process_group()


def test_averages_and_gathers_as_brute_force_in_two_processes(tmp_path):
    multiprocessing.spawn(_averages_and_gathers, args=(2, str(tmp_path / "store")), nprocs=2)
