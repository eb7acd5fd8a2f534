"""The table of the house: which folders a folder may include, and through which doors. tools/house.py checks it.

Rows are in order. A folder may include only folders of rows above its own, so no include goes up and folders form no circle. A *door* is
a header that other folders may include; every other header is internal to its folder. Only `*_test.cc` files and `testing/` headers may
include headers of a `testing/` folder. A `testing/` folder belongs to the folder around it.
"""
from __future__ import annotations

import re
from dataclasses import dataclass

EVERY = "*"


@dataclass(frozen=True)
class Room:
    folder: str
    doors: str      # headers (or Python modules) without their ending; EVERY: each one of the folder
    includes: str   # folders, besides base/ and, below its row, proto/; EVERY: all folders, inner headers too


# C++. The protocol's generated headers, orlop/v1/*.pb.h, count as proto/.
ROOMS = [
    #    folder               doors                                      may include
    Room("base",              "box checksum handover mutex thread_pool", ""),
    Room("kernels",           "optimizer casts reduce quantize "
                              "int8_blocks tensor_pass "
                              "blocks types targets",                    ""),  # sizes of blocks, state formats, instruction sets
    Room("storage",           "store data_directory",                    ""),
    Room("server/step",       "leader participant layout job "
                              "messages actions reason check",           ""),  # what is coded, carried out, and answered
    Room("proto",             EVERY,                                     ""),
    Room("server/job",        EVERY,                                     "server/step kernels"),
    Room("server/memory",     "accountant message_room process_memory "
                              "read_room request_room",                  ""),
    Room("server/tiers",      "tier slot_home residency "
                              "job_room window served_hashes",           "server/memory server/job storage"),  # room of one apply
    Room("server/shards",     "shard_store shard_image piece_writer",    "server/tiers server/memory server/job server/step kernels"),
    Room("server/cluster",    EVERY,                                     "server/job kernels"),     # bytes that an element takes
    Room("server/durability", EVERY,                                     "server/cluster server/shards server/tiers "
                                                                         "server/memory "           # the disk's budget
                                                                         "server/job storage"),
    Room("server/runtime",    "job_table environment answers "
                              "step_scalars wait",                           "server/durability server/cluster server/shards server/tiers "
                                                                         "server/job server/step storage "
                                                                         "kernels"),                # hyper-parameters of a step
    Room("server/lanes",      EVERY,                                     "server/runtime server/shards "
                                                                         "server/job server/step"),  # regions, reasons
    Room("server/services",   EVERY,                                     "server/lanes server/runtime server/cluster "
                                                                         "server/shards server/tiers server/memory "
                                                                         "server/job server/step "
                                                                         "kernels"),                # for what they list and refuse
    Room("server",            "orlop_server",                            "server/services server/runtime server/cluster "
                                                                         "server/tiers server/memory storage "
                                                                         "kernels"),                # what the program sets up
    Room("client/link",       EVERY,                                     ""),
    Room("client/lanes",      EVERY,                                     "client/link"),
    Room("client",            "client session",                          "client/lanes client/link"),
    Room("cli/print",         EVERY,                                     ""),
    Room("bench",             "bench",                                   "cli/print client kernels"),
    Room("cli",               "",                                        "bench cli/print client"),
    Room("python/core",       "",                                        "client kernels"),
    Room("tests",             "",                                        EVERY),
    Room("fuzz",              "",                                        EVERY),
    Room("examples/cpp",      "",                                        EVERY),
    Room("cmake",             "",                                        ""),  # the precompiled header
]
# Folders without a row: the kernels are one room, and generated headers belong to proto.
WITHIN = {"kernels/optimizers": "kernels", "kernels/cuda": "kernels", "orlop/v1": "proto"}

# The simulator replays these folders, so they use no clock, thread, lock, file or random number.
PURE = ("server/step", "server/job")
IMPURE = {"atomic", "chrono", "condition_variable", "ctime", "filesystem", "fstream", "mutex", "random", "shared_mutex", "thread",
          "base/mutex.h", "base/thread_pool.h"}
# These folders include no other headers from outside the repository and the language.
OUTSIDE = {"base": ("absl/", "xxhash.h", "pthread.h", "sched.h", "sanitizer/tsan_interface.h"), "server/step": ("absl/",)}

# Headers that a source includes more than once: vector code for each instruction set, and rules of optimizers inside a namespace.
WITHOUT_GUARD = re.compile(r"kernels/(optimizers/\w+\.h|(cuda/)?[\w-]+-inl\.h)")

# C++ sources that CMakeLists.txt does not compile: the file that names each of them, and the text there.
ELSEWHERE = {"python/core/*.cc": ("python/CMakeLists.txt", "/core/*.cc"),
             "examples/cpp/least_squares.cc": ("examples/cpp/CMakeLists.txt", "least_squares.cc"),
             "fuzz/*.cc": ("cmake/fuzz.cmake", "/fuzz/*.cc"),
             "tests/simulator_main.cc": ("tests/planted_bugs.py", "simulat*")}

# Python, in python/orlop/. "ground" is every module outside the folders, except those of FACE.
PACKAGE = [
    #    part        doors                      may import
    Room("ground",   EVERY,                     ""),
    Room("job",      "job",                     "ground"),
    Room("state",    "checkpoint",              "job ground"),
    Room("optim",    "__init__",                "state job ground"),
    Room("sharded",  "shard",                   "job ground"),
    Room("face",     "",                        "sharded optim state job ground"),
]
FACE = ("__init__", "session", "local")


class Table:
    """Rows by folder, and their order."""

    def __init__(self, rows: list[Room]):
        self.rows = {row.folder: row for row in rows}
        self.order = {row.folder: place for place, row in enumerate(rows)}

    def fault(self, user: str, used: str, name: str, always: tuple[str, ...] = ()) -> str | None:
        """The reason why folder `user` may not use `name` of folder `used`, or None."""
        row, doors = self.rows[user], self.rows[used].doors
        if used == user or row.includes == EVERY:
            return None
        if self.order[used] > self.order[user]:
            return f"goes up: {used} is above {user}"
        if used not in (*row.includes.split(), *always):
            return f"{user} may not use {used}, but {row.includes or 'nothing else'}"
        if doors != EVERY and name not in doors.split():
            return f"an inner part of {used}, whose doors are: {doors or 'none'}"
        return None
