"""One optimizer step, on any mesh: forward, backward, norm, clip, update.

TorchTitan's Trainer, with its step replaced: labels go into the model, which returns its summed
loss (`loss.py`); every gradient is divided by the targets of the whole global batch, pipeline or
not; and numbers that are not finite are refused before they reach a weight.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist
import torchtitan.train as titan
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from microtron import accelerator
from microtron.batch import model_inputs
from microtron.diagnose import non_finite
from microtron.forward import Forward
from microtron.parallel.dp import autocast_for, sum_at
from microtron.parallel.norm import clip, grad_norm
from microtron.parallel.tp import sum_replicated_gradients

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class Stepper(titan.Trainer):
    """The parts of a run on this rank, and its step."""

    def __init__(self, job: JobConfig) -> None:
        with (
            # TorchTitan warns that only the last stage has the loss: here rank 0 shows it. And it
            # computes in fp32 under tensor or pipeline parallel alone: here as the job says.
            mock.patch.object(titan, "ensure_pp_loss_visible", lambda *options: None),
            mock.patch.object(titan.dist_utils, "maybe_enable_amp", _autocast(job)),
        ):
            super().__init__(job)
        self.stop_signal = 0  # asked of this rank
        self.stop_agreed = 0  # known to all ranks
        self.schedule = self.pp_schedule if self.parallel_dims.pp_enabled else None
        self.forward = Forward(self.model_parts, self.parallel_dims, self.schedule)
        self.step_tokens = (
            self.gradient_accumulation_steps
            * job.training.local_batch_size
            * self.parallel_dims.dp_replicate
            * self.parallel_dims.dp_shard
            * job.training.seq_len
        )
        for part in self.model_parts:
            part.step_tokens = self.step_tokens

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that this rank has a part of."""
        return [p for part in self.model_parts for p in part.parameters()]

    def forward_backward_step(
        self,
        *,
        input_dict: dict[str, torch.Tensor],
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor,
    ) -> torch.Tensor:
        """One micro-batch: its part of the loss, detached; 0 where a pipeline ends elsewhere."""
        tokens, extra = model_inputs(input_dict, labels, self.forward.part)
        if self.schedule is not None:
            return self._pipeline_step(tokens, extra, global_valid_tokens)
        with self.maybe_enable_amp:
            loss = self.model_parts[0](tokens, **extra) / global_valid_tokens
        loss.backward()
        return loss.detach()

    def _pipeline_step(
        self, tokens: torch.Tensor, extra: dict[str, object], valid: torch.Tensor
    ) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        self.schedule._loss_fn = lambda summed, labels: summed / valid
        self.schedule.step(
            *((tokens,) if self.pp_has_first_stage else ()),
            target=extra["labels"] if self.pp_has_last_stage else None,
            losses=losses if self.pp_has_last_stage else None,
            return_outputs=False,
            **extra,
        )
        if not losses:
            return torch.zeros((), device=self.device)
        return torch.stack([loss.detach() for loss in losses]).sum().to(self.device)

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """Forward, backward, clip, step. The host waits once, for the gradient norm.

        Raises:
            NonFinite: the loss or the gradient is not finite; no weight has been touched.
        """
        self.optimizers.zero_grad()
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        microbatches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        loss = self.gradients(microbatches)
        norm = self._clip(loss, microbatches[-1])
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.balance.step()
        self.optimizers.step()
        self.lr_schedulers.step()
        self.ntokens_seen = self.step * self.step_tokens
        self.step_result = (loss, norm, lr)

    def gradients(self, microbatches: list[Batch]) -> torch.Tensor:
        """Forward and backward of a step; this rank's part of the loss, fp32 scalar."""
        valid = self._valid_tokens([labels for _, labels in microbatches])
        losses = []
        for number, (input_dict, labels) in enumerate(microbatches, 1):
            if self.schedule is None:
                sum_at(number == len(microbatches), self.model_parts, self.parallel_dims)
            moved = {k: v.to(self.device, non_blocking=True) for k, v in input_dict.items()}
            losses.append(
                self.forward_backward_step(
                    input_dict=moved,
                    labels=labels.to(self.device, non_blocking=True),
                    global_valid_tokens=valid,
                )
            )
        sum_replicated_gradients(self.parameters)
        return torch.stack(losses).sum()

    def _valid_tokens(self, labels: list[torch.Tensor]) -> torch.Tensor:
        """Targets in the global batch, fp32 scalar on the device."""
        count = sum(int((x != IGNORE_INDEX).sum()) for x in labels)
        count = torch.full((), float(count), device=self.device)  # a copy would wait for the device
        if self.parallel_dims.dp_enabled:
            dist.all_reduce(count, group=self.parallel_dims.get_mesh("batch").get_group())
        return count

    def sum_of_loss(self, loss: torch.Tensor) -> float:
        """The run's loss from the parts of all ranks; the same on each of them."""
        loss = loss.clone()
        self.forward.sum_over(loss, "loss", "pp")
        return loss.item()

    def norm(self) -> torch.Tensor:
        """The gradient norm of the whole model, fp32 scalar."""
        pp = self.parallel_dims.get_optional_mesh("pp")
        return grad_norm(self.parameters, pp.get_group() if pp is not None else None)

    def _clip(self, loss: torch.Tensor, microbatch: Batch) -> float:
        """Clips; returns the gradient norm before.

        The same message tells every rank whether one of them was asked to stop.

        Raises:
            NonFinite: the norm, or the loss, is NaN or infinite.
        """
        norm = self.norm().to(self.device)
        bad = ~torch.isfinite(torch.stack((norm, loss))).all()
        asked = torch.full((), float(self.stop_signal), device=self.device)
        flags = torch.stack((bad.float(), asked))
        if self.parallel_dims.world_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        clip(self.parameters, norm, self.job_config.training.max_norm)
        bad, asked, norm = torch.cat((flags, norm.reshape(1))).tolist()  # the one wait
        if bad:

            def again() -> None:
                input_dict, labels = microbatch
                moved = {k: v.to(self.device) for k, v in input_dict.items()}
                with (
                    torch.compiler.set_stance("force_eager"),  # hooks see every module
                    self.forward.evaluating(),
                    self.maybe_enable_amp,
                ):
                    self.forward(moved, labels.to(self.device))

            raise non_finite(self.model_parts, self.step, loss.item(), again)
        self.stop_agreed = int(asked)
        return norm


def _autocast(job: JobConfig) -> Callable[..., contextlib.AbstractContextManager]:
    """TorchTitan's maybe_enable_amp: autocast where no data parallel wrapper brings the dtype."""

    def choose(dims: ParallelDims, *unused: object) -> contextlib.AbstractContextManager:
        dtype = autocast_for(dims, job)
        if dtype is None or dims.pp_enabled:  # a stage brings its own
            return contextlib.nullcontext()
        return torch.autocast(accelerator.DEVICE_TYPE, dtype=dtype)

    return choose
