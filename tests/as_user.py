"""Run as root: become other users in turn; print what each is answered as JSON, by user: [method, job, code, reason] of every RPC and job.

    python as_user.py NUMBER,... ADDRESS        Modules are read before, since another user may not be able to read them
"""
import json
import os
import sys

import grpc

from test_roles import JOBS, MAY_CALL, outcome


def answers(user, address):
    os.setresuid(user, user, 0)  # of all threads; root may come back
    try:
        with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            return [[method, job, *outcome(channel, method, job)] for method in MAY_CALL for job in JOBS]
    finally:
        os.setresuid(0, 0, 0)


outcome(grpc.insecure_channel("unix:/nonexistent"), "Job/JobStatus", JOBS[0])  # imports what grpcio loads late
os.setgroups([])
print(json.dumps({user: answers(int(user), sys.argv[2]) for user in sys.argv[1].split(",")}))
