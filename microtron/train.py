"""The training loop: TorchTitan's Trainer, thinly subclassed, and the entry of a run.

    ./run_train.sh train_configs/debug.toml --training.steps=100
    torchrun --nproc-per-node 2 -m microtron.train --job.config_file=train_configs/debug.toml

TorchTitan builds the parts that `spec.py` names (model, mesh, optimizer, loader, checkpoints), and
`step.py` is one step. What is here: the loop, validation with a target, samples, signals that save
before they leave, and resume.
"""

import gc
import logging
import os
import signal
import sys
import time
from concurrent.futures import wait
from datetime import timedelta
from pathlib import Path

from microtron.accelerator import DEVICE_TYPE

import torch.distributed as dist
from torchtitan.config import JobConfig
from torchtitan.distributed import utils as dist_utils

from microtron import checkpoints
from microtron.evals.during import HellaSwag
from microtron.hf.adapter import check_folder
from microtron.hf.keys import architecture
from microtron.metrics import Stopwatch, clock
from microtron.profiling import profilers
from microtron.sample import sample
from microtron.step import Stepper
from microtron.watchdog import Watchdog

log = logging.getLogger("microtron")


class Trainer(Stepper):
    """One run on this rank."""

    def __init__(self, job: JobConfig, watchdog: Watchdog | None = None) -> None:
        super().__init__(job)
        checkpoints.leave_out_checksums()
        self.watchdog = watchdog or Watchdog()
        self.time_s = 0.0  # training alone
        self.saved_step = -1
        if job.checkpoint.last_save_in_hf:
            architecture(self.model_args)  # refused now rather than after the last step
            self.checkpointer.last_save_in_hf = False  # `export` does it, beside a whole step
        asked = bool(job.eval.hellaswag)
        self.hellaswag = (
            HellaSwag(job.eval, self.tokenizer, job.training.seq_len) if asked else None
        )

    def train(self) -> None:
        """Runs to the last step, the target or a signal.

        Raises:
            NonFinite, UserError: see `train_step` and `_save`.
            SystemExit: a signal ended the run, after its step was saved (code 128 + signal).
        """
        job = self.job_config
        if self.step >= job.training.steps:
            log.info(
                f"nothing to do: step {self.step} of {job.training.steps} is in "
                f"{job.job.dump_folder}; raise --training.steps to go on, or choose another "
                "--job.dump_folder"
            )
            return
        began, first = time.perf_counter(), self.step + 1
        reason = ""
        with profilers(job.profiling, Path(job.job.dump_folder), self.step) as running:
            batches = self.watchdog.beating(
                self.batch_generator(self.dataloader),
                lambda: (f"step {self.step}", self.step == first),
            )
            while not reason:
                self.step += 1
                self.watchdog.beat(f"step {self.step}", self.step == first)
                self.gc_handler.run(self.step)
                with Stopwatch() as watch:
                    self.train_step(batches)
                self._count(watch.last_s)
                self.watchdog.beat(f"after step {self.step}", long=True)
                reason = self._after_step()
                for profiler in running:
                    profiler.step()
                if self.step == first:
                    self._shorten_timeouts()
        log.info(
            f"{reason}: step {self.step}, {self.ntokens_seen:,} tokens, {clock(self.time_s)} of "
            f"training ({self.time_s:.1f} s), {clock(time.perf_counter() - began)} in this call; "
            f"results in {job.job.dump_folder}"
        )
        if self.stop_agreed:
            raise SystemExit(128 + self.stop_agreed)

    def _after_step(self) -> str:
        """Metrics, validation, sample, checkpoint; returns why the run ends here, or ''."""
        job, step = self.job_config, self.step
        reason = "done" if step == job.training.steps else ""
        if self.metrics_processor.should_log(step) or reason:
            self._log()
        if self.stop_agreed:
            reason = f"stopped by {signal.Signals(self.stop_agreed).name}"
        leaving = bool(self.stop_agreed)
        if (
            job.validation.enable
            and not leaving
            and (reason or self.validator.should_validate(step))
        ):
            result = self.validator.validate(self.model_parts, step)
            target = job.validation.val_target
            if target is not None and result["val_loss"] <= target:
                reason = f"validation loss {result['val_loss']:.4f} reached the target {target}"
        if self.hellaswag and not leaving and (reason or step % job.eval.hellaswag_freq == 0):
            self.watchdog.beat(f"HellaSwag after step {step}", long=True)
            self.hellaswag.report(
                step, self.forward, self.maybe_enable_amp, self.metrics_processor.write
            )
        if job.sample.freq and not leaving and (reason or step % job.sample.freq == 0):
            self._sample()
        self._save(last=bool(reason))
        return reason

    def _count(self, seconds: float) -> None:
        self.time_s += seconds
        self.metrics_processor.train_s += seconds
        self.metrics_processor.steps_since_line += 1

    def _log(self) -> None:
        loss, grad_norm, lr = self.step_result
        # This rank counted its own tokens; the line speaks of the run.
        self.metrics_processor.ntokens_since_last_log = (
            self.step_tokens * self.metrics_processor.steps_since_line
        )
        self.metrics_processor.log_step(
            self.step,
            self.sum_of_loss(loss),
            grad_norm,
            lr,
            self.ntokens_seen,
            self.time_s,
            self.optimizers.balance.metrics(),
        )

    def _sample(self) -> None:
        options, job = self.job_config.sample, self.job_config
        if self.tokenizer is None:
            return
        with self.forward.evaluating(), self.maybe_enable_amp:
            text = sample(
                self.forward.next_logits,
                self.tokenizer,
                options.prompt,
                tokens=options.tokens,
                length=job.training.seq_len,
                temperature=options.temperature,
                top_k=options.top_k,
                seed=job.debug.seed,
                device=self.device,
            )
        log.info(f"--- sample at step {self.step} ---\n{options.prompt}{text}\n---")

    def _save(self, last: bool) -> None:
        """Saves when the interval or the end says so.

        Raises:
            UserError: the checkpoint could not be written.
        """
        if not self.checkpointer._should_save(self.step, last):
            return
        folder = self._step_folder(self.step)
        with checkpoints.saving(folder):
            if dist.get_rank() == 0:
                checkpoints.clear(folder)
                checkpoints.write_identity(folder, self.model_args, self.tokenizer, self._facts())
            dist.barrier()
            self.checkpointer.save(self.step, last_step=last)
            if last and self.checkpointer.save_future is not None:
                self.checkpointer.save_future.result()
        self.checkpointer._purge_stale_checkpoints()  # TorchTitan forgets it after the last step
        self.saved_step = self.step
        log.info(f"step {self.step} | checkpoint {folder}")

    def _facts(self) -> dict[str, object]:
        """What a step tells of its run."""
        job = self.job_config
        return {
            "step": self.step,
            "tokens": self.ntokens_seen,
            "flavor": job.model.flavor,
            "data": job.data.dirs,
            "seq_len": job.training.seq_len,
        }

    def _step_folder(self, step: int) -> Path:
        return Path(self.checkpointer.folder) / f"step-{step}"

    def resume(self) -> None:
        """Loads the newest whole step, or the one that checkpoint.load_step names.

        Nothing on disk is touched before that has worked.
        """
        options = self.job_config.checkpoint
        step = -1
        if options.enable:
            folder = Path(self.checkpointer.folder)
            step = checkpoints.choose_step(folder, options.load_step)
            if step >= 0:
                checkpoints.check_step(folder / f"step-{step}", self.model_args)
                self._load(step)
            elif options.initial_load_in_hf:
                check_folder(options.initial_load_path, self.model_args)
            elif options.initial_load_path:
                checkpoints.check_initial(Path(options.initial_load_path), self.model_args)
            dist.barrier()  # every rank has looked before rank 0 moves anything
            if dist.get_rank() == 0:
                checkpoints.set_aside(folder, after=step)
                if step < 0 and folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()  # else TorchTitan would not look at initial_load_path
            dist.barrier()
            if step < 0:
                self._load(step)
        self.metrics_processor.resume_at(self.step)

    def _load(self, step: int) -> None:
        path = self.job_config.checkpoint.initial_load_path
        with checkpoints.loading(self._step_folder(step) if step >= 0 or not path else Path(path)):
            loaded = self.checkpointer.load(step=step)
        self.lr_schedulers.apply()
        if step >= 0:
            self.saved_step = step
            log.info(f"resumed from {self._step_folder(step)} ({self.ntokens_seen:,} tokens)")
        elif loaded:
            log.info(f"started from the weights in {path}")

    def _shorten_timeouts(self) -> None:
        """After the first step, which compiles and connects, a silent rank is noticed sooner."""
        if self.parallel_dims.world_size > 1:
            dist_utils.set_pg_timeouts(
                timedelta(seconds=self.job_config.comm.train_timeout_seconds), self.parallel_dims
            )

    def state_dict(self) -> dict[str, object]:
        """What a resumed run goes on counting from."""
        return {"step": self.step, "ntokens_seen": self.ntokens_seen, "time_s": self.time_s}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """The reverse."""
        self.step = state_dict["step"]
        self.ntokens_seen = state_dict["ntokens_seen"]
        self.time_s = state_dict["time_s"]

    def close(self) -> None:
        """Ends threads and files; waits for a checkpoint still being written."""
        if getattr(self, "dataloader", None) is not None:
            self.dataloader.close()
        manager = getattr(self, "checkpointer", None)
        if manager is not None and manager.enable and manager.save_future is not None:
            wait([manager.save_future])  # `_save` tells where that failed
        super().close()


