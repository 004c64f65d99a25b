"""Coverage-guided fuzzing of the parsers, and the replay of what it found.

usage: run.py fuzz TARGET [--seconds N]      needs atheris (the extra "fuzz")
       run.py minimise TARGET                keeps of corpus and finds what covers more, smallest first
       run.py replay TARGET                  each input of the corpus once, within bounds
       run.py list                           the targets

Inputs found go to ``.cache/fuzz/TARGET``; an input that is a finding, to ``.cache/fuzz/TARGET-findings``.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
FOUND = HERE.parents[1] / ".cache/fuzz"

#: Seconds that one input may take, on a busy machine.
TIME_LIMIT = 20
#: MiB that one input may make the process grow by. A zstd window has 128.
MEMORY_LIMIT = 384
#: Bytes of one target's corpus in the repository.
CORPUS_LIMIT = 100_000


def fuzz(name: str, seconds: int) -> int:
    """Run the fuzzer in a process of its own, tell what it did; its exit code."""
    found, findings = FOUND / name, FOUND / f"{name}-findings"
    for directory in (found, findings):
        directory.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-timeout={TIME_LIMIT}", "-rss_limit_mb=1500"]
    options += ["-print_final_stats=1", "-verbosity=1", f"-artifact_prefix={findings}/"]
    dictionary = HERE / "dictionaries" / f"{name}.dict"
    if dictionary.exists():
        options.append(f"-dict={dictionary}")
    argv = [sys.executable, __file__, "child", name, str(found), *options]
    if (CORPUS / name).is_dir():
        argv.append(str(CORPUS / name))
    before = {path.name for path in findings.iterdir()}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        start = time.monotonic()
        child = subprocess.run(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            env=os.environ | {"TMPDIR": scratch},
        )
        elapsed = time.monotonic() - start
    (FOUND / f"{name}.log").write_text(child.stdout)
    result: dict[str, Any] = {"target": name, "seconds": round(elapsed)} | _figures(child.stdout)
    result["findings"] = sorted({path.name for path in findings.iterdir()} - before)
    print(json.dumps(result))
    with (FOUND / "results.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    if result["findings"] or child.returncode:
        print(child.stdout[-4000:], file=sys.stderr)
    return child.returncode


def _figures(log: str) -> dict[str, int]:
    executed = re.findall(r"^(?:#|stat::number_of_executed_units: )(\d+)", log, re.MULTILINE)
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log)
    cov, features, inputs = covered[-1] if covered else (0, 0, 0)
    return {
        "executions": int(executed[-1]) if executed else 0,
        "coverage": int(cov),
        "features": int(features),
        "inputs": int(inputs),
    }


def child(name: str, options: list[str]) -> None:
    """The fuzzer itself: never returns."""
    import atheris

    with atheris.instrument_imports(include=["hostimaged", "hostimage_dbus", "tomllib"]):
        from targets import TARGETS, execute
    from mutators import MUTATORS

    tried = TARGETS[name]
    mutator = MUTATORS.get(name)

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        assert mutator is not None
        return mutator(data, atheris.Mutate, limit, Random(seed))[:limit]

    def test_one(data: bytes) -> None:
        execute(tried, data)

    extra: dict[str, Any] = {"custom_mutator": mutate} if mutator is not None else {}
    atheris.Setup([sys.argv[0], *options, f"-max_len={tried.max_length}"], test_one, **extra)
    atheris.Fuzz()


def replay(name: str) -> int:
    """Every input of the corpus, in a process that may not grow without bounds."""
    from targets import TARGETS, execute

    tried = TARGETS[name]
    files = sorted((CORPUS / name).iterdir())
    if files:
        # What is imported and made once does not count.
        execute(tried, files[0].read_bytes())
    size = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    limit = size + (MEMORY_LIMIT << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    slowest = 0.0
    for file in files:
        data = file.read_bytes()
        faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
        start = time.monotonic()
        try:
            execute(tried, data)
        except BaseException as error:
            error.add_note(f"on {file}")
            raise
        slowest = max(slowest, time.monotonic() - start)
        faulthandler.cancel_dump_traceback_later()
    print(f"{name}: {len(files)} inputs, slowest {slowest:.3f} s")
    return 0


def minimise(name: str) -> int:
    """Replace the corpus by few small inputs that reach what is reached by it and by what was found.

    Inputs named ``regression-…`` stay.
    """
    from targets import TARGETS, execute

    tried = TARGETS[name]
    directories = [directory for directory in (CORPUS / name, FOUND / name) if directory.is_dir()]
    files = [path for directory in directories for path in directory.iterdir()]
    kept = [path.read_bytes() for path in files if path.name.startswith("regression")]
    others = {path.read_bytes() for path in files} - {*kept}
    steps = {data: _steps_of(lambda data=data: execute(tried, data)) for data in sorted(others)}
    missing = set().union(*steps.values())
    reachable = len(missing)
    for data in kept:
        missing -= _steps_of(lambda data=data: execute(tried, data))
    chosen: list[bytes] = []
    room = CORPUS_LIMIT - sum(map(len, kept))
    # The usual greedy choice: what brings most for its size, which counts from that of a block.
    while fitting := [data for data in steps if len(data) <= room and steps[data] & missing]:
        best = max(fitting, key=lambda data: len(steps[data] & missing) / (512 + len(data)))
        missing -= steps.pop(best)
        room -= len(best)
        chosen.append(best)
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    for path in (CORPUS / name).iterdir():
        if not path.name.startswith("regression"):
            path.unlink()
    for data in chosen:
        (CORPUS / name / _name_of(data)).write_bytes(data)
    print(f"{name}: {len(chosen)} of {len(others)} inputs, {CORPUS_LIMIT - room} bytes", end="")
    print(f", {reachable - len(missing)} of {reachable} steps")
    return 0


def _name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _steps_of(call: Any) -> set[tuple[str, int, int]]:
    """Pairs of successive lines of ours that a call runs, in any thread."""
    edges: set[tuple[str, int, int]] = set()

    def trace(frame: Any, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        if "/hostimaged/" not in name:
            return None
        last = [frame.f_lineno]

        def inner(frame: Any, event: str, _: object) -> Any:
            edges.add((name, last[0], frame.f_lineno))
            last[0] = frame.f_lineno
            return inner

        return inner

    threading.settrace(trace)
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
    return edges


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=["fuzz", "minimise", "replay", "list"])
    parser.add_argument("target", nargs="?", default="", help="without one: each in turn")
    parser.add_argument("--seconds", type=int, default=600)
    if len(sys.argv) > 2 and sys.argv[1] == "child":
        child(sys.argv[2], sys.argv[3:])
    arguments = parser.parse_args()
    from targets import TARGETS

    if arguments.command == "list":
        print("\n".join(sorted(TARGETS)))
        return 0
    names = [arguments.target] if arguments.target else sorted(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no target {unknown.pop()}")
    commands = {"fuzz": partial(fuzz, seconds=arguments.seconds), "minimise": minimise, "replay": replay}
    return max(commands[arguments.command](name) for name in names)


if __name__ == "__main__":
    sys.exit(main())
