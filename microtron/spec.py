"""Every part of a run, named on one page: what TorchTitan's Trainer plugs together."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn
from torchtitan.config import JobConfig
from torchtitan.protocols import train_spec
from torchtitan.protocols.train_spec import TrainSpec

from microtron import accelerator  # noqa: F401  (before torchtitan)
from microtron.config import overrides, resolved_args
from microtron.data.loader import MockLoader, TokenLoader
from microtron.data.tokenizers import Tokenizer, load_dataset_tokenizer
from microtron.errors import UserError
from microtron.flavors import FLAVORS, flavor
from microtron.hf.adapter import Adapter
from microtron.loss import build_loss
from microtron.metrics import build_metrics
from microtron.model import accounting
from microtron.model.args import ModelArgs
from microtron.model.model import Transformer
from microtron.optim.build import build_optimizers
from microtron.optim.schedule import build_schedule
from microtron.parallel.apply import parallelize
from microtron.parallel.pp import pipeline
from microtron.validate import build_validator


class PluggedArgs(ModelArgs):
    """ModelArgs with the two methods that TorchTitan calls."""

    def update_from_config(self, job_config: JobConfig) -> None:
        """Takes [model.args] in."""
        for name, value in overrides(job_config).items():
            setattr(self, name, value)
        self.validate()

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, float]:
        """Parameters (counted twice, by formula and by module) and training FLOPs a token."""
        return (
            accounting.check(model, self).total,
            sum(accounting.flops_per_token(self, seq_len).values()),
        )


class Flavors(Mapping):
    """Name -> a fresh PluggedArgs: TorchTitan changes what it is given."""

    def __getitem__(self, name: str) -> PluggedArgs:
        return PluggedArgs(**dataclasses.asdict(flavor(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(FLAVORS)

    def __len__(self) -> int:
        return len(FLAVORS)


def build_tokenizer(job: JobConfig) -> Tokenizer | None:
    """The tokenizer that the first dataset was made with; None for mock data and foreign shards.

    Raises:
        UserError: it has more tokens than the model, or cannot spell sample.prompt.
    """
    if job.data.mock:
        return None
    tokenizer = load_dataset_tokenizer(Path(job.data.dirs[0]))
    vocab_size = resolved_args(job).vocab_size
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        rounded = -(-tokenizer.vocab_size // 8) * 8
        raise UserError(
            f"model.args.vocab_size = {vocab_size} is smaller than the {tokenizer.vocab_size} "
            f"tokens of tokenizer {tokenizer.name!r}: use --model.args.vocab_size={rounded}"
        )
    if tokenizer is not None and job.sample.freq:
        try:
            tokenizer.encode(job.sample.prompt)
        except UserError as error:
            raise UserError(f"sample.prompt = {job.sample.prompt!r} cannot work: {error}") from None
    return tokenizer


def build_loader(
    dp_world_size: int, dp_rank: int, tokenizer: Tokenizer | None, job_config: JobConfig
) -> TokenLoader | MockLoader:
    """The training batches of this data rank."""
    job, data = job_config, job_config.data
    shape = {
        "seq_len": job.training.seq_len,
        "batch_size": job.training.local_batch_size,
        "rank": dp_rank,
        "world_size": dp_world_size,
        "seed": job.debug.seed,
        "vocab_size": resolved_args(job).vocab_size,
    }
    if data.mock:
        return MockLoader(**shape, eot_id=data.eot_id if data.document_mask else None)
    return TokenLoader(
        [Path(d) for d in data.dirs],
        data.weights or None,
        "train",
        **shape,
        tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else None,
        document_positions=data.document_mask,
        eot_id=data.eot_id if data.eot_id >= 0 else None,
        pin_memory=accelerator.DEVICE_TYPE == "cuda",
        prefetch=data.prefetch,
        verify=data.verify,
    )


def register() -> None:
    """Makes ``[model] name = "microtron"`` known to TorchTitan; once a process."""
    if "microtron" not in train_spec._extra_train_specs:
        train_spec.register_train_spec("microtron", get_train_spec())


def get_train_spec() -> TrainSpec:
    """The plug."""
    return TrainSpec(
        model_cls=Transformer,
        model_args=Flavors(),
        parallelize_fn=parallelize,
        pipelining_fn=pipeline,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_schedule,
        build_dataloader_fn=build_loader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics,
        state_dict_adapter=Adapter,
    )
