"""Saving and loading checkpoints: GB/s against the disk, and what a save costs a running training.

    python benchmarks/checkpoint.py --out benchmarks/results/checkpoint.json
    python benchmarks/checkpoint.py --config train_configs/gpt_oss_656m_1gpu.toml    # on a GPU

A run's own Trainer saves and loads (weights, Adam's two moments, schedule, data position; with
fsync, as in training), beside torch.save and torch.load of the same state, and beside the disk's
ceiling: a plain write, or read, of as many bytes. Written files are timed in the page cache and on
the disk (fsync); reads from the cache, and from the disk (the files dropped from the cache first).

A stall is what a save adds to the steps around it: so many steps with a save after the first, the
wait for the rest of the writing included, less the same steps without one. The share is that of a
run which saves every `checkpoint.interval` steps. Candidates take turns; medians are reported.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import facts, interleave, our_trainer, seconds_of, summary, synchronise, write_json

ROOT = Path(__file__).resolve().parent.parent
DEBUG = ROOT / "train_configs" / "debug.toml"
RECIPE = ROOT / "train_configs" / "gpt_oss_656m.toml"  # whose interval the share is reckoned with
PIECE = 1 << 24  # bytes a plain write or read hands over at once


def sized(parameters: int) -> list[str]:
    """Options of a model of about so many parameters: 8 layers of 8 experts, all widths equal."""
    width = max(32, round((parameters / 224) ** 0.5 / 32) * 32)
    fields = {"dim": width, "expert_dim": width, "n_layers": 8, "num_experts": 8, "top_k": 1}
    fields |= {"head_dim": 32, "n_heads": width // 32, "n_kv_heads": 1}
    small = ["--training.seq_len=32", "--training.local_batch_size=1"]
    return [f"--model.args.{k}={v}" for k, v in fields.items()] + [
        *small,
        "--training.global_batch_size=1",
    ]


@contextlib.contextmanager
def stepped(argv: list[str]) -> Iterator[Any]:
    """A Trainer that has made one step (so that Adam has state) and saves when it is told to."""
    options = ["--checkpoint.enable", "--checkpoint.interval=1", "--checkpoint.keep_latest_k=0"]
    with our_trainer([*argv, *options, "--checkpoint.async_mode=async"]) as trainer:
        trainer.batches = trainer.batch_generator(trainer.dataloader)
        one_step(trainer)
        yield trainer


def one_step(trainer: Any) -> None:
    """A step of training; the device has done it when this returns."""
    trainer.step += 1
    trainer.train_step(trainer.batches)
    synchronise()


def set_mode(trainer: Any, mode: str) -> None:
    """What checkpoint.async_mode does to TorchTitan's manager, of which there is one here."""
    from torchtitan.components.checkpoint import AsyncMode

    manager = trainer.checkpointer
    settle(manager)
    manager.async_mode = AsyncMode(mode)
    manager.enable_staging = mode == "async_with_pinned_mem"
    manager.staging = False


def settle(manager: Any) -> None:
    """Waits for a save that is under way."""
    if manager.save_future is not None:
        manager.save_future.result()
        manager.save_future = None


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Every tensor that a checkpoint holds, by name."""
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict
    from torch.distributed.checkpoint.state_dict_saver import _stateful_to_state_dict

    states = _stateful_to_state_dict(trainer.checkpointer._flattened_model_states_sd())
    return {k: v for k, v in flatten_state_dict(states)[0].items() if isinstance(v, torch.Tensor)}


def remove(path: Path) -> None:
    """A file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def files_of(path: Path) -> list[Path]:
    """The files of a folder, or the file."""
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]


def drop(path: Path) -> None:
    """Out of the page cache: the next read comes from the disk."""
    for file in files_of(path):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_plain(path: Path, size: int, sync: bool) -> None:
    """``size`` bytes from memory to a file."""
    piece = memoryview(bytearray(PIECE))
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, PIECE):
            file.write(piece[: min(PIECE, size - start)])
        if sync:
            os.fsync(file.fileno())


def read_plain(path: Path) -> None:
    """A file to memory."""
    piece = bytearray(PIECE)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(piece):
            pass


