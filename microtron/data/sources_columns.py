"""Sources that need optional packages: parquet files (pyarrow) and Hugging Face `datasets`.

`sources.py` imports this when a spec names one of them; use ``documents`` and ``list_parts`` from
there.
"""

import glob
import os
from collections.abc import Iterator
from typing import Any

from microtron.data.optional import import_package
from microtron.data.sources import Document, Part, matching_files, text_of
from microtron.errors import UserError

MAX_ROW_GROUP_BYTES = 64 << 20  # a larger parquet row group is read as a stream
_HF_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}


def list_parquet(pattern: str, field: str) -> list[Part]:
    """One part a row group. Raises: UserError for no parquet file or no string column ``field``."""
    parquet = import_package("pyarrow.parquet")
    import pyarrow as pa

    parts = []
    for path in matching_files("parquet", pattern):
        try:
            file = parquet.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{path} is no parquet file ({str(error).splitlines()[0]}); copy it again or "
                "narrow the pattern"
            ) from error
        with file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise UserError(
                    f"{path} has no column {field!r} (it has: {', '.join(schema.names)}); name "
                    "the column of the text with --field"
                )
            kind = schema.field(field).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(
                    f"{path}: column {field!r} is {kind}, not text; name another --field"
                )
            for i in range(file.metadata.num_row_groups):
                size = file.metadata.row_group(i).total_byte_size
                bounded = size <= MAX_ROW_GROUP_BYTES
                parts.append(Part("parquet", (path,), i, i + 1, size, bounded))
    return parts


def read_parquet(part: Part, field: str, _: list[str] | None) -> Iterator[Document]:
    """The rows of one row group. Raises: UserError for a damaged file."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path, row = part.names[0], 0
    try:
        with parquet.ParquetFile(path) as file:
            groups = list(range(part.start, part.stop))
            for batch in file.iter_batches(1024, row_groups=groups, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield Document(text or "", f"{path}#{part.start}.{row}")
                    row += 1
    except pa.ArrowException as error:
        raise UserError(
            f"{path} is damaged ({str(error).splitlines()[0]}); copy it again"
        ) from error


# -- Hugging Face datasets ------------------------------------------------------------------------


def list_hf(name: str, field: str) -> list[Part]:
    """One part a shard (file) of the dataset. Raises: UserError for no such dataset or column."""
    stream = _hf_stream(name)
    columns = stream.column_names
    if columns is not None and field not in columns:
        raise UserError(
            f"source hf:{name} has no column {field!r} (it has: {', '.join(columns)}); name the "
            "column of the text with --field"
        )
    shards = range(stream.num_shards)
    return [Part("hf", (name,), i, i + 1, bounded=False) for i in shards]


def read_hf(part: Part, field: str, _: list[str] | None) -> Iterator[Document]:
    """The rows of one shard, streamed. Raises: UserError when the stream breaks off."""
    name = part.names[0]
    stream = _hf_stream(name)
    rows = iter(stream.shard(num_shards=stream.num_shards, index=part.start))
    count = 0
    while True:
        place = f"hf:{name}#{part.start}.{count}"
        try:
            row = next(rows, None)
        except Exception as error:  # whatever the reader of that format or the network raises
            raise UserError(
                f"source {place}: reading stopped ({_first_line(error)}); run the same command "
                "again to go on from the last saved position"
            ) from error
        if row is None:
            return
        yield Document(text_of(row, field, lambda place=place: f"source {place}"), place)
        count += 1


def _hf_stream(name: str) -> Any:  # noqa: ANN401
    """The streaming ``train`` split. A local path is tried first; the Hub is probed before use,
    since `datasets` spends half a minute on retries when there is no network.
    """
    datasets = import_package("datasets")
    path, config = name, None
    if not _is_local(path) and ":" in name:
        path, _, config = name.rpartition(":")
    if _is_local(path):
        path = os.path.expanduser(path)
    elif path.startswith(("/", "./", "../", "~")):
        raise UserError(f"source hf:{name}: no such folder or file; correct the path")
    else:
        _probe_hub(name)
    options: dict[str, Any] = {"split": "train", "streaming": True}
    if _is_local(path) and not os.path.isdir(path):
        stem = path.removesuffix(".gz")
        options["data_files"], path = path, _HF_FORMATS.get(os.path.splitext(stem)[1], "text")
    try:
        return datasets.load_dataset(path, config, **options)
    except Exception as error:  # many types, all of them about the name, config or files
        raise UserError(
            f"source hf:{name} cannot be opened: {_first_line(error)}; correct the name "
            "(hf:NAME:CONFIG) or log in where it is gated"
        ) from error


def _is_local(path: str) -> bool:
    path = os.path.expanduser(path)
    return os.path.exists(path) or (glob.has_magic(path) and bool(glob.glob(path, recursive=True)))


def _probe_hub(name: str) -> None:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # the HTTP library behind the session differs between versions
        raise UserError(
            f"source hf:{name} needs {constants.ENDPOINT}, which cannot be reached "
            f"({_first_line(error)}); check the network, or download the files elsewhere and "
            "name them: hf:FOLDER, parquet:GLOB or jsonl:GLOB"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
