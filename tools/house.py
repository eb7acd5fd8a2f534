#!/usr/bin/env python3
"""Checks the rules of tools/house_table.py: includes, Python imports, the guard of every header, and a target for every source.

    python3 tools/house.py [ROOT]     prints each fault as `FILE:LINE: fault` and exits with 1 if there is one
"""
from __future__ import annotations

import ast
import os
import pathlib
import re
import sys

from house_table import ELSEWHERE, EVERY, FACE, IMPURE, OUTSIDE, PACKAGE, PURE, ROOMS, WITHIN, WITHOUT_GUARD, Table

GUARD = "#pragma once"
SOURCE = (".h", ".cc", ".cc.in", ".cu.in")
INCLUDE = re.compile(r'#\s*include\s+([<"])([^">]+)[">]')


def tree(root: pathlib.Path) -> list[str]:
    """Paths of C++ and Python files under the root, except built and hidden ones."""
    found = []
    for where, folders, files in os.walk(root):
        here = pathlib.PurePath(where).relative_to(root)
        folders[:] = [f for f in folders if not f.startswith(".") and f not in ("build", "dist", "__pycache__")]
        found += [(here / f).as_posix() for f in files if f.endswith((*SOURCE, ".py"))]
    return sorted(found)


def folder_of(path: str) -> str:
    """The folder of a path as the table names it."""
    folder = path.rpartition("/")[0].removesuffix("/testing")
    return WITHIN.get(folder, folder)


def for_tests(path: str) -> bool:
    return "/testing/" in path or path.endswith("_test.cc")


def check_outside(user: str, bracket: str, name: str) -> str | None:
    """The fault of an include from outside the repository, or None."""
    is_standard = bracket == "<" and re.fullmatch(r"[a-z_]+", name)
    if user in OUTSIDE and not is_standard and not name.startswith(OUTSIDE[user]):
        return f"{user} may use only {', '.join(OUTSIDE[user])} from outside the repository"
    return None


def check_include(rooms: Table, path: str, bracket: str, name: str) -> str | None:
    """The fault of one include of a file, or None."""
    user, used = folder_of(path), folder_of(name)
    ours = {folder.split("/")[0] for folder in rooms.rows}
    if user in PURE and name in IMPURE and not for_tests(path):
        return f"{user} is pure: no clock, thread, lock, file or random number"
    if bracket == '"' and used in rooms.rows:
        if "/testing/" not in name:
            return rooms.fault(user, used, name.rpartition("/")[2].removesuffix(".h"), always=("base", "proto"))
        if rooms.order[used] > rooms.order[user]:
            return f"goes up: {used} is above {user}"
        return None if for_tests(path) or rooms.rows[user].includes == EVERY else "testing/ is for tests"
    if bracket == '"' and ("/" not in name or name.split("/")[0] in ours):
        return "no folder of the table; paths begin at the root"
    return None if for_tests(path) else check_outside(user, bracket, name)


def check_sources(root: pathlib.Path, files: list[str]) -> list[str]:
    """Faults of includes and guards."""
    rooms = Table(ROOMS)
    doors = [f"{room.folder}/{door}.h" for room in ROOMS if room.doors != EVERY for door in room.doors.split()]
    faults = [f"tools/house_table.py:1: names {door}, which does not exist" for door in doors if door not in files]
    for path in files:
        if not path.endswith(SOURCE):
            continue
        if folder_of(path) not in rooms.rows:
            faults.append(f"{path}:1: its folder has no row in tools/house_table.py")
            continue
        lines = (root / path).read_text().splitlines()
        for number, line in enumerate(lines, 1):
            include = INCLUDE.match(line)
            fault = include and check_include(rooms, path, *include.groups())
            if fault:
                faults.append(f"{path}:{number}: includes {include[2]}: {fault}")
        wanted = 0 if WITHOUT_GUARD.fullmatch(path) else 1
        if path.endswith(".h") and lines.count(GUARD) != wanted:
            faults.append(f"{path}:1: has {lines.count(GUARD)} lines `{GUARD}` instead of {wanted}")
    return faults


