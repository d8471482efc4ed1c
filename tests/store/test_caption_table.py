"""Captions on disk: what is read is what was written, and none of a test GIF is there to train on."""

import hashlib
from io import BytesIO

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers.config import load_profile
from helpers.corpora.schema import Corpus, caption_table, question_row, question_table, reject_table
from helpers.store.shards import shard_gifs
from helpers.store.tables import StoreError, read_captions, write_captions

ROWS = [
    {"caption_id": "b-2", "gif_sha256": "bb", "split": "test", "caption": "a cat 'sits'", "facts": []},
    {"caption_id": "a-1", "gif_sha256": "aa", "split": "train", "caption": "ein Hund läuft", "facts": ["x=1", "y<z"]},
]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []])
def test_captions_come_back_sorted_with_lists_of_facts(tmp_path, rows):
    path = tmp_path / "captions.parquet"
    write_captions(pd.DataFrame(rows, columns=list(ROWS[0])), path)
    assert read_captions(path).to_dict("records") == sorted(rows, key=lambda row: row["caption_id"])
    assert pq.read_schema(path).names == list(ROWS[0])


def test_a_run_of_an_earlier_version_has_no_captions(tmp_path):
    captions = read_captions(tmp_path / "captions.parquet")
    assert captions.empty and list(captions.columns) == list(ROWS[0])


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (pd.DataFrame(ROWS).drop(columns="facts"), "not .*facts"),
        (pd.DataFrame(ROWS).assign(facts="x=1"), "facts .*string, not"),
        (pd.DataFrame(ROWS).assign(caption=[1, 2]), "caption int64"),
        (pd.DataFrame(ROWS).assign(lang="en"), "lang"),
    ],
)
def test_another_table_is_refused_by_its_columns(tmp_path, table, told):
    table.to_parquet(tmp_path / "captions.parquet")
    with pytest.raises(StoreError, match=rf"captions\.parquet is no table of captions.*{told}.*--force"):
        read_captions(tmp_path / "captions.parquet")


def test_a_damaged_table_is_named(tmp_path):
    path = tmp_path / "captions.parquet"
    write_captions(pd.DataFrame(ROWS), path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StoreError, match=r"captions\.parquet cannot be read as a table.*--force"):
        read_captions(path)


def gif_bytes(seed: int) -> bytes:
    """A GIF of three random pictures."""
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (20, 24), dtype=np.uint8)) for _ in range(3)]
    buffer = BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    return buffer.getvalue()


def with_comment(gif: bytes) -> bytes:
    """The GIF with a comment extension (GIF89a specification, section 24) before its trailer."""
    assert gif.endswith(b"\x3b")
    return gif[:-1] + b"\x21\xfe\x05hello\x00\x3b"


def test_captions_follow_their_gifs_and_none_leaks_from_the_test(tmp_path):
    shown = gif_bytes(0)
    files = {"a": gif_bytes(1), "bad": b"<html>", "bytes": shown, "frames": with_comment(shown), "test": shown}
    files |= {"told": with_comment(shown), "twin": gif_bytes(1), "alone": gif_bytes(2)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    asked = {"a": "train", "bytes": "train", "frames": "train", "test": "test", "bad": "train"}
    rows = [
        question_row(question_id=f"q-{gif}", gif=gif, split=split, task="frameqa", question="what ?", answer="cat")
        for gif, split in asked.items()
    ]
    told = [(gif, asked.get(gif, "train"), f"a cat of {number}", ["x=1"]) for number, gif in enumerate(files)]
    told += [("a", "train", "it sits", []), ("twin", "train", "it sits", []), ("gone", "train", "never there", [])]
    places = {name: str(tmp_path / name) for name in files}
    corpus = Corpus("own", question_table(rows), places, reject_table([]), captions=caption_table(told))
    data = load_profile("tiny", {"data.workers": 1}).data
    made = shard_gifs(corpus, tmp_path / "01", data)

    captions = read_captions(tmp_path / "01" / "captions.parquet").set_index("caption_id")
    assert captions.split.to_dict() == {
        "a-1": "train",
        "a-2": "train",
        "alone-1": "train",
        "test-1": "test",
        "twin-1": "train",  # its other caption is that of the same bytes under another name
    }
    assert captions.index.is_unique and captions.index.is_monotonic_increasing
    for name, row in captions.iterrows():
        assert row.gif_sha256 == hashlib.sha256(files[name[:-2]]).hexdigest()
        assert row.facts == ([] if name == "a-2" else ["x=1"])
    assert set(made.captions.caption_id) == set(captions.index)
    reasons = dict(made.rejects[["item", "reason"]].to_numpy().tolist())
    assert reasons["bad-1"] == "its GIF was rejected" and reasons["gone-1"] == "its GIF was not found"
    assert reasons["bytes"] == "same bytes as the test GIF test: its 1 training questions and 1 captions left out"
    assert reasons["frames"] == "same frames as the test GIF test: its 1 training questions and 1 captions left out"
    assert reasons["told"] == "same frames as the test GIF test: its 1 captions left out"
    assert len(made.rejects) == 7  # and bad.gif itself, and its question

    before = (tmp_path / "01" / "captions.parquet").read_bytes()
    (tmp_path / "01" / "captions.parquet").unlink()  # as by a version that wrote none, or a kill before it was written
    shard_gifs(corpus, tmp_path / "01", data)
    assert (tmp_path / "01" / "captions.parquet").read_bytes() == before


def test_a_test_gif_that_has_captions_only_is_not_trained_on_either(tmp_path):
    files = {"a": gif_bytes(0), "copy": with_comment(gif_bytes(0)), "b": gif_bytes(1), "told": gif_bytes(0)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    rows = [
        question_row(question_id=gif, gif=gif, split="train", task="frameqa", question="what ?", answer="cat")
        for gif in ("a", "b")
    ]
    captions = caption_table([("copy", "test", "a cat", []), ("told", "train", "a cat sits", [])])
    places = {name: str(tmp_path / name) for name in files}
    corpus = Corpus("own", question_table(rows), places, reject_table([]), captions=captions)
    made = shard_gifs(corpus, tmp_path / "01", load_profile("tiny", {"data.workers": 1}).data)
    assert made.questions.gif.tolist() == ["b"] and made.captions.gif.tolist() == ["copy"]
    reason = "same frames as the test GIF copy: its 1 "
    assert made.rejects.reason.tolist() == [f"{reason}training questions left out", f"{reason}captions left out"]
