"""Tokenizer files of an export: `AutoTokenizer` gives our ids, and eot before a text."""

import json

import pytest
from test_tokenizers import TEXTS, byte_level_json, ranks, unicode_texts  # noqa: F401

from microtron.data import train_bpe
from microtron.data.tokenizers import EOT, CharTokenizer, Tokenizer, load_tokenizer
from microtron.data.tokenizers_bpe import TiktokenTokenizer, added_by
from microtron.errors import UserError
from microtron.hf.tokenizer_files import merges_of, write_tokenizer


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A tokenizer of ours, trained on this file."""
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe.train_bpe(source=f"text:{__file__}", vocab_size=400, out=folder)
    return load_tokenizer(str(folder))


def written(tokenizer, folder, **options):
    """(AutoTokenizer's, ours) of the files."""
    from transformers import AutoTokenizer

    write_tokenizer(tokenizer, folder, **options)
    return AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder))


def check_same(tokenizer, folder, texts):
    """Same ids and texts both ways, with and without special tokens."""
    theirs, back = written(tokenizer, folder, max_length=10**9)
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        dressed = theirs(text)["input_ids"]
        assert dressed == [*tokenizer.prefix_ids, *ids], text
        assert theirs.decode(dressed) == tokenizer.decode(dressed)
        assert theirs.decode(dressed, skip_special_tokens=True) == text
        assert back.encode(text) == ids
    eot = tokenizer.eot_id
    assert theirs.eos_token_id == theirs.pad_token_id == theirs.bos_token_id == eot
    assert (back.vocab_size, back.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
    assert back.pieces == tokenizer.pieces and back.prefix_ids == tokenizer.prefix_ids == [eot]
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert len(theirs) == tokenizer.vocab_size and theirs.model_max_length == 10**9
    return theirs


def test_byte(tmp_path):
    check_same(load_tokenizer("byte"), tmp_path, [*TEXTS, *unicode_texts(300)])


def test_char(tmp_path):
    alphabet = "a ▁é\r\n\t四<|endoftx>b"
    texts = ["", "a▁ 四", f"é{EOT}\r\n", alphabet * 3]
    theirs = check_same(CharTokenizer(alphabet), tmp_path, texts)
    with pytest.raises(Exception, match="UNK"):  # as ours: an alphabet has no unknown
        theirs("z")
    with pytest.raises(UserError, match="has no token for a part of the text"):
        load_tokenizer(str(tmp_path)).encode("az")


def test_a_bpe_of_ours(bpe, tmp_path):
    assert bpe._twin is not None
    check_same(bpe, tmp_path, [*TEXTS, *unicode_texts(300, seed=1)])


@pytest.mark.parametrize("name", ["gpt2", "o200k_harmony"])
def test_tiktokens(ranks, tmp_path, name):  # noqa: F811
    check_same(load_tokenizer(name), tmp_path, [*TEXTS, *unicode_texts(800, seed=2)])


def tiny_encoding():
    """A tiktoken of bytes and a few tokens, one of which no merge leads to."""
    import tiktoken

    tokens = {bytes([i]): i for i in range(256)}
    tokens |= {piece: 256 + i for i, piece in enumerate((b"ab", b"34", b"a\n", b"xyz"))}
    encoding = tiktoken.Encoding(
        name="tiny",
        pat_str=r"\p{N}{1,3}+|a$|a\n|\p{L}++|[^\p{N}]",
        mergeable_ranks=tokens,
        special_tokens={EOT: 263, "<|same|>": 263, "<|other|>": 261},
    )
    return TiktokenTokenizer(encoding)


def test_possessive_counts_line_ends_and_gaps(tmp_path):
    """What Oniguruma would read otherwise, an id that nothing has, and one with two names."""
    tokenizer = tiny_encoding()
    texts = ["1234 34", "a\nab\n", "ba\n", "xyz wxyz", f"a{EOT}<|other|>", *unicode_texts(300)]
    check_same(tokenizer, tmp_path, texts)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    added = {token["id"]: token["content"] for token in fields["added_tokens"]}
    assert added == {260: "<|unused_260|>", 261: "<|other|>", 262: "<|unused_262|>", 263: EOT}


def test_every_split_is_a_merge():
    """tiktoken joins b with c before a with bc, and a with b before ab with c."""
    assert merges_of({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "xyz": 6}) == [
        "a b",
        "b c",
        "a bc",
        "ab c",
    ]


# -- a tokenizer.json that came from elsewhere ----------------------------------------------------


def template(*, before=(), after=()):
    """A post-processor with tokens around a text."""
    special = {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in (*before, *after)}
    parts = [{"SpecialToken": {"id": name, "type_id": 0}} for _, name in before]
    parts += [{"Sequence": {"id": "A", "type_id": 0}}]
    parts += [{"SpecialToken": {"id": name, "type_id": 0}} for _, name in after]
    return {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": special}


def with_fields(folder, config=None, **fields):
    """A small byte-level tokenizer.json with some fields replaced."""
    byte_level_json(folder, (EOT, "<bos>"))  # ids 257 and 258
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(str(folder))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BOS = template(before=[(258, "<bos>")])


@pytest.mark.parametrize(
    ("processor", "prefix"),
    [
        (None, []),
        (BYTES, []),
        (BOS, [258]),
        ({"type": "Sequence", "processors": [BYTES, BOS]}, [258]),
        ({"type": "BertProcessing", "sep": ["b", 98], "cls": ["<bos>", 258]}, [258]),
        (template(after=[(257, EOT)]), []),
    ],
)
def test_what_a_file_puts_before_a_text_stays(tmp_path, processor, prefix):
    tokenizer = with_fields(tmp_path / "in", post_processor=processor)
    theirs, back = written(tokenizer, tmp_path / "out")
    assert tokenizer.prefix_ids == back.prefix_ids == prefix
    ids = theirs("ab")["input_ids"]
    assert ids[: len(prefix) + 1] == [*prefix, 256]
    assert len(ids) == sum(map(len, added_by(processor))) + 1
    assert theirs.bos_token is None
    assert back.fingerprint == tokenizer.fingerprint
    plain = with_fields(tmp_path / "plain", post_processor=None)
    assert plain.fingerprint == tokenizer.fingerprint  # it maps text alike


def test_a_dataset_says_that_eot_comes_first(tmp_path):
    """`save` goes with data in which it does; a file with a start of its own keeps it."""
    for processor, prefix in ((None, [257]), (BYTES, [257]), (BOS, [258])):
        tokenizer = with_fields(tmp_path / "in", post_processor=processor)
        tokenizer.save(tmp_path / "saved")
        saved = load_tokenizer(tokenizer.name, tmp_path / "saved")
        assert saved.prefix_ids == prefix and saved.fingerprint == tokenizer.fingerprint
        theirs, _ = written(saved, tmp_path / "out")
        assert theirs("a")["input_ids"] == [*prefix, 97]


def test_its_config_goes_first(tmp_path):
    given = {
        "eos_token": "<bos>",
        "pad_token": "a",
        "model_max_length": 7,
        "tokenizer_class": "TokenizersBackend",
    }
    tokenizer = with_fields(tmp_path / "in", given)
    theirs, back = written(tokenizer, tmp_path / "out", max_length=99)
    assert (theirs.eos_token, theirs.pad_token, theirs.model_max_length) == ("<bos>", "a", 7)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # 4.57 knows no other
    assert back.eot_id == tokenizer.eot_id == 257
    assert theirs(f"a{EOT}")["input_ids"] == tokenizer.encode(f"a{EOT}")


@pytest.mark.parametrize("where", ["config", "file"])
def test_a_chat_template_works_after_the_journey(tmp_path, where):
    """Templates are made of special tokens, so these are read as such again."""
    text = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}"
    config = {"chat_template": text} if where == "config" else {}
    (tmp_path / "in").mkdir()
    if where == "file":
        (tmp_path / "in" / "chat_template.jinja").write_text(text)
    tokenizer = with_fields(tmp_path / "in", config)
    tokenizer.save(tmp_path / "saved")
    theirs, _ = written(load_tokenizer(tokenizer.name, tmp_path / "saved"), tmp_path / "out")
    said = theirs.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=True)
    assert getattr(said, "input_ids", said)[-2:] == [258, 256]


def test_a_tokenizer_that_has_no_such_form(tmp_path):
    class Odd(Tokenizer):
        name, vocab_size, eot_id, fingerprint, pieces = "odd", 1, 0, "0", [b""]

        def encode_array(self, text):
            raise NotImplementedError

    with pytest.raises(UserError, match="odd .* cannot be written"):
        write_tokenizer(Odd(), tmp_path)
    assert not list(tmp_path.iterdir())
