"""Laws of the file formats: what is good is read whole, and what is bad is named by its place."""

import gzip
import json
import random as stdlib_random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fn import readers
from rlhf_fn.errors import DataError
from rlhf_fn.readers import Demonstration, Pair, Read

DATA = Path(__file__).parents[1] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no data at {DATA}")

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
words = text.filter(str.strip)
pairs = st.builds(Pair, st.just("") | words, words, words).filter(lambda p: p.chosen != p.rejected)
GOOD = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def write(folder: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@given(
    records=st.lists(pairs, min_size=1, max_size=5),
    layout=st.sampled_from(["list", "lines"]),
    ascii=st.booleans(),
    bom=st.booleans(),
    crlf=st.booleans(),
    packed=st.booleans(),
)
def test_every_layout_and_line_ending_reads_the_same_records(
    tmp_path_factory, records, layout, ascii, bom, crlf, packed
):
    rows = [r._asdict() for r in records]
    dumped = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    whole = json.dumps(rows, indent=1, ensure_ascii=ascii)
    content = ("\n".join(dumped) + "\n" if layout == "lines" else whole).encode()
    content = content.replace(b"\n", b"\r\n") if crlf else content
    content = b"\xef\xbb\xbf" + content if bom else content
    path = write(tmp_path_factory.mktemp("d"), gzip.compress(content) if packed else content)
    assert readers.read_pairs(path) == Read(records, ())


@given(prompt=text, chosen=words, rejected=words)
def test_a_dialogue_is_its_prompt_followed_by_either_answer(prompt, chosen, rejected):
    shared = f"\n\nHuman: {prompt}\n\nAssistant:"
    found = readers.dialogue_prompt(shared + chosen, shared + rejected)
    assert (shared + chosen).startswith(found) and (shared + rejected).startswith(found)
    assert found.endswith(readers.TURN) and len(found) >= len(shared)
    assert readers.dialogue_prompt(shared + rejected, shared + chosen) == found


def test_the_prompt_of_a_dialogue_ends_at_the_last_turn_that_both_share():
    history = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"
    assert readers.dialogue_prompt(history + " yes", history + " yet") == history
    assert readers.dialogue_prompt("a fine day", "a foul day") == ""


BAD = {
    "cut": ('{"prompt": "p", "chosen": "a"', 1, 30, "corrupt JSON"),
    "not json": ("hello", 1, 1, "corrupt JSON"),
    "two on a line": (json.dumps(GOOD) * 2, 1, 53, "one JSON object on each line"),
    "twice": ('{"chosen": "a", "chosen": "b"}', 1, 1, "'chosen' occurs twice"),
    "deep": ('{"a":' + "[" * 100_000, 1, 1, "corrupt JSON"),
    "raw nul": ('{"prompt": "p\0"}', 1, 14, "corrupt JSON"),
    "nul": (json.dumps(GOOD | {"chosen": "a\0"}), 1, 17, "NUL"),
    "surrogate": (json.dumps(GOOD | {"chosen": "\ud800"}), 1, 17, "surrogate"),
    "no object": ("3", 1, 1, "type int, expected an object"),
    "missing": (lines({"prompt": "p", "chosen": "a"}), 1, 1, "no field 'rejected'"),
    "number": (lines(GOOD | {"chosen": 3}), 1, 17, "'chosen' is of type int"),
    "messages": (lines(GOOD | {"rejected": [{"content": "x"}]}), 1, 35, "type list"),
    "null": (lines(GOOD | {"prompt": None}), 1, 2, "'prompt' is of type NoneType"),
    "no answer": (lines(GOOD | {"rejected": " "}), 1, 35, "'rejected' is empty"),
    "same": (lines(GOOD | {"rejected": "good"}), 1, 35, "identical"),
    "silent": (
        lines({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant:"}),
        1,
        32,
        "nothing",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_by_file_line_and_column_and_says_what_to_do(tmp_path, name):
    content, line, column, message = BAD[name]
    with pytest.raises(DataError, match=message) as caught:
        readers.read_pairs(write(tmp_path, content))
    error = caught.value
    assert (error.line, error.column) == (line, column)
    assert str(error).startswith(f"{tmp_path / 'data.jsonl'}:{line}:{column}: ")


@pytest.mark.parametrize("name", BAD)
def test_a_skipped_record_is_counted_and_costs_no_other(tmp_path, name):
    other = GOOD | {"prompt": "q"}
    path = write(tmp_path, lines(GOOD) + BAD[name][0].rstrip("\n") + "\n" + lines(other))
    read = readers.read_pairs(path, on_bad="skip")
    assert read.records == [Pair(**GOOD), Pair(**other)]
    assert [(e.line, e.column) for e in read.skipped] == [(2, BAD[name][2])]
    with pytest.raises(DataError, match="data.jsonl:2:"):
        readers.read_pairs(path)


def test_an_unknown_on_bad_raises(tmp_path):
    with pytest.raises(ValueError, match='on_bad.*ignore.*"raise" or "skip"'):
        readers.read_pairs(write(tmp_path, lines(GOOD)), on_bad="ignore")


@pytest.mark.parametrize("content", ["", "\n \r\n", "[]", "\ufeff"])
def test_a_file_without_records_raises(tmp_path, content):
    for on_bad in ("raise", "skip"):
        with pytest.raises(DataError, match="no records"):
            readers.read_pairs(write(tmp_path, content), on_bad=on_bad)
    with pytest.raises(DataError, match="none of 1 records.*identical"):
        readers.read_pairs(write(tmp_path, BAD["same"][0]), on_bad="skip")


@pytest.mark.parametrize(
    "content, line, column",
    [('[{"a": "b"},\n {"a": ]', 2, 8), ('[{"a": "b"}', 1, 12), ('[{"a": "b"},]', 1, 13),
     ('[{"a": "b"}]\nx', 2, 1), ("[", 1, 2), ('[{"a": "b"},\n3]', 2, 1)],
)  # fmt: skip
def test_a_corrupt_list_is_named_by_the_place_that_breaks_it(tmp_path, content, line, column):
    with pytest.raises(DataError) as caught:
        readers.read_fields(write(tmp_path, content), ("a",))
    assert (caught.value.line, caught.value.column) == (line, column)


@pytest.mark.parametrize(
    "content, line, column",
    [
        (b'{"a": "b"}\n{"\xc3\xa9": "\xff"}\n', 2, 8),
        (b"\xff\xfe{\x00", 1, 1),
        (b"\xef\xbb\xbfa\xff", 1, 2),
    ],
)
def test_bytes_that_are_not_utf8_are_named_by_line_and_column(tmp_path, content, line, column):
    with pytest.raises(DataError, match="UTF-8; save") as caught:
        readers.read_fields(write(tmp_path, content), ("a",), on_bad="skip")
    assert (caught.value.line, caught.value.column) == (line, column)


def test_a_damaged_gzip_raises(tmp_path):
    packed = gzip.compress(lines(GOOD).encode())
    for content in (packed[:-9], packed[:20] + b"\xff" + packed[21:], b"plain"):
        with pytest.raises(DataError, match="damaged gzip"):
            readers.read_pairs(write(tmp_path, content, "data.jsonl.gz"))


def test_any_damage_to_a_file_is_a_data_error_or_harmless(tmp_path):
    generator = stdlib_random.Random(0)
    whole = lines(
        GOOD, GOOD | {"prompt": "é"}, {"instruction": "i", "chosen": "x", "rejected": "y"}
    )
    for _ in range(1000):
        content = bytearray(whole.encode())
        for _ in range(generator.randint(1, 3)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path = write(tmp_path, bytes(content[: generator.randint(1, len(content))]))
        for on_bad in ("raise", "skip"):
            try:
                read = readers.read_pairs(path, on_bad=on_bad)
            except DataError as error:
                assert error.line >= 1 and error.column >= 1
            else:
                assert all(p.chosen != p.rejected and p.chosen.strip() for p in read.records)


@given(pieces=st.lists(words.filter(lambda s: "<|" not in s), min_size=2), crlf=st.booleans())
def test_text_prompts_are_lines_unless_separators_cut_them(tmp_path_factory, pieces, crlf):
    folder, pieces = tmp_path_factory.mktemp("t"), [p.replace("\r", "") or "x" for p in pieces]
    pieces = [p.strip("\n") for p in pieces if p.strip()] or ["x"]
    end = "\r\n" if crlf else "\n"
    stories = f"{end}<|endoftext|>{end}".join([*(p.replace("\n", end) for p in pieces), ""])
    assert readers.read_prompts(write(folder, stories, "a.txt")).records == pieces
    flat = [p.replace("\n", " ") for p in pieces]
    assert readers.read_prompts(write(folder, (end * 2).join(flat), "b.txt")).records == flat
    rows = lines(*({"question": p} for p in pieces))
    assert readers.read_prompts(write(folder, rows), field="question").records == pieces


def test_text_with_nul_raises(tmp_path):
    with pytest.raises(DataError, match="b.txt:2:3: NUL"):
        readers.read_prompts(write(tmp_path, "one\ntw\0o", "b.txt"))


def test_sentences_are_paired_line_by_line_whatever_their_encoding(tmp_path):
    good = write(tmp_path, "très bon\ngood\u2028one\n".encode(), "a.pos")
    bad = write(tmp_path, "déjà vu\r\nbad\r\n".encode("latin-1"), "a.neg")
    read = readers.read_sentences(good, bad)
    assert read.records == [Pair("", "très bon", "déjà vu"), Pair("", "good\u2028one", "bad")]
    refused = {
        "a.pos:2:1: 2 positive and 1 negative": b"bad\n",
        "U\\+0093: neither UTF-8 nor Latin-1": b"\x93bad\x94\nx\n",
        "a.neg:2:1: blank": b"x\n\n",
        "a.neg:2:1: also line 2": b"x\ngood\xe2\x80\xa8one\n",
    }
    for message, content in refused.items():
        with pytest.raises(DataError, match=message):
            readers.read_sentences(good, write(tmp_path, content, "a.neg"))


def test_an_instruction_is_the_alpaca_prompt_unless_another_template_is_passed(tmp_path):
    rows = lines({"instruction": "Add.", "input": "1 1", "output": "2"},
                 {"instruction": "Hi", "input": "", "output": "Ho"},
                 {"prompt": "p", "completion": "c"})  # fmt: skip
    with_input, without, plain = readers.read_instructions(write(tmp_path, rows)).records
    assert "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n" in with_input.prompt
    assert "Input" not in without.prompt and without.completion == "Ho"
    assert plain == Demonstration("p", "c")
    short = readers.read_instructions(tmp_path / "data.jsonl", template=lambda i, x: f"{i}|{x}|")
    assert short.records[0] == Demonstration("Add.|1 1|", "2")


@needs_data
def test_the_public_files_are_read_whole():
    assert len(readers.read_instructions(DATA / "instruction/instruction.json").records) == 1100
    with pytest.raises(DataError, match="instruction-preference.json:861:9: .*identical"):
        readers.read_pairs(DATA / "preference/instruction-preference.json")
    short = readers.read_pairs(DATA / "preference/instruction-preference.json", on_bad="skip")
    assert (len(short.records), len(short.skipped)) == (1094, 6)
    dialogues = readers.read_pairs(DATA / "preference/hh-rlhf-harmless.jsonl.gz", on_bad="skip")
    assert (len(dialogues.records), len(dialogues.skipped)) == (1996, 4)
    assert all(p.prompt.endswith(readers.TURN) for p in dialogues.records)
    polarity = DATA / "sentiment"
    sentences = readers.read_sentences(polarity / "rt-polarity.pos", polarity / "rt-polarity.neg")
    assert len(sentences.records) == 5331
    assert len(readers.read_prompts(DATA / "text/tinystories_sample.txt").records) > 300
    sums = readers.read_fields(DATA / "math/gsm8k_test.jsonl", ("question", "answer"))
    assert len(sums.records) == 1319
