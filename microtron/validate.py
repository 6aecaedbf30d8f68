"""Loss and bits-per-byte on a fixed token set.

The set is the first ``val_tokens`` tokens of the validation split (all of it by default), every
token a target once, the same at every call and for any number of ranks. Bits-per-byte divides the
summed loss by the UTF-8 bytes of the targets, so runs with different tokenizers compare. The
document separators count in the loss and have no bytes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.components.validate import BaseValidator
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from microtron import accelerator  # noqa: F401  (before torchtitan)
from microtron.config import resolved_args
from microtron.data.loader import TokenLoader
from microtron.forward import Forward
from microtron.metrics import RunMetrics, Stopwatch
from microtron.model.head import IGNORE


class Validator(BaseValidator):
    """Evaluates without touching training: eval mode, no gradients, no expert counts."""

    def __init__(
        self,
        job: JobConfig,
        loader: Callable[[], TokenLoader],
        token_bytes: torch.Tensor | None,
        parallel_dims: ParallelDims,
        pp_schedule: object,
        amp: AbstractContextManager,
        metrics: RunMetrics,
    ) -> None:
        self.job_config = job
        self.loader, self.token_bytes, self.amp, self.metrics = loader, token_bytes, amp, metrics
        self.dims, self.schedule = parallel_dims, pp_schedule

    def should_validate(self, step: int) -> bool:
        """Every ``validation.freq`` steps."""
        return step % self.job_config.validation.freq == 0

    def validate(self, model_parts: list[nn.Module], step: int) -> dict[str, object]:
        """``step, val_loss, val_bpb, val_tokens`` of the fixed set; also written to the metrics."""
        forward = Forward(model_parts, self.dims, self.schedule)
        device = forward.device
        totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, tokens, bytes
        loader = self.loader()
        with Stopwatch() as watch, forward.evaluating(), self.amp:
            for input_dict, labels in loader:
                totals += self._batch(forward, input_dict, labels, device)
        loader.close()
        forward.sum_over(totals, "loss", "pp")
        if dist.get_world_size() > 1:
            dist.broadcast(totals, 0)  # one verdict on val_target, whatever the rounding
        loss, tokens, byte_count = totals.tolist()
        return self.metrics.log_validation(
            step, loss / max(tokens, 1), int(tokens), int(byte_count), watch.last_s
        )

    def _batch(
        self,
        forward: Forward,
        input_dict: dict[str, torch.Tensor],
        labels: torch.Tensor,
        device: torch.device,
    ) -> torch.Tensor:
        """[loss, tokens, bytes] of this rank's part; zeros where a pipeline ends elsewhere."""
        loss = forward({k: v.to(device) for k, v in input_dict.items()}, labels.to(device))
        if loss is None:
            return torch.zeros(3, dtype=torch.float64, device=device)
        labels = labels.chunk(forward.part.parts, dim=1)[forward.part.index]
        targets = labels[labels != IGNORE]
        byte_count = 0 if self.token_bytes is None else int(self.token_bytes[targets].sum())
        counts = torch.tensor([targets.numel(), byte_count], dtype=torch.float64, device=device)
        return torch.cat((loss.double().reshape(1), counts))


def build_validator(
    *,
    job_config: JobConfig,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: object,
    parallel_dims: ParallelDims,
    maybe_enable_amp: AbstractContextManager,
    metrics_processor: RunMetrics,
    pp_schedule: object = None,
    **unused: object,
) -> Validator:
    """TorchTitan's builder signature."""
    data, validation = job_config.data, job_config.validation
    args = resolved_args(job_config)

    def loader() -> TokenLoader:
        return TokenLoader(
            [Path(d) for d in data.dirs],
            None,
            "val",
            seq_len=validation.seq_len,
            batch_size=validation.local_batch_size,
            rank=dp_rank,
            world_size=dp_world_size,
            seed=job_config.debug.seed,
            vocab_size=args.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else None,
            document_positions=data.document_mask,
            eot_id=data.eot_id if data.eot_id >= 0 else None,
            infinite=False,
            shuffle=False,
            verify=data.verify,
            prefetch=data.prefetch,
            max_tokens=validation.val_tokens if validation.val_tokens > 0 else None,
        )

    loader().close()  # a bad validation shard is told before step 1
    bytes_of = torch.from_numpy(tokenizer.token_bytes()).long() if tokenizer else None
    return Validator(
        job_config,
        loader,
        bytes_of,
        parallel_dims,
        pp_schedule,
        maybe_enable_amp,
        metrics_processor,
    )