def run(argv: list[str], rank: int, world_size: int) -> int:
    """Parses, prepares, trains; returns the exit code."""
    from microtron.metrics import setup_logging
    from microtron.parallel.layout import check_layout
    from microtron.parse import parse
    from microtron.spec import register
    from microtron.startup import describe, on_signals, open_folder, prepare_data, write_config
    from microtron.threads import pick_threads

    job = parse(argv)
    local_batch = job.training.local_batch_size
    layout = check_layout(job, world_size)
    folder = Path(job.job.dump_folder)
    open_folder(folder)
    setup_logging(folder, rank)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    threads = pick_threads(ranks_here) if DEVICE_TYPE == "cpu" else ""
    log.info(
        f"microtron {job.model.flavor} on {world_size} x {DEVICE_TYPE}"
        f"{f' ({layout})' if world_size > 1 else ''}"
        f"{', ' + threads if threads else ''}; results in {folder}"
    )
    if job.training.local_batch_size != local_batch:
        log.info(
            f"local_batch_size {local_batch} -> {job.training.local_batch_size}, so that "
            f"global_batch_size {job.training.global_batch_size} is whole micro-batches"
        )
    prepare_data(job.data, rank)
    register()
    requested: list[int] = []
    on_signals(requested.append)
    watchdog = Watchdog(
        rank,
        world_size,
        (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])),
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        DEVICE_TYPE == "cpu",
        job.comm.init_timeout_seconds,
        job.comm.train_timeout_seconds,
    )
    trainer = None
    try:
        trainer = Trainer(job, watchdog)
        log.info(describe(trainer.model_args, job, trainer.step_tokens))
        on_signals(lambda number: setattr(trainer, "stop_signal", number))
        if requested:
            return 128 + requested[0]
        trainer.resume()
        if rank == 0 and trainer.step < job.training.steps:
            write_config(folder / "config.toml", job.to_dict())
        trainer.train()
    except Exception as error:
        watchdog.explain(error)
        raise
    finally:
        if trainer is not None:
            trainer.close()
        watchdog.close()
    dist.destroy_process_group()
    if job.checkpoint.last_save_in_hf and rank == 0:
        last = trainer._step_folder(trainer.saved_step)
        del trainer  # its memory is wanted
        export(last, folder / "hf", job.checkpoint.export_dtype)
    return 0


def export(step: Path, out: Path, dtype: str) -> None:
    """Writes the last step as a Hugging Face folder, when nobody waits for this rank any more; one
    that is newer than the step stays.

    Raises:
        UserError: it could not, or transformers computes something else.
    """
    from microtron.hf import to_hf

    config = out / "config.json"
    if config.is_file() and config.stat().st_mtime > (step / ".metadata").stat().st_mtime:
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    gc.collect()  # the trainer; TorchTitan has switched the automatic collection off
    log.info(f"exporting {step} to {out}")
    to_hf.export(step, out, dtype=dtype, overwrite=True)
    log.info(f"exported {step} to {out}, for transformers")


def main(argv: list[str] | None = None) -> int:
    """The entry of a process: sets what torchrun would for a single one, tells errors in a line."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        os.environ.setdefault(name, "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        return run(sys.argv[1:] if argv is None else argv, rank, world_size)
    except Exception as error:
        from microtron.startup import one_line

        told = one_line(error)
        if told is None:
            raise  # a mistake of ours
        if rank > 0:
            time.sleep(2)  # mostly rank 0 has the same to say; the launcher then ends the others
        print(f"error{f' (rank {rank})' if rank else ''}: {told}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
