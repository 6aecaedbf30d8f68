"""What a rank of the certificate does: the real Trainer, three steps, every number compared."""

import copy
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

import tomli
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from microtron import accelerator
from microtron.certificate.layouts import RUN, Case
from microtron.certificate.verdict import compare, worst_of
from microtron.check import check
from microtron.model.init import plain_name
from microtron.parallel.layout import check_layout
from microtron.parse import parse
from microtron.spec import register
from microtron.train import Trainer

Tensors = dict[str, torch.Tensor]


class Witness(Trainer):
    """A Trainer that keeps what each step made: loss, gradient norm, every gradient."""

    def __init__(self, job: object) -> None:
        # What the metrics would measure at every start.
        with mock.patch.object(accelerator, "measured_peak_flops", lambda: 1e12):
            super().__init__(job)
        self.record: list[dict[str, object]] = []

    def _clip(self, loss: torch.Tensor, microbatch: tuple) -> float:
        grads = {name: _whole(p.grad) for name, p in self._named() if p.grad is not None}
        norm = super()._clip(loss, microbatch)
        self.record.append({"loss": self.sum_of_loss(loss), "norm": norm, "grads": grads})
        return norm

    def _named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(plain_name(n), p) for part in self.model_parts for n, p in part.named_parameters()]

    def weights(self) -> Tensors:
        """Parameters and saved buffers, whole."""
        buffers = [
            (plain_name(n), b)
            for part in self.model_parts
            for n, b in part.named_buffers()
            if n.endswith(("load_fractions", "expert_bias"))
        ]
        return {name: _whole(value) for name, value in [*self._named(), *buffers]}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


@functools.cache
def _plain_run() -> object:
    """Parsed once a process."""
    return parse(list(RUN))


def job_of(options: Iterable[str]) -> object:
    """The run with options added, as ``--section.name=value`` or ``--section.name`` (true)."""
    job = copy.deepcopy(_plain_run())
    for option in options:
        path, _, value = option.removeprefix("--").partition("=")
        *sections, name = path.split(".")
        section = functools.reduce(getattr, sections, job)
        assert hasattr(section, name), option
        try:
            setattr(section, name, tomli.loads(f"value = {value or 'true'}")["value"])
        except tomli.TOMLDecodeError:  # a text
            setattr(section, name, value)
    check(job)
    return job


def three_steps(case: Case, folder: Path, seed: Path | None) -> dict[str, object]:
    """Runs a case on the ranks of this process group.

    Returns:
        ``steps``: loss, norm and gradients of each; ``weights`` after the last; ``seconds``. Whole
        tensors, of the parameters that this rank knows (a pipeline stage knows its own).
    """
    start = time.perf_counter()
    # Weights alone: asking an optimizer that has not stepped for its state makes it take a step.
    load = f"initial_load_path={seed}" if seed else "last_save_model_only"
    job = job_of([*case.options, f"--job.dump_folder={folder}", f"--checkpoint.{load}"])
    check_layout(job, case.ranks)
    register()
    trainer = Witness(job)
    try:
        if seed is None:
            _disturb(trainer)
            trainer.saved_step = -1
            trainer._save(last=True)
        else:
            trainer.resume()
        batches = trainer.batch_generator(trainer.dataloader)
        for _ in range(job.training.steps):
            trainer.step += 1
            trainer.train_step(batches)
        return {
            "steps": trainer.record,
            "weights": trainer.weights(),
            "seconds": time.perf_counter() - start,
        }
    finally:
        trainer.close()


@torch.no_grad()
def _disturb(trainer: Trainer) -> None:
    """Moves every weight off its first value: zero biases and unit norms would hide mistakes, and
    a layout that did not load the seed checkpoint must not agree by its own initialisation.
    """
    generator = torch.Generator().manual_seed(7)
    for parameter in trainer.parameters:
        scale = 0.05 if parameter.dim() > 1 else 0.3
        parameter += scale * torch.randn(parameter.shape, generator=generator)


def together(mine: dict[str, object]) -> dict[str, object]:
    """`worst_of` all ranks, on each of them."""
    results: list[dict[str, object]] = [{}] * dist.get_world_size()
    dist.all_gather_object(results, mine)
    return worst_of(results)


def run_cases(
    cases: list[Case],
    folder: Path,
    report: Callable[[Case, dict[str, object]], None],
    sabotage: Mapping[str, Callable[[], AbstractContextManager[object]]],
) -> None:
    """All cases of one number of ranks, one after the other in the same processes.

    Args:
        folder: holds the seed checkpoint and the results of each run (see `make_truths`).
        report: called on rank 0 with each result.
        sabotage: case -> a context to build and run it in.
    """
    for case in cases:
        truth = truth_folder(case, folder)
        with sabotage.get(case.name, nullcontext)():
            ours = three_steps(case, folder / "runs" / case.name, truth / "checkpoint" / "step-0")
        right = torch.load(truth / "truth.pt", weights_only=True)
        result = together(compare(ours, right))
        missing = sorted(right["weights"].keys() - set(result.pop("parameters")))
        if dist.get_rank() == 0:
            report(case, {**result, "missing": missing, "seconds": ours["seconds"]})


def truth_folder(case: Case, folder: Path) -> Path:
    """Where the single process of this case's run keeps its seed checkpoint and its results."""
    words = [option.rpartition(".")[2].replace("=", "-") for option in case.run]
    return folder / "truth" / ("_".join(words) or "moe")


def make_truths(cases: list[Case], folder: Path) -> None:
    """Runs the single process of each run that is not in the folder yet, and keeps what it made."""
    for target, case in {truth_folder(c, folder): c for c in cases}.items():
        if not (target / "truth.pt").exists():
            result = three_steps(Case(case.name, 1, 8, (), case.run), target, None)
            torch.save({k: result[k] for k in ("steps", "weights")}, target / "truth.pt")
