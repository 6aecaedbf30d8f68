"""Where the seconds from the command to the first step go, and what importing costs.

    python benchmarks/startup.py --out benchmarks/results/startup.json
    python benchmarks/startup.py --suite unit.xml smoke.xml --out benchmarks/results/suite.json

Every repeat starts each process anew, in turn: `microtron.train` on random tokens, from outside to
its first step's line and to its exit; the same with its parts timed from inside (wrapped here, so
that the product carries no clocks); that once more under `-X importtime`, added up by top-level
package; and the small commands. CPU seconds stand beside wall seconds: on a machine with other work
they are the ones to compare. `--suite` reads what `pytest --junitxml` wrote instead, and adds up
the seconds of the test suite by file.
"""

import argparse
import collections
import contextlib
import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = [
    f"--job.config_file={ROOT / 'train_configs' / 'debug.toml'}",
    "--data.mock",
    "--validation.no-enable",
    "--checkpoint.no-enable",
    "--sample.freq=0",
    "--training.steps=1",
    "--metrics.log_freq=1",
]
COMMANDS = {
    "python, nothing": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import microtron": ["-c", "import microtron"],
    "microtron --help": ["-m", "microtron.cli", "--help"],
    "microtron generate --help": ["-m", "microtron.cli", "generate", "--help"],
    "microtron prepare --help": ["-m", "microtron.cli", "prepare", "--help"],
}


