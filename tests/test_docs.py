"""The documents are true: the README's commands run as printed, and the files that ARCHITECTURE.md lists exist and name one another.

A fenced `sh` or `python` block of the README runs here unless the line before it is `<!-- not run: reason -->`. Blocks share one directory
and run from top to bottom, as a reader would run them from the root of the repository.
"""
import contextlib
import os
import pathlib
import re
import signal
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.*?) -->\n)?^```(?P<language>sh|python)\n(?P<text>.*?)^```$", re.M | re.S)
STOP = re.compile(r"^\d+\. (?P<mark>\*\*)?`(?P<path>[^`]+)`", re.M)  # an item of a route; files worth reading are bold
BLOCK_SECONDS = 300
WRITTEN = ("state", "readme-state", "readme.log", "demo-out")  # files that an earlier reader's run left behind


def readme_blocks():
    return list(BLOCK.finditer((ROOT / "README.md").read_text()))


@pytest.fixture
def reader_directory(tmp_path):
    """Return a directory that looks like the root of the built repository, where blocks may write."""
    for made in (".venv", "build/release/bin/orlopd"):
        if not (ROOT / made).exists():
            pytest.skip(f"{made} is not there: the README begins with `make`")
    for path in ROOT.iterdir():
        if not path.name.startswith(".git") and path.name not in WRITTEN:
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run_block(block, directory, environment, log):
    """Run one block in a session of its own; its background processes continue. Returns its process group."""
    if block["language"] == "sh":
        command = ["bash", "-euo", "pipefail", "-c", block["text"]]
    else:
        script = directory / "block.py"
        script.write_text(block["text"])
        command = [".venv/bin/python", str(script)]
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            status = process.wait(BLOCK_SECONDS)
        except subprocess.TimeoutExpired:
            status = "no end in sight"
    return process.pid, status


def end_group(group):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def test_commands_and_scripts_of_the_readme_run_as_printed(reader_directory, tmp_path_factory):
    blocks = readme_blocks()
    run = [block for block in blocks if block["reason"] is None]
    assert {block["language"] for block in run} == {"sh", "python"}, "the README must show commands and a script that run"
    environment = {name: value for name, value in os.environ.items() if name not in ("ORLOP_BIN_DIR", "ORLOP_SERVER", "PYTHONPATH")}
    log, groups = tmp_path_factory.mktemp("readme") / "log", []
    try:
        for block in run:
            group, status = run_block(block, reader_directory, environment, log)
            groups.append(group)
            assert status == 0, f"ended with {status}:\n{block['text']}\n--- printed:\n{log.read_text()}"
    finally:
        for group in groups:
            end_group(group)


def test_blocks_that_are_not_run_say_why():
    for block in readme_blocks():
        if block["reason"] is not None:
            assert len(block["reason"].split()) >= 3, block["text"]


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {target for block in readme_blocks() for target in re.findall(r"^make ([a-z-]+)", block["text"], re.M)}
    assert {"demo", "test"} <= named <= targets


def route(heading):
    """Return (path, whether it is marked) for each item of the numbered list under a heading of ARCHITECTURE.md."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    found = re.search(rf"^#+ {re.escape(heading)}$(?P<section>.*?)(?=^#|\Z)", text, re.M | re.S)
    assert found, f"ARCHITECTURE.md has no heading '{heading}'"
    return [(stop["path"], stop["mark"] is not None) for stop in STOP.finditer(found["section"])]


def check_route(what):
    """Check that all files of a route exist, and that the first line of each marked one has its number and names the next marked one."""
    stops = route(f"One {what}, file by file")
    for path, _ in stops:
        assert (ROOT / path).is_file(), f"ARCHITECTURE.md names {path}, which does not exist"
    marked = [path for path, is_marked in stops if is_marked]
    assert len(marked) >= 2
    for number, here in enumerate(marked, 1):
        first_line = (ROOT / here).read_text().splitlines()[0]
        assert f"One {what}, {number} of {len(marked)} (ARCHITECTURE.md)" in first_line, f"{here} begins with: {first_line}"
        if number < len(marked):
            assert first_line.endswith(f"next: {marked[number]}"), f"{here} does not name {marked[number]}"
    return [path for path, _ in stops], marked


def test_one_push_is_followed_file_by_file():
    """The route leads from the Python optimizer to the kernels."""
    files, marked = check_route("push")
    assert files[0] == marked[0]
    for path in (files, marked):
        assert path[0].startswith("python/orlop/") and path[-1].startswith("kernels/")


def test_one_pull_is_followed_file_by_file():
    """The route leads from Python to the bytes of a shard."""
    files, marked = check_route("pull")
    assert files[0] == marked[0] and files[0].startswith("python/orlop/")
    assert marked[-1].startswith("server/shards/")


def test_no_other_file_claims_a_place_on_a_route():
    """A file that left a route has lost its first line."""
    claims = re.compile(r"(?://|#) One (push|pull), \d+ of \d+ \(ARCHITECTURE\.md\)")
    sources = [path for folder in ("python", "client", "proto", "server", "kernels") for ending in ("*.py", "*.h", "*.cc")
               for path in (ROOT / folder).rglob(ending)]
    claiming = {(claim[1], path.relative_to(ROOT).as_posix()) for path in sources if (claim := claims.match(path.read_text()))}
    assert claiming == {(what, path) for what in ("push", "pull") for path, is_marked in route(f"One {what}, file by file") if is_marked}


def test_paths_that_the_documents_name_exist():
    """Paths in backticks that begin with a folder of the repository exist."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {"build"}
    for document in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"):
        for path in re.findall(r"`([\w./-]+/[\w./-]*\w)`", (ROOT / document).read_text()):
            if path.split("/")[0] in folders and "NAME" not in path:
                assert (ROOT / path).exists(), f"{document} names {path}, which does not exist"


def test_table_of_roles_is_the_one_of_the_code(bin_dir):
    printed = subprocess.run([bin_dir / "orlopd", "--print-rules"], capture_output=True, text=True, check=True).stdout
    assert printed.count("\n") > 20 and printed in (ROOT / "SECURITY.md").read_text()
