"""The learning rate over the steps: TorchTitan's curves, with a state that fits any layout.

TorchTitan keeps torch's scheduler state, one entry a parameter group; a pipeline stage has other
groups than the whole model, so that state cannot move between them. Here the state is the one
number that counts, the step; rates follow from the options of the run that goes on.
"""

from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import LRScheduler as LRSchedulerConfig

from microtron import accelerator  # noqa: F401  (before torchtitan)


class Schedule:
    """What TorchTitan asks of its LRSchedulersContainer."""

    def __init__(self, schedulers: list[LambdaLR]) -> None:
        self.schedulers = schedulers

    def __len__(self) -> int:
        return len(self.schedulers)

    def step(self) -> None:
        """To the next step's rates."""
        for scheduler in self.schedulers:
            scheduler.step()

    def state_dict(self) -> dict[str, int]:
        """The step."""
        return {"last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The reverse; `apply` must follow, when the optimizers have loaded theirs."""
        for scheduler in self.schedulers:
            scheduler.last_epoch = state_dict["last_epoch"]

    def apply(self) -> None:
        """Writes the rates of this step, by this run's options, into the optimizers."""
        for scheduler in self.schedulers:
            rates = [
                base * curve(scheduler.last_epoch)
                for base, curve in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            groups = scheduler.optimizer.param_groups
            for group, rate, base in zip(groups, rates, scheduler.base_lrs, strict=True):
                group["lr"], group["initial_lr"] = rate, base
            scheduler._last_lr = rates


def build_schedule(
    optimizers: OptimizersContainer, config: LRSchedulerConfig, steps: int
) -> Schedule:
    """TorchTitan's builder signature."""
    return Schedule(build_lr_schedulers(optimizers, config, steps).schedulers)
