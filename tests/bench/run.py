"""Benchmarks beside cfsctl: both do the same work in turn, and ratios of medians are printed.

usage: run.py [--rounds N] [--cache DIR] [--where DIR] [--prefix COMMAND] [--list] [WORD …]

Each run is a process of its own; time is wall time from start to exit, and the processor time of all its
processes. Absolute times mean little on shared machines: read the ratios. Memory is that of all processes of
a program together, skopeo aside.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import measure
from material import SMALL_FILES, Material
from measure import Measured

from hostimage_testing.host import scratch_host
from hostimage_testing.registry import Registry, running_registry
from hostimage_testing.tools import find
from hostimaged.composefs.fsverity import Algorithm
from hostimaged.composefs.repository import Repository, Verity

HERE = Path(__file__).parent


class Program:
    """One of the two: how it makes an empty repository below a directory, and works with it."""

    def __init__(self, cfsctl: str, registries: Path) -> None:
        self._cfsctl = cfsctl
        self._registries = registries
        # The skopeo of cfsctl looks for its configuration below the home directory.
        self.environment = os.environ | {"HOME": str(registries.parents[2])}


class Ours(Program):
    """hostimaged, in processes as its workers are."""

    name = "hostimaged"

    def prepare(self, root: Path, algorithm: Algorithm) -> None:
        host = scratch_host(root, registries=self._registries.read_text())
        Repository.init(host.repository, algorithm=algorithm, verity=Verity.OPPORTUNISTIC)[0].close()
        self.environment |= {"PYDANTIC_DISABLE_PLUGINS": "1"}

    def pull(self, root: Path, image: str) -> list[str]:
        return [sys.executable, "-P", str(HERE / "pull_once.py"), str(root), image]

    def image(self, root: Path) -> list[str]:
        return [sys.executable, "-P", str(HERE / "image_once.py"), str(root)]

    def fsck(self, root: Path) -> list[str]:
        return self._tool(root, "fsck")

    def gc(self, root: Path, *options: str) -> list[str]:
        return self._tool(root, "gc", *options)

    def _tool(self, root: Path, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "hostimaged.composefs", *arguments, str(self.repository(root))]

    def repository(self, root: Path) -> Path:
        return root / "sysroot/composefs"


class Theirs(Program):
    """cfsctl."""

    name = "cfsctl"

    def _command(self, root: Path, *arguments: str) -> list[str]:
        return [self._cfsctl, "--repo", str(root / "repository"), "--insecure", *arguments]

    def prepare(self, root: Path, algorithm: Algorithm) -> None:
        root.mkdir()
        init = [self._cfsctl, "init", "--insecure", "--algorithm", algorithm.identifier]
        subprocess.run([*init, str(root / "repository")], check=True, stdout=subprocess.DEVNULL)

    def pull(self, root: Path, image: str) -> list[str]:
        return self._command(root, "oci", "pull", image, "image")

    def image(self, root: Path) -> list[str]:
        return self._command(root, "oci", "compute-id", "image")

    def fsck(self, root: Path) -> list[str]:
        return self._command(root, "fsck")

    def gc(self, root: Path, *options: str) -> list[str]:
        return self._command(root, "gc", *options)

    def repository(self, root: Path) -> Path:
        return root / "repository"


@dataclass(frozen=True)
class Scenario:
    """``before`` gives images that are pulled first, ``image`` the one that is; ``do`` is what is timed."""

    name: str
    image: Callable[[Material], str]
    before: Callable[[Material], str] | None = None
    do: str = "pull"
    algorithm: Algorithm = Algorithm.SHA512


def debian(layers: str, kind: str) -> Callable[[Material], str]:
    """The Debian of ``one`` or ``eight`` layers, ``gzip``, ``zstd`` or ``plain``."""
    if kind == "plain":
        return lambda m: f"oci:{m.plain()}:{layers}"
    return lambda m: f"oci:{m.debian()}:{layers}-{kind}"


def scenarios(registry: Callable[[str], str]) -> Iterator[Scenario]:
    """All of them; ``registry`` copies an image to a registry, which it starts, and gives its name there."""
    for where in ("", "registry, "):
        for layers in ("one", "eight"):
            for kind in ("gzip", "zstd", "plain"):
                image = debian(layers, kind)
                remote = lambda m, image=image: registry(image(m))  # noqa: E731
                yield Scenario(f"pull, {where}{layers} {kind}", remote if where else image)
    eight = debian("eight", "gzip")
    yield Scenario("pull again, eight gzip", eight, eight)
    yield Scenario(
        "pull update, one of eight",
        lambda m: f"oci:{m.update()}:after",
        lambda m: f"oci:{m.update()}:before",
    )
    for count in SMALL_FILES:
        yield Scenario(f"pull, {count} files", lambda m, n=count: f"oci:{m.small(n)}:image")
    yield Scenario("pull, 4 files of 512 MiB", lambda m: f"oci:{m.large()}:image")
    for name, image in (("Debian", eight), ("100000 files", lambda m: f"oci:{m.small(100_000)}:image")):
        yield Scenario(f"EROFS image, {name}", image, image, "image")
    for algorithm in Algorithm:
        yield Scenario(f"fsck, Debian, {algorithm.label}", eight, eight, "fsck", algorithm)
    for count in SMALL_FILES:
        image = lambda m, n=count: f"oci:{m.small(n)}:image"  # noqa: E731
        yield Scenario(f"gc, nothing, {count} files", image, image, "gc --dry-run")
        yield Scenario(f"gc, everything, {count} files", image, image, "gc")


class Bench:
    """Runs scenarios, below the directory ``work``."""

    def __init__(
        self,
        material: Material,
        programs: tuple[Ours, Theirs],
        work: Path,
        rounds: int,
        prefix: list[str],
    ) -> None:
        self._material = material
        self._prefix = prefix
        self._programs = programs
        self._work = work
        self._rounds = rounds

    def run(self, scenario: Scenario) -> str:
        """One line of results; the programs take turns at being first."""
        image = scenario.image(self._material)
        before = scenario.before(self._material) if scenario.before is not None else None
        results = {program.name: Measured() for program in self._programs}
        outputs = set()
        for number in range(self._rounds + 1):
            for program in self._programs if number % 2 else reversed(self._programs):
                result = results[program.name]
                root = self._work / program.name
                program.prepare(root, scenario.algorithm)
                if before is not None:
                    measure.run(program.pull(root, before), None, program.environment)
                argv = self._argv(program, scenario, root, image)
                measure.settle(root)
                if number < self._rounds:
                    argv = [*self._prefix, *argv]
                    outputs.add(measure.run(argv, result, program.environment).split()[-1])
                else:
                    measure.peak(argv, result, program.environment)
                shutil.rmtree(root)
        if scenario.do == "image" and len({output.rpartition(":")[2] for output in outputs}) != 1:
            raise SystemExit(f"{scenario.name}: the images differ: {outputs}")
        ours, theirs = results.values()
        return (
            f"{scenario.name:28} {ours.median:8.2f} {theirs.median:8.2f} {ours.median / theirs.median:8.2f}"
            f" {ours.median_processor:10.2f} {theirs.median_processor:8.2f}"
            f" {ours.peak_kib / 1024:9.0f} {theirs.peak_kib / 1024:8.0f}"
        )

    @staticmethod
    def _argv(program: Ours | Theirs, scenario: Scenario, root: Path, image: str) -> list[str]:
        if scenario.do == "image":
            return program.image(root)
        if scenario.do == "gc":
            # Nothing is referred to any more.
            shutil.rmtree(program.repository(root) / "streams/refs")
        if scenario.do.startswith("gc"):
            return program.gc(root, *scenario.do.split()[1:])
        return program.fsck(root) if scenario.do == "fsck" else program.pull(root, image)


class Remote:
    """A registry on this machine, started when the first image is copied to it."""

    def __init__(self, stack: ExitStack, directory: Path, registries: Path) -> None:
        self._stack = stack
        self._directory = directory
        self._registries = registries
        self._registry: Registry | None = None
        self._names: dict[str, str] = {}

    def __call__(self, image: str) -> str:
        """The name of ``image`` there."""
        if self._registry is None:
            self._registry = self._stack.enter_context(running_registry(self._directory))
            self._registries.write_text(self._registry.registries_conf)
        if image not in self._names:
            name = f"docker://{self._registry.host}/debian:{len(self._names)}"
            copy = ["skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false"]
            subprocess.run([*copy, "--preserve-digests", image, name], check=True)
            self._names[image] = name
        return self._names[image]


def main() -> None:
    """Run the chosen scenarios and print a table."""
    parser = argparse.ArgumentParser(description="benchmarks beside cfsctl")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each program per scenario")
    parser.add_argument("--cache", type=Path, default=Path(".cache/bench"), help="keeps the images")
    parser.add_argument("--where", type=Path, help="where repositories are made [the cache]")
    parser.add_argument("--prefix", default="", help="begins each timed command, such as 'chrt -r 1'")
    parser.add_argument("--list", action="store_true", help="print the names of all scenarios")
    parser.add_argument("scenario", nargs="*", help="only scenarios whose name contains one of these words")
    args = parser.parse_args()
    cfsctl = find("cfsctl")
    if cfsctl is None:
        raise SystemExit("cfsctl is not installed: nothing to compare with")
    args.cache.mkdir(parents=True, exist_ok=True)
    where = args.where or args.cache
    with tempfile.TemporaryDirectory(dir=where) as directory, ExitStack() as stack:
        work = Path(directory)
        registries = work / "home/.config/containers/registries.conf"
        registries.parent.mkdir(parents=True)
        registries.touch()
        material = Material(args.cache.absolute())
        chosen = [
            scenario
            for scenario in scenarios(Remote(stack, work / "registry", registries))
            if not args.scenario or any(word in scenario.name for word in args.scenario)
        ]
        if args.list:
            print(*(scenario.name for scenario in chosen), sep="\n")
            return
        print(f"{'':28} {'seconds':>17} {'':8} {'processor s':>19} {'peak MiB':>18}")
        print(f"{'':28} {'ours':>8} {'cfsctl':>8} {'ratio':>8} {'ours':>10} {'cfsctl':>8}", end="")
        print(f" {'ours':>9} {'cfsctl':>8}")
        programs = Ours(cfsctl, registries), Theirs(cfsctl, registries)
        bench = Bench(material, programs, work, args.rounds, shlex.split(args.prefix))
        for scenario in chosen:
            print(bench.run(scenario), flush=True)


if __name__ == "__main__":
    main()
