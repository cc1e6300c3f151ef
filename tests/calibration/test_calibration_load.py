"""Calibration sequences: deterministic, of the right lengths, nothing lost or used twice, and wrong data refused before work begins."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from gptqkit.calibration import CalibrationSet, load_calibration
from gptqkit.core.errors import InputError
from gptqkit.core.events import Event
from gptqkit.data import model_folder
from gptqkit.hf.tokenizer import encode, load_tokenizer

VOCAB = 4096
BOS = 1
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
WORDS = ["the", "river", "runs", "past", "old", "stone", "houses", "and", "a", "small", "mill", "before", "it", "meets", "sea", "near"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(1)
    return [f"Document {number}. " + " ".join(draw.choices(WORDS, k=200)) for number in range(40)]


class Listener(list):
    def __call__(self, event: Event) -> None:
        self.append(event)

    def said(self, kind: str) -> str:
        return " | ".join(event.message for event in self if event.kind == kind)


def load(source: Any, **options: Any) -> CalibrationSet:
    defaults: dict[str, Any] = {"tokenizer_folder": model_folder(), "vocab_size": VOCAB, "samples": 4, "seqlen": 64, "seed": 0}
    return load_calibration(source, **{**defaults, **options})


def folder_with(tmp_path: Path, **tokenizer_config: Any) -> Path:
    """A copy of the tokenizer with changes to its config."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder() / name, tmp_path / name)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **tokenizer_config}))
    return tmp_path


