"""lm-evaluation-harness asks, our engine answers (github.com/EleutherAI/lm-evaluation-harness).

The adapter gives the numbers that ``lm_eval --model hf`` gives on the exported folder: text becomes
ids in the same way (what the tokenizer puts before a text, the blank between context and
continuation, contexts cut on the left), and so do the windows of long documents (lm_eval/models/
huggingface.py). The harness is an optional package: its base class joins when it is asked for.

    names = ["lambada_openai"]
    found = run_tasks(Answers(scorer, tokenizer, prefix_ids), names, task_manager(names))
"""

import difflib
import importlib.util
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from microtron.data.optional import import_package
from microtron.data.tokenizers import Tokenizer
from microtron.errors import UserError
from microtron.evals.choice import Pair
from microtron.evals.score import Scorer
from microtron.infer.sampling import Sampling

_MOST_NEW = 256  # tokens, where a task does not say
_BOOTSTRAP = 1000  # resamplings for the standard error of what is no mean
_LOADERS = ("datasets", "huggingface_hub", "httpx", "requests", "fsspec")  # whose errors are data's


class Answers:
    """The methods of ``lm_eval.api.model.TemplateLM``, over a scorer and its engine.

    Args:
        prefix_ids: what the exported tokenizer puts before a text.
        stop_ids: tokens that end a generated text; none: the document separator.
        progress: wraps a series of batches, as tqdm does.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        prefix_ids: list[int],
        stop_ids: tuple[int, ...] = (),
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> None:
        super().__init__()
        self.stop_ids = stop_ids or (tokenizer.eot_id,)
        self.scorer, self.text, self.prefix_ids = scorer, tokenizer, prefix_ids
        self.progress = progress
        self.prefix_text = tokenizer.decode([self.prefix_token_id])

    @property
    def eot_token_id(self) -> int:
        """Ends a document."""
        return self.text.eot_id

    @property
    def prefix_token_id(self) -> int:
        """Stands for an empty context."""
        return self.prefix_ids[0] if self.prefix_ids else self.text.eot_id

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at once."""
        return self.scorer.max_length

    @property
    def max_gen_toks(self) -> int:
        """New tokens, where a task does not say."""
        return _MOST_NEW

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return f"{self.text.name}-{self.text.fingerprint}".replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: object
    ) -> list[int]:
        """Ids of a text, the prefix before them unless the text brings its own."""
        if add_special_tokens is None:
            own = self.prefix_text and string.startswith(self.prefix_text)
            add_special_tokens = not own
        return [*(self.prefix_ids if add_special_tokens else ()), *self.text.encode(string)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **unused: object
    ) -> list[tuple[float, bool]]:
        pairs: list[Pair] = [(context, continuation) for _, context, continuation in requests]
        found = [tuple(score) for score in self.scorer.score(pairs, self.progress)]
        for (asked, _, _), answer in zip(requests, found, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole documents, window by window, each token once."""
        utils = import_package("lm_eval.utils")
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                pairs.append(utils.make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self.scorer.score(pairs, self.progress), strict=True):
            totals[owner] += score.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each ended by a stop string, the document separator or the most tokens.

        Raises:
            UserError: a task wants more new tokens than the model sees at once.
        """
        found = [""] * len(requests)
        by_options: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_options.setdefault(repr(request.args[1]), []).append(index)
        for indices in by_options.values():
            until, most, way = _generation(requests[indices[0]].args[1])
            stops = [*filter(None, until), self.text.decode([self.text.eot_id])]
            if most >= self.max_length:
                raise UserError(
                    f"the task wants {most} new tokens, and the model sees {self.max_length} at "
                    "once: raise --max-length, or leave the task out"
                )
            rows = [self._row(requests[i].args[0], self.max_length - most) for i in indices]
            made = self._generated(rows, stops, way | {"max_new_tokens": most})
            for index, ids in zip(indices, made, strict=True):
                found[index] = _cut(self.text.decode(ids), stops)
                self.cache_hook.add_partial("generate_until", requests[index].args, found[index])
        return found

    def _row(self, context: str, longest: int) -> list[int]:
        return (self.tok_encode(context) or [self.prefix_token_id])[-longest:]

    def _generated(
        self, rows: list[list[int]], stops: list[str], way: dict[str, Any]
    ) -> list[list[int]]:
        """New ids of each row, batches of similar length together."""
        longest = max(len(stop.encode()) for stop in stops) + 4  # a token has a byte at least
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        size = self.scorer.batch_size
        found: list[list[int]] = [[] for _ in rows]
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        for part in (self.progress or list)(parts):
            new: list[list[int]] = [[] for _ in part]

            def ended(row: int, token: int, new: list[list[int]] = new) -> bool:
                new[row].append(token)
                told = self.text.decode(new[row][-longest:])
                return any(stop in told for stop in stops)

            ways = [self._sampling(seed=index, **way) for index in part]
            self.scorer.engine.generate([rows[i] for i in part], ways, ended)
            for index, ids in zip(part, new, strict=True):
                found[index] = ids
        return found

    def _sampling(self, **way: Any) -> Sampling:  # noqa: ANN401
        return Sampling(stop_tokens=self.stop_ids, vocab_size=self.text.vocab_size, **way)


def _generation(options: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """A task's options: (stop strings, most new tokens, fields of `Sampling`); greedy unless they
    say otherwise.
    """
    until = options.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    most = int(next((options[n] for n in names if options.get(n) is not None), _MOST_NEW))
    temperature = options.get("temperature")
    way: dict[str, Any] = {"temperature": 0.0}
    if options.get("do_sample", bool(temperature)):
        way["temperature"] = 1.0 if temperature is None else float(temperature)
        way |= {k: options[k] for k in ("top_k", "top_p", "min_p") if options.get(k) is not None}
    return [until] if isinstance(until, str) else list(until), most, way


def _cut(text: str, stops: list[str]) -> str:
    """Up to the first of the stop strings."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def as_lm(answers: Answers) -> Any:  # noqa: ANN401
    """The same as one of the harness's own models."""
    base = import_package("lm_eval.api.model").TemplateLM
    made = type("MicrotronLM", (Answers, base), {})
    return made(
        answers.scorer, answers.text, answers.prefix_ids, answers.stop_ids, answers.progress
    )


def run_tasks(
    answers: Answers,
    tasks: list[str],
    manager: Any,  # noqa: ANN401
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> list[dict[str, Any]]:
    """The scores of tasks of the harness: ``task, metric, value, stderr, examples, shots`` each.

    Args:
        manager: of `task_manager`.

    Raises:
        UserError: the data of a task cannot be had.
    """
    try:
        found = import_package("lm_eval.evaluator").simple_evaluate(
            as_lm(answers),
            tasks=tasks,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=False,
        )
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _LOADERS:
            raise
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the data of --tasks {','.join(tasks)} cannot be had ({told}): connect to the network "
            "once (the hub keeps a copy), or use --hellaswag, --bpb or a task on local files with "
            "--include-path"
        ) from error
    return scores_of(found)


def installed(package: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(package) is not None


def task_manager(tasks: list[str], include_path: Path | None = None) -> Any:  # noqa: ANN401
    """The harness's index, of ``include_path`` alone where that has all the tasks (reading its own
    14,000 takes seconds).

    Raises:
        UserError: the harness is not installed, or there is no such folder or task.
    """
    if not installed("lm_eval"):
        raise UserError(
            "--tasks needs lm-evaluation-harness: pip install lm-eval (--hellaswag and "
            "--bpb work without it)"
        )
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is no folder: name one with YAML tasks")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the end of retries is told
    make = import_package("lm_eval.tasks").TaskManager
    given = None if include_path is None else str(include_path)
    manager = make(include_path=given, include_defaults=False) if given else make()
    if given and not set(tasks) <= set(manager.all_tasks):
        manager = make(include_path=given)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            remedy = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists them"
            raise UserError(f"--tasks: lm-evaluation-harness has no task {task!r}; {remedy}")
    return manager


def scores_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a figure, from what ``simple_evaluate`` returns."""
    scores = []
    for task, metrics in {**found["results"], **found.get("groups", {})}.items():
        counted = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in sorted(metrics.items()):
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            scores.append(
                {
                    "task": task,
                    "metric": metric if kind == "none" else key,
                    "value": value,
                    "stderr": stderr if isinstance(stderr, float) else None,
                    "examples": counted or metrics.get("sample_len"),
                    "shots": found.get("n-shot", {}).get(task),
                }
            )
    return scores
