"""Sources: documents in order, in parts of any size; what cannot be read is told in one line."""

import gzip
import json
import os
import subprocess
import sys
import time

import pytest

from microtron.data import sources, sources_columns
from microtron.data.sources import documents, list_parts, read_part, source_state
from microtron.errors import UserError

TEXTS = ["one", "zwei ÄÖ", "", "three\nlines\r\nhere", "四 \U0001f600", "x" * 300]


def texts_of(spec, **options):
    return [document.text for document in documents(spec, **options)]


def refusal(spec, **options):
    with pytest.raises(UserError) as caught:
        texts_of(spec, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_jsonl(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


# -- stdlib ---------------------------------------------------------------------------------------


def test_stdlib_is_this_pythons_library():
    found = {os.path.basename(d.source_id): d.text for d in documents("stdlib")}
    with open(json.__file__, encoding="utf-8") as file:
        assert file.read() in texts_of("stdlib")
    assert "argparse.py" in found
    assert not any(
        "/test/" in d.source_id or "site-packages" in d.source_id for d in documents("stdlib")
    )


def test_stdlib_leaves_out_tests_and_reports_what_does_not_decode(tmp_path, monkeypatch):
    for name, content in {
        "b.py": "# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"),
        "a/z.py": b"z = 1\n",
        "a.py": b"a = 1\n",
        "c.py": b"c = 1\n",
        "bad.py": b"\xff\xfe\x00",
        "cookie.py": b"# coding: nonsense\n",
        "test/t.py": b"no",
        "a/tests/t.py": b"no",
        "site-packages/s.py": b"no",
        "__pycache__/c.py": b"no",
        "data.txt": b"no",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sources, "_stdlib_root", lambda: str(tmp_path))
    left_out = []
    assert texts_of("stdlib", left_out=left_out) == [
        "a = 1\n",
        "z = 1\n",
        "# -*- coding: latin-1 -*-\nx = 'é'\n",
        "c = 1\n",
    ]
    assert [line.split(":")[0] for line in left_out] == [
        str(tmp_path / "bad.py"),
        str(tmp_path / "cookie.py"),
    ]
    assert "bad.py" in refusal("stdlib")
    monkeypatch.setattr(sources, "_stdlib_root", lambda: str(tmp_path / "nothing"))
    assert "name another --source" in refusal("stdlib")


# -- text -----------------------------------------------------------------------------------------


def test_text_is_one_document_a_file_unchanged_and_sorted(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes("\ufeffBOM\r\nkept".encode())
    (tmp_path / "sub" / "a.txt").write_bytes("äöü".encode())
    (tmp_path / "dir.txt").mkdir()
    assert texts_of(f"text:{tmp_path}/**/*.txt") == ["BOM\r\nkept", "äöü"]
    assert texts_of(f"text:{tmp_path}/b.txt") == ["BOM\r\nkept"]


def test_text_files_are_grouped_into_parts(tmp_path, monkeypatch):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text("x" * 10 + str(i))
    monkeypatch.setattr(sources, "FILES_BYTES", 40)
    parts = list_parts(f"text:{tmp_path}/*.txt")
    assert 1 < len(parts) < 30
    assert sum(part.size_bytes for part in parts) == sum(
        path.stat().st_size for path in tmp_path.iterdir()
    )
    assert [d.text for p in parts for d in read_part(p)] == ["x" * 10 + str(i) for i in range(30)]


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("straße".encode("latin-1"))
    assert "latin.txt is not UTF-8 text (byte 4" in refusal(f"text:{tmp_path}/*.txt")


# -- jsonl ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_jsonl_gives_the_field_of_every_line(tmp_path, ending):
    opener = gzip.open if ending.endswith("gz") else open
    path = write_jsonl(tmp_path / f"a{ending}", [{"body": t, "n": 1} for t in TEXTS], opener)
    assert texts_of(f"jsonl:{path}", field="body") == TEXTS
    (part,) = list_parts(f"jsonl:{path}")
    assert part.bounded is not ending.endswith("gz")


def test_jsonl_parts_of_any_size_give_each_line_once(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    path.write_bytes(path.read_bytes() + b"\n   \n" + b'{"text": "no line end"}')
    size = path.stat().st_size
    seen = set()
    for part_bytes in [*range(1, 60), size - 1, size, size + 1]:
        monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
        parts = list_parts(f"jsonl:{path}")
        assert len(parts) == -(-size // part_bytes)
        found = [d for p in parts for d in read_part(p)]
        assert [d.text for d in found] == [*TEXTS, "no line end"], part_bytes
        seen.add(tuple(d.source_id for d in found))
    assert len(seen) == 1  # names do not depend on the parts


def test_jsonl_null_is_empty_and_lone_surrogates_become_replacement_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert texts_of(f"jsonl:{path}") == ["", "a\ufffdb", "\U0001f600"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "unfinished', "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON"),
        (b'["text"]', "no JSON object"),
        (b'{"content": "x", "id": 1}', "no field 'text' (it has: content, id); name the field"),
        (b'{"text": 3}', "field 'text' is int, not text"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, monkeypatch, ending, line, told):
    monkeypatch.setattr(sources, "PART_BYTES", 50)
    path = tmp_path / f"a{ending}"
    good = b'{"text": "a good line"}\n'
    with (gzip.open if ending.endswith("gz") else open)(path, "wb") as file:
        file.write(good * 6 + b"\n" + line + b"\n" + good)
    message = refusal(f"jsonl:{path}")
    assert f"a{ending}, line 8" in message and told in message


def test_a_truncated_or_false_gzip_file_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl.gz", [{"text": str(i)} for i in range(5000)], gzip.open)
    path.write_bytes(path.read_bytes()[:-500])
    assert "a.jsonl.gz cannot be read: Compressed file ended" in refusal(f"jsonl:{path}")
    path.write_bytes(b'{"text": "x"}\n')
    assert "a.jsonl.gz cannot be read: Not a gzipped file" in refusal(f"jsonl:{path}")


# -- parquet --------------------------------------------------------------------------------------


def write_parquet(path, columns, row_group_size=2):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def test_parquet_is_read_by_row_groups(tmp_path, monkeypatch):
    rows = [*TEXTS, None]
    path = write_parquet(tmp_path / "a.parquet", {"id": list(range(7)), "body": rows})
    parts = list_parts(f"parquet:{path}", "body")
    assert len(parts) == 4 and all(part.bounded for part in parts)
    found = [d for part in parts for d in read_part(part, "body")]
    assert [d.text for d in found] == [*TEXTS, ""]
    assert len({d.source_id for d in found}) == 7
    monkeypatch.setattr(sources_columns, "MAX_ROW_GROUP_BYTES", 1)
    assert not any(part.bounded for part in list_parts(f"parquet:{path}", "body"))


def test_parquet_refusals(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"id": [1, 2], "body": ["a", "b"]})
    assert "no column 'text' (it has: id, body)" in refusal(f"parquet:{path}")
    assert "column 'id' is int64, not text" in refusal(f"parquet:{path}", field="id")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 nonsense")
    assert "no.parquet is no parquet file" in refusal(f"parquet:{tmp_path}/n*.parquet")
    write_parquet(path, {"text": ["a" * 1000, "b"]})
    raw = bytearray(path.read_bytes())
    raw[4:60] = bytes(56)  # the first page; the footer stays good
    path.write_bytes(raw)
    assert "a.parquet" in refusal(f"parquet:{path}")


# -- Hugging Face ---------------------------------------------------------------------------------


@pytest.fixture
def hf_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", [{"text": t, "n": 0} for t in TEXTS])
    write_jsonl(folder / "train-1.jsonl", [{"text": t + "!", "n": 1} for t in TEXTS])
    return folder


def test_hf_streams_local_folders_files_and_globs(hf_folder):
    both = TEXTS + [text + "!" for text in TEXTS]
    assert texts_of(f"hf:{hf_folder}") == both
    assert texts_of(f"hf:{hf_folder}:default") == both
    assert texts_of(f"hf:{hf_folder}/*.jsonl") == both
    assert texts_of(f"hf:{hf_folder}/train-1.jsonl") == both[len(TEXTS) :]
    parts = list_parts(f"hf:{hf_folder}")
    assert [part.bounded for part in parts] == [False, False]
    assert [d.text for d in read_part(parts[1])] == both[len(TEXTS) :]


def test_hf_reads_parquet_through_the_same_call(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"body": TEXTS})
    assert texts_of(f"hf:{path}", field="body") == TEXTS


def test_hf_refusals(hf_folder, tmp_path):
    assert "no column 'body' (it has: text, n)" in refusal(f"hf:{hf_folder}", field="body")
    assert "field 'n' is int, not text" in refusal(f"hf:{hf_folder}", field="n")
    assert "'zzz' not found" in refusal(f"hf:{hf_folder}:zzz")
    assert "no such folder or file" in refusal(f"hf:{tmp_path}/nothing")
    (hf_folder / "train-1.jsonl").write_text('{"text": "broken\n')
    assert "reading stopped" in refusal(f"hf:{hf_folder}")


def test_hf_without_network_fails_at_once_in_one_line():
    """A closed port stands for no network; `datasets` alone would retry for half a minute."""
    code = "from microtron.data.sources import list_parts; list_parts('hf:HuggingFaceFW/fineweb')"
    unset = ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=env | {"HF_ENDPOINT": "http://127.0.0.1:9"},
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert "UserError: source hf:HuggingFaceFW/fineweb needs http://127.0.0.1:9" in last
    assert "Retrying" not in done.stderr and time.monotonic() - began < 15


# -- specs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["", "stdlib:x", "text", "text:", "csv:a", "hf:", "C:/x"])
def test_unknown_specs_list_the_known(spec):
    assert "is not one of: stdlib, text:GLOB" in refusal(spec)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_a_glob_without_a_match_is_refused(tmp_path, kind):
    message = refusal(f"{kind}:{tmp_path}/*.nothing")
    assert "matches no file" in message and "quote the pattern" in message
    with pytest.raises(UserError, match="matches no file"):
        source_state(f"{kind}:{tmp_path}/*.nothing")


def test_source_state_changes_with_the_files(tmp_path):
    spec = f"text:{tmp_path}/*.txt"
    states = []
    for change in (
        lambda: (tmp_path / "a.txt").write_text("a"),
        lambda: (tmp_path / "b.txt").write_text("b"),
        lambda: (tmp_path / "b.txt").write_text("bb"),
        lambda: os.utime(tmp_path / "b.txt", ns=(1, 1)),
        lambda: (tmp_path / "b.txt").rename(tmp_path / "c.txt"),
    ):
        change()
        states.append(source_state(spec))
        assert source_state(spec) == states[-1]
    assert len(set(states)) == 5
    assert source_state("stdlib") == source_state("stdlib")