def without_bos(tmp_path: Path) -> Path:
    folder = folder_with(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content.pop("bos_token", None)
        content.pop("post_processor", None)
        (folder / name).write_text(json.dumps(content))
    return folder


def test_bundled_text_is_pinned() -> None:
    heard = Listener()
    result = load(None, samples=16, seqlen=128, emit=heard)
    assert result.fingerprint == "58f954c6055f54e46e84c73ec4161b2b8fc682e2eeac6b06cfc883eaef39b2e9"
    assert result.description["source"] == "bundled text"
    assert result.description["sha256"] == result.fingerprint
    assert "text of your own domain is better: --calibration FILE" in heard.said("note")


def test_packing_lays_documents_end_to_end(texts: list[str]) -> None:
    result = load(texts, samples=5, seqlen=96)
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    tokenizer = load_tokenizer(model_folder())
    documents = [[BOS, *encode(tokenizer, [texts[index]], special=False)[0]] for index in order]
    rounds = range(0, max(map(len, documents)), 96)  # 96 tokens of each document, then the next 96 of each, …
    stream = [token for start in rounds for document in documents for token in document[start : start + 96]]
    assert torch.cat([*result.ids, *result.held_back]).tolist() == stream[: 5 * 96 + 8 * 96]
    assert [len(ids) for ids in result.ids] == [96] * 5
    assert [len(ids) for ids in result.held_back] == [96] * 8
    assert all(ids.dtype == torch.int64 for ids in result.ids)
    assert result.tokens == 480
    assert result.description["bos"] == "before every document"


def test_same_seed_same_ids_and_another_seed_others(texts: list[str]) -> None:
    first, again, other = load(texts), load(list(texts)), load(texts, seed=1)
    assert first.fingerprint == again.fingerprint
    assert [ids.tolist() for ids in first.ids] == [ids.tolist() for ids in again.ids]
    assert first.fingerprint != other.fingerprint


def test_only_as_much_is_tokenised_as_is_needed(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(tokenizer: Any, batch: list[str], *, special: bool) -> list[list[int]]:
        calls.append(len(batch))
        return encode(tokenizer, batch, special=special)

    monkeypatch.setattr("gptqkit.calibration.load.encode", counting)
    load(texts * 50)
    assert sum(calls) <= 32 < len(texts) * 50


def test_every_kind_of_text_source_gives_the_same_ids(texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected = load(texts).fingerprint
    for source in (path, str(path), [{"text": text} for text in texts], tuple(texts)):
        assert load(source).fingerprint == expected
    assert load([{"body": text} for text in texts], column="body").fingerprint == expected
    assert load(path).description["source"] == "data.jsonl"
    assert str(tmp_path) not in json.dumps(load(path).description)


def test_truncated_texts_are_one_sequence_a_document(texts: list[str]) -> None:
    result = load([*texts, "short"], samples=30, seqlen=50, packed=False)
    assert len(result.ids) == 30
    assert max(len(ids) for ids in result.ids) == 50
    assert all(ids[0] == BOS for ids in result.ids)
    assert result.description["packing"] == "truncated"


@pytest.mark.parametrize(
    "source",
    [
        [[5, 6, 7], [8, 9]],
        [{"input_ids": [0, 5, 6, 7], "attention_mask": [0, 1, 1, 1]}, {"input_ids": [8, 9]}],
        [{"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}],
        {"input_ids": numpy.array([[5, 6, 7], [8, 9, 0]]), "attention_mask": numpy.array([[1, 1, 1], [1, 1, 0]])},
        [torch.tensor([5, 6, 7]), numpy.array([8, 9])],
        (ids for ids in ([5, 6, 7], [8, 9])),
    ],
    ids=["lists", "masked dicts", "batch", "one mapping", "tensors", "generator"],
)
def test_token_ids_need_no_tokenizer_and_keep_their_lengths(source: Any) -> None:
    result = load(source, tokenizer_folder=None, samples=2)
    assert sorted(ids.tolist() for ids in result.ids) == [[5, 6, 7], [8, 9]]
    assert result.description["kind"] == "token ids"
    assert result.description["held_back_reused"] is True


def test_tokenizer_output_is_read_as_it_comes() -> None:
    encoded = load_tokenizer(model_folder())(["the river", "a small mill near the sea"], padding=True, return_tensors="pt")
    result = load([encoded], tokenizer_folder=None, samples=2)
    assert sorted(len(ids) for ids in result.ids) == sorted(encoded["attention_mask"].sum(1).tolist())


def test_token_ids_are_cut_to_seqlen_or_packed() -> None:
    source = [list(range(start, start + 30)) for start in range(40)]
    cut = load(source, samples=4, seqlen=20)
    assert [len(ids) for ids in cut.ids] == [20] * 4
    assert [len(ids) for ids in cut.held_back] == [20] * 8
    used = {tuple(ids.tolist()) for ids in cut.ids}
    assert used.isdisjoint(tuple(ids.tolist()) for ids in cut.held_back)
    packed = load(source, samples=4, seqlen=64, packed=True)
    assert [len(ids) for ids in packed.ids] == [64] * 4


def test_a_dataset_like_object_is_iterated(texts: list[str]) -> None:
    class Dataset:
        info = SimpleNamespace(builder_name="tales")

        def __len__(self) -> int:
            return len(texts)

        def __iter__(self) -> Any:
            return iter([{"text": text, "label": 0} for text in texts])

    result = load(Dataset())
    assert result.fingerprint == load(texts).fingerprint
    assert result.description["source"] == "data set tales"


def test_an_endless_stream_is_read_only_so_far(texts: list[str]) -> None:
    taken = 0

    def forever() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield {"text": texts[taken % len(texts)]}

    result = load(forever())
    assert len(result.ids) == 4
    assert taken < 100
    assert result.description["whole_source_read"] is False


def test_hub_data_set_is_streamed(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> Any:
        asked.append((name, split, streaming))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub")
        return iter([{"text": text} for text in texts])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    result = load("owner/tales:validation")
    load("owner/tales")
    assert asked == [("owner/tales", "validation", True), ("owner/tales", "train", True)]
    assert result.description["source"] == "owner/tales:validation"
    with pytest.raises(InputError, match=r"'no/such' is no file here, and as a hub data set .* Give 'owner/name:split'"):
        load("no/such")


def test_hub_data_set_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"'owner/tales' is no file here; .* pip install 'gptqkit\[data\]'"):
        load("owner/tales")


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, chat_template=CHAT_TEMPLATE)
    answer = {"role": "assistant", "content": "an answer " * 20}
    chats = [[{"role": "user", "content": f"question {number}"}, answer] for number in range(30)]
    result = load([{"messages": chat} for chat in chats], tokenizer_folder=folder)
    assert result.fingerprint == load(chats, tokenizer_folder=folder).fingerprint
    assert result.description["kind"] == "chat"
    text = load_tokenizer(folder).decode(torch.cat(result.ids))
    assert "<user>question" in text.replace("> ", ">")
    assert "<assistant>" in text.replace("> ", ">")
    with pytest.raises(InputError, match=r"item 0: the model's chat template refuses these messages: no robots"):
        load([[{"role": "robot", "content": "beep"}]], tokenizer_folder=folder)


def test_chats_without_a_template() -> None:
    with pytest.raises(InputError, match=r"item 0, messages: the tokenizer has no chat template.*add chat_template\.jinja"):
        load([{"messages": [{"role": "user", "content": "x"}]}])


def test_a_tokenizer_without_bos_is_said(texts: list[str], tmp_path: Path) -> None:
    heard = Listener()
    result = load(texts, tokenizer_folder=without_bos(tmp_path), emit=heard)
    assert "the tokenizer defines no BOS token" in heard.said("note")
    assert result.description["bos"] == "none defined"
    assert BOS not in torch.cat(result.ids)


def test_less_data_than_asked_is_a_warning_with_numbers(texts: list[str]) -> None:
    heard = Listener()
    result = load(texts[:2], samples=100, seqlen=32, emit=heard)
    assert 0 < len(result.ids) < 100
    assert f"gives {len(result.ids)} of 100 sequences of 32 tokens (it holds" in heard.said("warning")
    assert result.held_back
    assert result.description["held_back_reused"] is False


@pytest.mark.parametrize("extra", [0, 1, 15, 16, 100])
def test_just_one_sequence_is_enough(extra: int) -> None:
    heard = Listener()
    result = load([[number % 4000 for number in range(64 + extra)]], samples=1, packed=True, emit=heard)
    assert len(result.ids) == 1
    assert len(result.ids[0]) == 64
    assert result.description["held_back_reused"] is (extra < 64)
    if extra < 64:
        assert "reuses calibration tokens" in heard.said("warning")
        assert torch.equal(result.held_back[0], result.ids[0])


def test_less_than_one_sequence_is_an_error() -> None:
    with pytest.raises(InputError, match=r"holds 3 tokens, and one sequence takes seqlen=64; give more data, or lower --seqlen to 3"):
        load([[1, 2, 3]], packed=True)


def test_empty_documents_are_left_out_and_counted(texts: list[str]) -> None:
    heard = Listener()
    assert load(["", *texts, " \n"], emit=heard).description["documents"] == len(texts)
    assert "2 empty documents left out" in heard.said("note")
    with pytest.raises(InputError, match="holds no documents but 2 empty ones"):
        load(["", ""])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the given list holds no documents"),
        ([{"body": "x"}], r"item 0: no column 'text', 'messages' or 'input_ids'; columns there: body\. Rename"),
        ([{"text": None}], r"item 0, text: expected a text, .*found NoneType None"),
        (["a", 5], r"item 1: expected a text, .*found int 5"),
        (["a", [1]], r"item 1 is token ids, but .*item 0 is text; one source must be of one kind"),
        ([[]], r"item 0: .*found an empty list"),
        ([1, 2, 3], r"item 0: expected .*found int 1"),
        ([[1, 2], [1, 5000]], r"item 1: token id 5000 at position 1 is outside the model's vocabulary of 4,096; .*another model\?"),
        ([[1, -2]], r"token id -2 at position 1 is outside"),
        ([[1.5, 2.0]], r"token ids must be integers of shape \[T\] or \[B, T\]; found float32 \[2\]"),
        ([[True, False]], r"found bool \[2\]"),
        ([[2**70]], r"item 0: token ids are not a rectangular list of integers"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], r"token ids of shape \[1, 2\] with an attention_mask of shape \[1, 1\]"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], r"item 0, input_ids: an empty sequence of token ids"),
        ([[{"content": "x"}]], r"message 0 has no 'role' \(keys there: content\)"),
        ({"train": [[1]]}, r"a mapping with the keys 'train'; if these are splits, pass one of them: data\['train'\]"),
        (5, r"calibration=5 is a int; give a file"),
        ("a text\nof two lines", r"is a text, not the name of a file; to calibrate on a text pass a list: \[text\]"),
        ("folder/nowhere.jsonl", r"calibration file folder/nowhere\.jsonl does not exist"),
    ],
)
def test_wrong_sources_are_refused_with_cause_and_remedy(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(source)


@pytest.mark.parametrize("option", [{"samples": 0}, {"seqlen": -1}, {"samples": True}])
def test_counts_must_be_positive(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected a whole number of at least 1"):
        load([[1, 2]], **option)


@pytest.mark.parametrize("rows", ["1,000", "8,192"])
def test_tokenizer_of_another_model(rows: str, texts: list[str]) -> None:
    with pytest.raises(
        InputError, match=rf"has 4,096 tokens, but the model has embeddings for {rows}; it is the tokenizer of another model"
    ):
        load(texts, vocab_size=int(rows.replace(",", "")))


def test_padded_embeddings_are_ordinary(texts: list[str]) -> None:
    assert load(texts, vocab_size=4352).ids


def test_folder_without_or_with_a_broken_tokenizer(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer .*or pass token ids instead of text"):
        load(texts, tokenizer_folder=tmp_path)
    with pytest.raises(InputError, match=r"texts and chats need the model's tokenizer"):
        load(texts, tokenizer_folder=None)
    (folder_with(tmp_path) / "tokenizer.json").write_text("{broken")
    with pytest.raises(InputError, match=r"the tokenizer of .* cannot be loaded: .*download its files again"):
        load(texts, tokenizer_folder=tmp_path)
