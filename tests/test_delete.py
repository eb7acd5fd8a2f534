"""Deletes a job while it runs."""
import concurrent.futures
import signal

import grpc
import numpy as np
import pytest

from clusters import wait_until
from plain_client import Tensor, stubs


def test_a_server_that_has_dropped_the_job_is_not_told_of_it_again(make_cluster):
    """The last server hangs, so the leader still has the job when it sends a step's message to a server that has dropped it."""
    cluster = make_cluster(3)
    job = cluster.job("doomed", (Tensor("w", (768,)),), shard_elements=256)
    job.create()
    job.configure()
    job.join()
    job.load({"w": np.ones(768, "f4")})

    def is_known(name):
        try:
            job.admin(cluster.servers[cluster.names.index(name)].address).ListTensors(
                stubs().admin.ListTensorsRequest(job="doomed"), timeout=10)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND, error
            return False
        return True

    assert is_known("server-1")
    hanging = cluster.servers[2].process
    hanging.send_signal(signal.SIGSTOP)
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            deleting = pool.submit(job.delete)
            wait_until(lambda: not is_known("server-1"))
            with pytest.raises(grpc.RpcError):  # the leader asks every server for the next attempt, and at most two answer
                job.job().AbortStep(stubs().job.AbortStepRequest(job="doomed", generation=job.generation, step=1, attempt=job.attempt),
                                    timeout=2)
            hanging.send_signal(signal.SIGCONT)
            assert deleting.result().existed
    finally:
        hanging.send_signal(signal.SIGCONT)
    assert not any(is_known(name) for name in cluster.names)
