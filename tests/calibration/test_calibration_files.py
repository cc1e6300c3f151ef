"""Every kind of file gives the same documents, and a broken one is refused with its place and a remedy."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path

import pytest

from gptqkit.calibration.files import read_file
from gptqkit.core.errors import InputError

TEXTS = ["First document, with a comma.", "Second\nof two lines, “quoted”.", "Third\u2028with a line separator."]


def contents(path: Path) -> list[str]:
    records = [record for _, record in read_file(path)]
    return [record["text"] if isinstance(record, dict) else record for record in records]


def write_csv(path: Path, delimiter: str) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["id", "text"], *enumerate(TEXTS)])


def write(path: Path) -> None:
    """TEXTS in the format that the first suffix says."""
    kind = path.suffixes[0]
    if kind == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS) + "\n\n", encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    elif kind == ".txt":
        path.write_text("\0".join(TEXTS), encoding="utf-8")
    elif kind in (".csv", ".tsv"):
        write_csv(path, "," if kind == ".csv" else "\t")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"id": [0, 1, 2], "text": TEXTS}), path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet"])
def test_each_kind_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"data{suffix}")
    assert contents(tmp_path / f"data{suffix}") == TEXTS


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".csv", ".tsv"])
def test_gzip(tmp_path: Path, suffix: str) -> None:
    plain, packed = tmp_path / f"data{suffix}", tmp_path / f"data{suffix}.gz"
    write(plain)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert contents(packed) == TEXTS


@pytest.mark.parametrize(
    ("content", "records"),
    [
        ('["a", "b"]', ["a", "b"]),
        ('{"text": "a"}', [{"text": "a"}]),
        ('{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
        ("[[1, 2], [3]]", [[1, 2], [3]]),
        ("[1, 2, 3]", [[1, 2, 3]]),
    ],
)
def test_json_shapes(tmp_path: Path, content: str, records: list[object]) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    assert [record for _, record in read_file(path)] == records


def test_a_byte_order_mark_is_no_part_of_the_first_document(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n')
    assert contents(path) == ["a"]


def test_running_text_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}. " + "word " * (number % 97) for number in range(600)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    pieces = contents(path)
    assert len(pieces) > 3
    assert all(len(piece) >= 15_000 for piece in pieces[:-1])
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)


def test_running_text_without_any_break_is_cut_by_length(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("x" * 100_000)
    pieces = contents(path)
    assert "".join(pieces) == "x" * 100_000
    assert max(map(len, pieces)) <= 32_000


def test_a_csv_field_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = tmp_path / "long.csv"
    path.write_text(f'text\n"{"word " * 40_000}"\n')
    assert [len(text) for text in contents(path)] == [200_000]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", r"empty\.jsonl is empty"),
        ("blank.txt", b" \n\n ", r"blank\.txt holds only white space"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": }\n', r"bad\.jsonl, line 2 is not JSON: .*each line must be one JSON value"),
        ("bad.json", b'[\n"a",\n]', r"bad\.json, line [23] is not JSON"),
        ("latin.txt", "Grüße".encode("latin-1"), r"latin\.txt is not UTF-8 text \(byte 2 is 0xfc\); convert it to UTF-8"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "abc"}' * 999, mtime=0)[:40], r"cut\.jsonl\.gz cannot be read: "),
        ("bad.csv", b'text\n"never closed', r"bad\.csv: not a table of comma-separated values"),
        ("data.docx", b"x", r"data\.docx is of an unknown kind; readable: \.jsonl, .*\.parquet"),
    ],
)
def test_broken_files_are_refused_with_their_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_file(path))


def test_a_broken_parquet_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"PAR1 is not enough")
    with pytest.raises(InputError, match=r"bad\.parquet is not a readable parquet file"):
        list(read_file(path))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"calibration file .*nowhere\.txt does not exist"):
        read_file(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match=r"is a folder; give one file \(\.jsonl"):
        read_file(tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow; pip install 'gptqkit\[data\]'"):
        list(read_file(tmp_path / "data.parquet"))