class Parts:
    """Seconds by part of one process; what an inner part takes is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.inner = [0.0]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what is done within."""
        began = time.perf_counter()
        self.inner.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.seconds[name] += took - self.inner.pop()
            self.inner[-1] += took

    def wrap(self, owner: object, attribute: str, name: str) -> None:
        """Counts every call of ``owner.attribute`` from now on."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*given, **options):
            with self.part(name):
                return function(*given, **options)

        setattr(owner, attribute, timed)


def trained_within(out: Path, began: float, argv: list[str]) -> int:
    """A whole run in this process, its parts timed; ``began``: when the parent started it (s)."""
    parts = Parts()
    parts.seconds["interpreter"] = time.perf_counter() - began
    with parts.part("import torch"):
        import torch  # noqa: F401
    with parts.part("import torchtitan"):
        import microtron.accelerator  # noqa: F401

        import torchtitan.train as titan
    with parts.part("import microtron"):
        from microtron import parse, spec, startup, step, threads, train
        from microtron.parallel import layout
    for owner, attribute, name in (
        (parse, "parse", "options"),
        (layout, "check_layout", "options"),
        (threads, "pick_threads", "threads probed"),
        (startup, "open_folder", "folder"),
        (startup, "prepare_data", "data"),
        (titan.dist_utils, "init_distributed", "process group"),
        (spec, "build_tokenizer", "data"),
        (spec, "build_loader", "data"),
        (spec.Transformer, "__init__", "model"),
        (spec.Transformer, "init_weights", "model"),
        (spec, "parallelize", "model"),
        (spec, "build_optimizers", "optimizer"),
        (titan, "CheckpointManager", "checkpoint manager"),
        (train.Trainer, "__init__", "trainer, the rest"),
        (train.Trainer, "resume", "resume"),
    ):
        parts.wrap(owner, attribute, name)
    first_step = step.Stepper.train_step

    def last(self, batches):
        with parts.part("first step"):
            first_step(self, batches)
        total = time.perf_counter() - began
        parts.seconds["everything else"] = total - sum(parts.seconds.values())
        out.write_text(json.dumps({"total": total, "parts": parts.seconds}))

    step.Stepper.train_step = last
    return train.main(argv)


def process(arguments: list[str], until: str = "") -> dict[str, float]:
    """Wall and CPU seconds of ``python *arguments``; ``until``: also to the line that starts so.

    Raises:
        SystemExit: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, seen = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as told:
        command = [sys.executable, *arguments]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=told, text=True, cwd=ROOT
        ) as running:
            for line in running.stdout:
                if until and seen is None and line.startswith(until):
                    seen = time.perf_counter() - began
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        told.seek(0)
        if running.returncode or (until and seen is None):
            raise SystemExit(f"{' '.join(command)} failed ({running.returncode}): {told.read()}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, **({"first_step_s": seen} if until else {})}


def by_package(importtime: str) -> dict[str, float]:
    """Seconds of a process's imports by top-level package, from the text of `-X importtime`."""
    found: dict[str, float] = collections.defaultdict(float)
    for line in importtime.splitlines():
        own, _, rest = line.removeprefix("import time:").partition("|")
        if line.startswith("import time:") and own.strip().isdigit():
            found[rest.partition("|")[2].strip().split(".")[0]] += int(own) / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def columns(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The spread of each key over the repeats; a key that a repeat lacks is 0 there."""
    from common import summary  # not above: a process that is measured imports its own alone

    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: summary([row.get(key, 0.0) for row in rows]) for key in keys}


def measure(repeats: int, warmup: int, ranks: int, options: list[str]) -> dict[str, object]:
    """All processes, ``repeats`` times in turn."""
    rows: dict[str, list[dict[str, float]]] = collections.defaultdict(list)
    for number in range(-warmup, repeats):
        with tempfile.TemporaryDirectory() as name:
            folder, taken = Path(name), {}
            argv = [*RUN, *options]
            one = [*argv, f"--job.dump_folder={folder / 'one'}"]
            taken["run"] = process(["-m", "microtron.train", *one], until="step")
            if ranks > 1:
                many = [*argv, f"--job.dump_folder={folder / 'many'}"]
                launch = ["-m", "microtron.launch", "--nproc-per-node", str(ranks), "--", *many]
                taken[f"{ranks} ranks"] = process(launch, until="step")
            taken["parts"] = run_inside(folder, argv, [])["parts"]
            taken["imports"] = run_inside(folder, argv, ["-X", "importtime"])["imports"]
            taken |= {label: process(command) for label, command in COMMANDS.items()}
        if number >= 0:
            for label, row in taken.items():
                rows[label].append(row)
    return {label: columns(row) for label, row in rows.items()}


def run_inside(folder: Path, argv: list[str], flags: list[str]) -> dict[str, dict[str, float]]:
    """`trained_within` in a process of its own: its parts, and its imports by package."""
    out, told = folder / "parts.json", folder / "told.txt"
    inside = ["--within", str(out), repr(time.perf_counter()), *argv]
    command = [sys.executable, *flags, __file__, *inside, f"--job.dump_folder={folder / 'inside'}"]
    with told.open("w") as stderr:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=stderr, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {told.read_text()[-2000:]}")
    return json.loads(out.read_text()) | {"imports": by_package(told.read_text())}


def suite(files: list[Path]) -> dict[str, object]:
    """Seconds of the test suite: total, the slowest files and tests, from junit XML."""
    files_s: dict[str, float] = collections.defaultdict(float)
    tests_s, counts = [], collections.Counter()
    for file in files:
        for case in xml.parse(file).getroot().iter("testcase"):
            seconds = float(case.get("time"))
            files_s[case.get("classname")] += seconds
            tests_s.append((seconds, f"{case.get('classname')}::{case.get('name')}"))
            outcome = {child.tag for child in case} & {"failure", "error", "skipped"}
            counts[min(outcome, default="passed")] += 1

    def slowest(pairs: list[tuple[float, str]], most: int) -> dict[str, float]:
        return {name: round(seconds, 2) for seconds, name in sorted(pairs, reverse=True)[:most]}

    return {
        "tests": dict(counts),
        "total_s": round(sum(files_s.values()), 1),
        "slowest_files_s": slowest([(s, n) for n, s in files_s.items()], 10),
        "slowest_tests_s": slowest(tests_s, 10),
    }


def table(found: dict[str, object], most: int = 14) -> None:
    """Medians, with the least and the most."""
    for label in ("parts", "imports"):
        print(f"\n{label:28} {'s':>8} {'least':>8} {'most':>8}")
        pairs = sorted(found[label].items(), key=lambda pair: -pair[1]["median"])
        for name, row in pairs[:most]:
            print(f"  {name:26} {row['median']:8.3f} {row['min']:8.3f} {row['max']:8.3f}")
    print(f"\n{'command':28} {'wall s':>8} {'least':>8} {'most':>8} {'CPU s':>8} {'to step 1':>10}")
    for label, row in found.items():
        if "wall_s" in row:
            wall = row["wall_s"]
            first = f"{row['first_step_s']['median']:.2f}" if "first_step_s" in row else ""
            print(
                f"{label:28} {wall['median']:8.2f} {wall['min']:8.2f} {wall['max']:8.2f} "
                f"{row['cpu_s']['median']:8.2f} {first:>10}"
            )


def main() -> None:
    """Measures, prints, writes."""
    if sys.argv[1:2] == ["--within"]:
        sys.exit(trained_within(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="repeats that are not counted")
    parser.add_argument("--ranks", type=int, default=2, help="also under the launcher; 1: not")
    parser.add_argument("--suite", type=Path, nargs="+", help="junit XML files to add up instead")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("options", nargs="*", help="options of the run, after --")
    asked = parser.parse_args()
    from common import facts, write_json

    if asked.suite:
        found = suite(asked.suite)
        print(json.dumps(found, indent=1))
    else:
        found = measure(asked.repeats, asked.warmup, asked.ranks, asked.options)
        table(found)
        found = {"repeats": asked.repeats, "unit": "s", "rows": found}
    if asked.out:
        write_json(asked.out, found | facts())


if __name__ == "__main__":
    main()