def in_a_target(path: str, calls: list[tuple[str, str, str]]) -> bool:
    """Whether a call in CMakeLists.txt compiles a source; cmake/orlop.cmake defines what each call takes."""
    folder, _, name = path.rpartition("/")
    is_test = name.endswith("_test.cc")
    for kind, first, second in calls:
        if kind == "library" and folder == first and not is_test and name != "main.cc":
            return True
        if kind == "binary" and path == f"{second}.cc":
            return True
        if kind == "test" and is_test and path.startswith(f"{first}/"):
            return True
        if kind == "test" and first == folder == "tests" and not name.endswith("_main.cc"):
            return True
    return False


def check_targets(root: pathlib.Path, files: list[str]) -> list[str]:
    """Sources that no target compiles."""
    calls = re.findall(r"^\s*orlop_(library|test|binary)\((\S+)\s+(\S+)", (root / "CMakeLists.txt").read_text(), re.M)
    faults = []
    for path in files:
        if not path.endswith(".cc") or in_a_target(path, calls):
            continue
        named = [place for pattern, place in ELSEWHERE.items() if pathlib.PurePath(path).match(pattern)]
        if not any(text in (root / file).read_text() for file, text in named):
            faults.append(f"{path}:1: is in no target of CMakeLists.txt")
    return faults


def imports_of(module: str, is_package: bool, text: str, modules: set[str]) -> list[tuple[int, str]]:
    """(line, module) of each import from the package, including imports in functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parts = parts[:len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*parts, node.module] if node.module else parts)
            names = (f"{base}.{alias.name}" for alias in node.names)
            found += [(node.lineno, name if name in modules else base) for name in names]
    return [(line, name) for line, name in dict.fromkeys(found) if name in modules and name != module]


def part_of(module: str, packages: set[str]) -> tuple[str, str]:
    """(row of PACKAGE, door) of a module: orlop.job.wire is ("job", "wire"), orlop.job ("job", "__init__")."""
    _, *path = [*module.split("."), *(["__init__"] if module in packages else [])]
    if len(path) > 1:
        return path[0], ".".join(path[1:])
    return ("face" if path[0] in FACE else "ground"), path[0]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, its first node repeated at the end, or []."""
    done: set[str] = set()

    def follow(path: list[str]) -> list[str]:
        for following in sorted(edges.get(path[-1], ())):
            if following in path:
                return [*path[path.index(following):], following]
            if following not in done and (found := follow([*path, following])):
                return found
        done.add(path[-1])
        return []

    return next((found for node in sorted(edges) if node not in done and (found := follow([node]))), [])


def check_package(root: pathlib.Path, files: list[str]) -> list[str]:
    """Faults of imports inside python/orlop."""
    table, faults, edges = Table(PACKAGE), [], {}
    paths = {path[len("python/"):-len(".py")].replace("/", ".").removesuffix(".__init__"): path
             for path in files if path.startswith("python/orlop/") and path.endswith(".py")}
    packages = {module for module, path in paths.items() if path.endswith("/__init__.py")}
    modules = {*paths, "orlop._core"}
    for module, path in paths.items():
        user, _ = part_of(module, packages)
        if user not in table.rows:
            faults.append(f"{path}:1: its folder has no row in tools/house_table.py")
            continue
        imports = imports_of(module, module in packages, (root / path).read_text(), modules)
        edges[module] = {used for _, used in imports}
        for line, used in imports:
            part, door = part_of(used, packages)
            fault = part in table.rows and table.fault(user, part, door)
            if fault:
                faults.append(f"{path}:{line}: imports {used}: {fault}")
    while found := circle(edges):
        faults.append(f"{paths[found[0]]}:1: imports form a circle: {' -> '.join(found)}")
        edges[found[-2]].discard(found[-1])
    return faults


def main() -> int:
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent)
    files = tree(root)
    faults = check_sources(root, files) + check_targets(root, files) + check_package(root, files)
    print(*faults, sep="\n", end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