def rates(trainer: Any, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds and GB/s of every way to write, then of every way to read; bytes of the state."""
    state = state_of(trainer)
    size = sum(tensor.nbytes for tensor in state.values())
    step, single, plain = trainer._step_folder(trainer.step), folder / "torch.pt", folder / "plain"
    set_mode(trainer, "disabled")

    def torch_load() -> None:
        for name, tensor in torch.load(single, weights_only=True).items():
            state[name].copy_(tensor)

    ways = {
        "microtron": (lambda: trainer.checkpointer.load(trainer.step), step),
        "torch.load": (torch_load, single),
        "plain read": (lambda: read_plain(plain), plain),
    }
    rows = {
        "save": in_turn(writers(trainer, state, size, (step, single, plain)), repeats),
        "load": in_turn(
            {
                f"{name}, {'disk' if cold else 'page cache'}": reader(load, path, cold)
                for cold in (False, True)
                for name, (load, path) in ways.items()
            },
            repeats,
        ),
    }
    for path in (step, single, plain):
        remove(path)
    return {
        what: {
            name: {"seconds": seconds, "gb_per_s": summary([size / 1e9 / s for s in seconds])}
            for name, seconds in found.items()
        }
        for what, found in rows.items()
    } | {"bytes": size}


def writers(
    trainer: Any, state: dict[str, torch.Tensor], size: int, paths: tuple[Path, Path, Path]
) -> dict[str, Callable[[], float]]:
    """Name -> its seconds, each to a file or folder that is not there yet."""
    step, single, plain = paths

    def save() -> None:
        trainer._save(last=False)

    def save_with_checksums() -> None:
        torch.serialization.set_crc32_options(True)
        save()
        torch.serialization.set_crc32_options(False)

    def torch_save(sync: bool) -> None:
        with open(single, "wb") as file:
            torch.save(state, file)
            file.flush()
            if sync:
                os.fsync(file.fileno())

    def anew(write: Callable[[], None], path: Path) -> Callable[[], float]:
        def timed() -> float:
            remove(path)
            os.sync()  # what others have not written yet is not this one's to wait for
            return seconds_of(write)

        return timed

    return {
        "microtron": anew(save, step),
        "microtron, CRC-32": anew(save_with_checksums, step),
        "torch.save, fsync": anew(lambda: torch_save(True), single),
        "plain write, fsync": anew(lambda: write_plain(plain, size, True), plain),
        "torch.save, page cache": anew(lambda: torch_save(False), single),
        "plain write, page cache": anew(lambda: write_plain(plain, size, False), plain),
    }


def reader(load: Callable[[], object], path: Path, cold: bool) -> Callable[[], float]:
    """Its seconds, from the disk or from the page cache, until the device has what was read."""

    def timed() -> float:
        drop(path) if cold else [read_plain(file) for file in files_of(path)]
        return seconds_of(load)

    return timed


def in_turn(candidates: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """The seconds that each call says it took, candidates taking turns; the first is not kept."""
    said: dict[str, list[float]] = {name: [] for name in candidates}
    calls = {name: (lambda n=name: said[n].append(candidates[n]())) for name in candidates}
    interleave(calls, repeats, warmup=1)
    return {name: seconds[1:] for name, seconds in said.items()}


def stalls(trainer: Any, modes: list[str], steps: int, repeats: int) -> dict[str, Any]:
    """Seconds that one save adds to ``steps`` steps, by mode; and of the call alone."""
    calls: dict[str, list[float]] = {mode: [] for mode in modes}
    trainer.batches = trainer.batch_generator(trainer.dataloader)  # loading ended the last one

    def cycle(mode: str | None) -> float:
        set_mode(trainer, mode or "disabled")
        os.sync()
        began = time.perf_counter()
        for number in range(steps):
            one_step(trainer)
            if mode and number == 0:
                asked = time.perf_counter()
                trainer._save(last=False)
                calls[mode].append(time.perf_counter() - asked)
                saved = trainer._step_folder(trainer.step)
        if mode:
            settle(trainer.checkpointer)
        took = time.perf_counter() - began
        if mode:
            remove(saved)
        return took

    cycles = in_turn(
        {"none": lambda: cycle(None), **{m: (lambda m=m: cycle(m)) for m in modes}}, repeats
    )
    base = cycles.pop("none")
    return {
        "step_s": summary([seconds / steps for seconds in base]),
        "steps_a_cycle": steps,
        "stall_s": {
            mode: summary([a - b for a, b in zip(seconds, base, strict=True)])
            for mode, seconds in cycles.items()
        },
        "call_s": {mode: summary(seconds[1:]) for mode, seconds in calls.items()},
    }


def interval_of(recipe: Path) -> int:
    """How often a recipe saves, in steps."""
    import tomllib

    return tomllib.loads(recipe.read_text())["checkpoint"]["interval"]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=150_000_000, help="about so many")
    parser.add_argument("--config", type=Path, help="measure the model of this TOML instead")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="in a cycle with one save")
    parser.add_argument("--interval", type=int, help=f"steps (default: that of {RECIPE.name})")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("options", nargs="*", help="options of the run, after --")
    asked = parser.parse_args(argv)
    interval = asked.interval or interval_of(asked.config or RECIPE)
    model = [] if asked.config else sized(asked.parameters)
    modes = ["disabled", "async"] + ["async_with_pinned_mem"] * torch.cuda.is_available()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        argv = [f"--job.config_file={asked.config or DEBUG}", *model, *asked.options]
        with stepped([*argv, f"--checkpoint.folder={folder}"]) as trainer:
            found = rates(trainer, folder, asked.repeats)
            found |= stalls(trainer, modes, asked.steps, asked.repeats)
            found["parameters"] = sum(p.numel() for p in trainer.parameters)
    step_s = found["step_s"]["median"]
    found["interval"] = interval
    found["percent_of_step_time"] = {
        mode: 100 * row["median"] / (interval * step_s) for mode, row in found["stall_s"].items()
    }
    report(found)
    if asked.out:
        write_json(asked.out, found | {"repeats": asked.repeats, **facts()})
    return found


def report(found: dict[str, Any]) -> None:
    """The tables."""
    print(f"\n{found['parameters'] / 1e6:.1f}M parameters, {found['bytes'] / 1e9:.2f} GB a step")
    for what in ("save", "load"):
        print(f"\n{what:26} {'GB/s':>8} {'least':>8} {'most':>8} {'s':>8}")
        for name, row in found[what].items():
            rate, seconds = row["gb_per_s"], statistics.median(row["seconds"])
            print(
                f"{name:26} {rate['median']:8.2f} {rate['min']:8.2f} {rate['max']:8.2f} "
                f"{seconds:8.2f}"
            )
    told = f"step {found['step_s']['median']:.3f} s"
    print(f"\n{told:26} {'call s':>8} {'stall s':>8} {'least':>8} {'most':>8}  % of step time")
    for mode, row in found["stall_s"].items():
        print(
            f"{mode:26} {found['call_s'][mode]['median']:8.3f} {row['median']:8.3f} "
            f"{row['min']:8.3f} {row['max']:8.3f}  {found['percent_of_step_time'][mode]:.2f} "
            f"(a save every {found['interval']} steps)"
        )


if __name__ == "__main__":
    main()
