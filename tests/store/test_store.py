"""Frame shards and the feature table: round trips, resume, refusals, and reads checked against plain loops."""

import hashlib
import json
import math
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from helpers.config import DataConfig, load_profile
from helpers.corpora.schema import Corpus, question_row, question_table, reject_table
from helpers.gifs.decode import decode
from helpers.gifs.fetch import FetchError
from helpers.models.xclip import FrameEncoder, load_xclip
from helpers.stage import START_UP_SECONDS, own_pace
from helpers.stage.pace import DeadlineReached
from helpers.store import encoding, shards, workers
from helpers.store.encoding import cache_features
from helpers.store.features import FeatureTable
from helpers.store.frames import FrameTable
from helpers.store.shards import leave_out, shard_gifs
from helpers.store.tables import StoreError, read_questions
from helpers.workspace.disk import DiskFull

SIZE = 32


def data_config(**changes) -> DataConfig:
    values = {
        "corpus": "own_gifs",
        "shard_size": 4,
        "image_size": SIZE,
        "frame_format": "png",
        "frame_quality": 90,
        "groups": [1, 2, 3],
        "max_canvas_pixels": 100_000,
        "max_frames": 200,
        "max_bytes": 1_000_000,
        "workers": 1,
    }
    return DataConfig(**(values | changes))


def gif_bytes(seed: int, frames: int) -> bytes:
    """A GIF of random pictures, 40 x 36 pixels, with uneven frame times."""
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (36, 40), dtype=np.uint8)) for _ in range(frames)]
    buffer = BytesIO()
    durations = [int(10 * rng.integers(3, 30)) for _ in range(frames)]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations)
    return buffer.getvalue()


def make_corpus(folder: Path, files: dict[str, bytes], splits: dict[str, str] | None = None) -> Corpus:
    """Write these GIFs and ask two questions about each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, content in files.items():
        (folder / name).write_bytes(content)
        split = (splits or {}).get(name, "train")
        rows.append({"gif": name, "split": split, "task": "count", "question": "how many ?", "answer": "3"})
        options = {"options": ["jump", "spin", "wave"]}
        rows.append({"gif": name, "split": split, "task": "action", "question": "what ?", "answer": "1", **options})
    questions = question_table(question_row(question_id=f"q{i}", **row) for i, row in enumerate(rows))
    return Corpus("test", questions, {name: str(folder / name) for name in files}, reject_table([]))


LENGTHS = {"a.gif": 3, "b.gif": 16, "c.gif": 17, "d.gif": 33, "e.gif": 60, "f.gif": 1, "g.gif": 40}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {name: gif_bytes(seed, frames) for seed, (name, frames) in enumerate(LENGTHS.items())}


@pytest.fixture
def corpus(tmp_path, files) -> Corpus:
    return make_corpus(tmp_path / "gifs", files)


class Encoder(nn.Module):
    """A linear map of each frame plus the mean frame of its group, so that groups and masks matter."""

    frames_per_group, image_size, embed_dim = 16, SIZE, 8

    def __init__(self, key: str = "fake@1"):
        super().__init__()
        self.key = key
        self.batches: list[int] = []
        self.linear = nn.Linear(SIZE * SIZE * 3, 8)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nn.init.normal_(self.linear.weight, std=0.1)
            nn.init.zeros_(self.linear.bias)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        assert frames.dtype == torch.uint8
        self.batches.append(len(frames))
        mask = (torch.arange(16) < lengths[:, None])[..., None]
        values = self.linear(frames.flatten(2).float() / 255) * mask
        return (values + values.sum(1, keepdim=True) / lengths[:, None, None]) * mask


def table_rows(path: Path) -> list[dict]:
    return lance.dataset(str(path)).to_table().to_pylist()


def all_rows(folder: Path) -> dict[str, object]:
    """Everything in a finished folder of notebook 01."""
    rows = {p.name: table_rows(p) for p in sorted((folder / "frames").glob("*.lance"))}
    return rows | {
        str(path.relative_to(folder)): pd.read_parquet(path).to_dict("list")
        for path in sorted(folder.rglob("*.parquet"))
        if ".lance" not in str(path)
    }


def same(left: dict, right: dict) -> bool:
    return json.dumps(left, default=repr) == json.dumps(right, default=repr)


# ------------------------------------------------------------------------------------------------ shards


def test_shards_hold_the_decoded_frames(tmp_path, corpus, files):
    made = shard_gifs(corpus, tmp_path / "01", data_config())
    assert made.gifs == len(files)
    assert sorted(p.name for p in (tmp_path / "01" / "frames").glob("*.lance")) == [
        "shard-00000.lance",
        "shard-00001.lance",
    ]
    rows = [table_rows(p) for p in sorted((tmp_path / "01" / "frames").glob("*.lance"))]
    assert [{row["gif"] for row in shard} for shard in rows] == [
        {"a.gif", "b.gif", "c.gif", "d.gif"},
        {"e.gif", "f.gif", "g.gif"},
    ]
    for shard in rows:
        assert [row["gif_sha256"] for row in shard] == sorted(row["gif_sha256"] for row in shard)
    frames = FrameTable(tmp_path / "01" / "frames")
    for content in files.values():
        sha = hashlib.sha256(content).hexdigest()
        for groups in (1, 2, 3):
            expected = decode(content, image_size=SIZE, groups=[groups])  # its only view: all rows in order
            view = expected.views[0]["rows"]
            pictures, times = frames.frames(sha, groups)
            assert np.array_equal(pictures, expected.frames[view])
            assert np.array_equal(times, np.array(expected.frame_times_ms)[view])
    info = frames.info().set_index("gif").num_frames
    assert info.to_dict() == LENGTHS


def test_questions_keep_their_columns_and_gain_the_sha(tmp_path, corpus, files):
    made = shard_gifs(corpus, tmp_path / "01", data_config())
    questions = read_questions(tmp_path / "01" / "questions.parquet")
    assert questions.drop(columns="gif_sha256").to_dict("list") == corpus.questions.to_dict("list")
    assert questions.gif_sha256.tolist() == [hashlib.sha256(files[gif]).hexdigest() for gif in questions.gif]
    assert questions.to_dict("list") == made.questions.to_dict("list")
    assert len(made.rejects) == 0


def test_webp_frames_are_close(tmp_path, corpus, files):
    smooth = Image.fromarray(np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (36, 1)))
    smooth.save(tmp_path / "gifs" / "a.gif")
    shard_gifs(corpus, tmp_path / "01", data_config(frame_format="webp"))
    content = (tmp_path / "gifs" / "a.gif").read_bytes()
    pictures, _ = FrameTable(tmp_path / "01" / "frames").frames(hashlib.sha256(content).hexdigest(), 1)
    exact = decode(content, image_size=SIZE).frames
    assert 0 < np.abs(pictures.astype(int) - exact).max() <= 12


def test_rejects_name_gif_reason_and_questions(tmp_path, files):
    corpus = make_corpus(tmp_path / "gifs", {"a.gif": files["a.gif"], "bad.gif": b"<html>404</html>"})
    corpus.gifs["gone.gif"] = str(tmp_path / "gifs" / "gone.gif")
    extra = corpus.questions.tail(1).assign(question_id="q9", gif="gone.gif")
    lost = corpus.questions.tail(1).assign(question_id="q10", gif="never.gif")
    corpus = Corpus("test", pd.concat([corpus.questions, extra, lost]), corpus.gifs, reject_table([("x", "y", "z")]))
    made = shard_gifs(corpus, tmp_path / "01", data_config())
    reasons = dict(zip(made.rejects.item, made.rejects.reason, strict=True))
    assert reasons["x"] == "z" and "HTML" in reasons["bad.gif"] and "cannot open" in reasons["gone.gif"]
    assert reasons["q2"] == reasons["q3"] == reasons["q9"] == "its GIF was rejected"
    assert reasons["q10"] == "its GIF was not found"
    assert set(made.questions.gif) == {"a.gif"}
    assert pd.read_parquet(tmp_path / "01" / "rejects.parquet").to_dict("list") == made.rejects.to_dict("list")


def test_nothing_left_is_an_error_with_the_reasons(tmp_path):
    corpus = make_corpus(tmp_path / "gifs", {"bad.gif": b"", "worse.gif": b""})
    with pytest.raises(StoreError, match=r"No question .* usable GIF.*empty file"):
        shard_gifs(corpus, tmp_path / "01", data_config())


def test_equal_bytes_are_stored_once_also_across_shards(tmp_path, files):
    names = ["a.gif", "b.gif", "c.gif", "d.gif", "e.gif"]  # e is in the second shard
    content = {name: files[name] for name in names} | {"b.gif": files["a.gif"], "e.gif": files["a.gif"]}
    made = shard_gifs(make_corpus(tmp_path / "gifs", content), tmp_path / "01", data_config())
    frames = FrameTable(tmp_path / "01" / "frames")
    assert len(frames) == made.gifs == 3
    sha = hashlib.sha256(files["a.gif"]).hexdigest()
    assert set(made.questions.gif[made.questions.gif_sha256 == sha]) == {"a.gif", "b.gif", "e.gif"}
    assert frames.info().set_index("gif_sha256").gif[sha] == "a.gif"


def test_training_questions_of_a_test_gifs_bytes_are_left_out(tmp_path, files):
    content = {"a.gif": files["a.gif"], "b.gif": files["b.gif"], "copy.gif": files["a.gif"]}
    corpus = make_corpus(tmp_path / "gifs", content, {"copy.gif": "test"})
    made = shard_gifs(corpus, tmp_path / "01", data_config())
    assert set(zip(made.questions.gif, made.questions.split, strict=True)) == {("b.gif", "train"), ("copy.gif", "test")}
    assert made.rejects.reason.tolist() == [
        "same bytes as the test GIF copy.gif: its 2 training questions left out",
    ]


def test_training_questions_about_what_a_test_gif_shows_are_left_out(tmp_path, files):
    other = gif_bytes(99, 5)
    content = {"a.gif": files["a.gif"], "b.gif": files["b.gif"], "other.gif": other}
    content |= {"t1.gif": files["a.gif"] + b"\n", "t2.gif": files["b.gif"] + b";;", "z.gif": other}
    splits = {"t1.gif": "test", "t2.gif": "test", "z.gif": "test"}
    corpus = make_corpus(tmp_path / "gifs", content, splits)
    made = shard_gifs(corpus, tmp_path / "01", data_config())
    assert made.rejects[["item", "reason"]].to_numpy().tolist() == [
        ["a.gif", "same frames as the test GIF t1.gif: its 2 training questions left out"],
        ["b.gif", "same frames as the test GIF t2.gif: its 2 training questions left out"],
        ["other.gif", "same bytes as the test GIF z.gif: its 2 training questions left out"],
    ]
    assert set(made.questions.split) == {"test"} and made.near_duplicates.empty
    # the same frames under two hashes are two GIFs of the store
    assert made.gifs == len(FrameTable(tmp_path / "01" / "frames")) == 5


def test_questions_are_left_out_of_what_was_made_and_listed(tmp_path, files):
    """As when some are too long: the tables on disk are those that are handed back; without any left, a reason."""
    corpus = make_corpus(tmp_path / "gifs", {name: files[name] for name in ("a.gif", "b.gif")})
    made = shard_gifs(corpus, tmp_path / "01", data_config())
    assert leave_out(made, tmp_path / "01", reject_table([])) is made
    out = made.questions.iloc[[1]]
    listed = [(row.question_id, row.gif, "too long") for row in out.itertuples()]
    left = leave_out(made, tmp_path / "01", reject_table(listed))
    kept = made.questions.drop(index=1).question_id.tolist()
    assert left.questions.question_id.tolist() == kept and left.gifs == made.gifs
    assert read_questions(tmp_path / "01" / "questions.parquet").question_id.tolist() == kept
    table = pd.read_parquet(tmp_path / "01" / "rejects.parquet")
    assert table.to_numpy().tolist() == left.rejects.to_numpy().tolist() == [list(listed[0])]
    every = reject_table([(name, "", "too long") for name in kept])
    with pytest.raises(StoreError, match=rf"No question is left.*too long \({len(kept) + 1} times\)"):
        leave_out(left, tmp_path / "01", every)
    assert read_questions(tmp_path / "01" / "questions.parquet").question_id.tolist() == kept
    frames = FrameTable(tmp_path / "01" / "frames")
    for sha, length in frames.longest_views().items():
        assert length == len(frames.frames(sha, max(data_config().groups))[0])


def test_near_duplicates_of_test_gifs_are_listed_and_kept(tmp_path):
    plain = gif_bytes(7, 6)
    with Image.open(BytesIO(plain)) as image:
        dots = []
        for number in range(image.n_frames):
            image.seek(number)
            dots.append(image.convert("L"))
            dots[-1].putpixel((20, 20), 0 if dots[-1].getpixel((20, 20)) > 128 else 255)
    starts = BytesIO()
    dots[0].save(starts, "GIF", save_all=True, append_images=dots[1:], duration=100)
    content = {"a.gif": starts.getvalue(), "b.gif": gif_bytes(8, 6), "test.gif": plain}
    corpus = make_corpus(tmp_path / "gifs", content, {"test.gif": "test"})
    made = shard_gifs(corpus, tmp_path / "01", data_config())
    assert made.rejects.empty and len(made.questions) == 6
    [near] = made.near_duplicates.to_dict("records")
    assert near["gif"] == "a.gif" and near["test_gif"] == "test.gif" and near["questions"] == 2
    assert 0 < near["bits"] <= 24
    read = pd.read_parquet(tmp_path / "01" / "near_duplicates.parquet")
    assert read.to_dict("list") == made.near_duplicates.to_dict("list")


def test_shards_of_an_earlier_version_are_matched_by_bytes(tmp_path, files):
    content = {
        "a.gif": files["a.gif"],
        "b.gif": files["b.gif"],
        "copy.gif": files["a.gif"],
        "t.gif": files["b.gif"] + b" ",
    }
    corpus = make_corpus(tmp_path / "gifs", content, {"copy.gif": "test", "t.gif": "test"})
    shard_gifs(corpus, tmp_path / "01", data_config())
    path = tmp_path / "01" / "sources" / "shard-00000.parquet"
    pd.read_parquet(path).drop(columns=["frames_sha256", "perceptual_hash"]).to_parquet(path)
    made = shard_gifs(corpus, tmp_path / "01", data_config())
    assert made.rejects.reason.tolist() == ["same bytes as the test GIF copy.gif: its 2 training questions left out"]
    assert made.near_duplicates.empty


class Stop(Exception):
    pass


@pytest.mark.parametrize("survive", range(0, 7, 2))
def test_an_interrupted_run_ends_with_the_same_rows_and_decodes_nothing_twice(
    tmp_path, corpus, files, monkeypatch, survive
):
    files = files | {"b.gif": files["a.gif"], "c.gif": b"no GIF"}  # a repetition and a reject are remembered too
    corpus = make_corpus(tmp_path / "mixed", files)
    monkeypatch.setattr(shards, "BATCH_GIFS", 1)
    shard_gifs(corpus, tmp_path / "whole", data_config())
    decoded = []
    original = workers.decode_source

    def decode_some(gif, *args):
        if len(decoded) == survive:
            raise Stop
        decoded.append(gif)
        return original(gif, *args)

    monkeypatch.setattr(workers, "decode_source", decode_some)
    with pytest.raises(Stop):
        shard_gifs(corpus, tmp_path / "cut", data_config())
    survive = 100
    shard_gifs(corpus, tmp_path / "cut", data_config())
    assert decoded == sorted(files)
    assert same(all_rows(tmp_path / "whole"), all_rows(tmp_path / "cut"))
    assert not (tmp_path / "cut" / "unfinished").exists()


def test_a_finished_run_decodes_nothing(tmp_path, corpus, monkeypatch):
    first = shard_gifs(corpus, tmp_path / "01", data_config())
    monkeypatch.setattr(workers, "decode_source", lambda *_: pytest.fail("decoded again"))
    again = shard_gifs(corpus, tmp_path / "01", data_config())
    assert again.questions.equals(first.questions) and again.sources.equals(first.sources)


@pytest.mark.parametrize(
    ("changes", "named"), [({"image_size": 48}, "image_size: 32 there, 48 now"), ({"shard_size": 5}, "shard_size")]
)
def test_shards_of_other_settings_are_refused(tmp_path, corpus, changes, named):
    shard_gifs(corpus, tmp_path / "01", data_config())
    before = all_rows(tmp_path / "01")
    with pytest.raises(StoreError, match=named):
        shard_gifs(corpus, tmp_path / "01", data_config(**changes))
    assert same(before, all_rows(tmp_path / "01"))


def test_a_deadline_keeps_what_is_decoded_and_the_next_call_goes_on(tmp_path, corpus):
    shard_gifs(corpus, tmp_path / "whole", data_config())
    with pytest.raises(DeadlineReached, match="1 of 7 GIFs"):
        shard_gifs(corpus, tmp_path / "parts", data_config(), deadline=0)
    with pytest.raises(DeadlineReached, match="2 of 7 GIFs"):
        shard_gifs(corpus, tmp_path / "parts", data_config(), deadline=0)
    assert not (tmp_path / "parts" / "questions.parquet").exists()
    shard_gifs(corpus, tmp_path / "parts", data_config())
    assert same(all_rows(tmp_path / "whole"), all_rows(tmp_path / "parts"))


def test_a_file_that_the_disk_cannot_read_is_rejected_and_the_others_go_on(tmp_path, corpus, monkeypatch):
    real = workers.read_gif

    def read_gif(source, max_bytes):
        if str(source).endswith("d.gif"):
            raise OSError(5, "Input/output error")
        return real(source, max_bytes)

    monkeypatch.setattr(workers, "read_gif", read_gif)
    made = shard_gifs(corpus, tmp_path / "01", data_config())
    assert made.gifs == 6 and "Input/output error" in made.sources.set_index("gif").reason["d.gif"]


def test_a_full_disk_is_said_before_anything_is_decoded(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("helpers.workspace.disk.free_gigabytes", lambda _: 1e-6)
    monkeypatch.setattr(workers, "decode_source", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DiskFull, match="Sharding 7 GIFs"):
        shard_gifs(corpus, tmp_path / "01", data_config())


def test_120_000_gifs_fit_the_20_gb_that_kaggle_keeps(tmp_path, monkeypatch):
    """The plan of the whole data set, by the measured size of a stored frame, with room for a shard being sorted."""
    monkeypatch.setattr("helpers.workspace.disk.free_gigabytes", lambda _: 20.0)
    profile = load_profile("kaggle")
    size = profile.data.shard_size
    shards._require_frame_space(tmp_path, [size] * (120_000 // size), profile.data, profile.encoder.frames_per_group)
    with pytest.raises(DiskFull, match="180,000 GIFs"):
        shards._require_frame_space(tmp_path, [size] * (180_000 // size), profile.data, 16)


class FaultyPool(ProcessPoolExecutor):
    def submit(self, function, gif, *args):
        return super().submit(os._exit, 9) if gif == "d.gif" else super().submit(function, gif, *args)


def test_processes_give_the_same_rows_and_a_gif_that_kills_its_process_is_rejected(tmp_path, corpus, monkeypatch):
    shard_gifs(corpus, tmp_path / "one", data_config())
    monkeypatch.setattr(workers, "ProcessPoolExecutor", FaultyPool)
    made = shard_gifs(corpus, tmp_path / "two", data_config(workers=2))
    assert made.gifs == 6 and set(made.questions.gif) == set(LENGTHS) - {"d.gif"}
    assert "died" in made.sources.set_index("gif").reason["d.gif"]
    for k in range(2):
        rows = [table_rows(tmp_path / run / "frames" / f"shard-{k:05d}.lance") for run in ("one", "two")]
        assert rows[1] == [row for row in rows[0] if row["gif"] != "d.gif"]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_urls_are_fetched_and_dead_links_and_stills_rejected(tmp_path, corpus):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=tmp_path / "gifs"))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        host = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "gifs" / "g.gif").unlink()
        gifs = {name: f"{host}/{name}" for name in corpus.gifs} | {"a.gif": corpus.gifs["a.gif"]}
        made = shard_gifs(Corpus("web", corpus.questions, gifs, corpus.rejects), tmp_path / "01", data_config())
    finally:
        server.shutdown()
        server.server_close()
    reasons = {row.gif: row.reason for row in made.sources.itertuples() if row.reason}
    assert set(reasons) == {"f.gif", "g.gif"} and "404" in reasons["g.gif"] and "at least 2" in reasons["f.gif"]
    assert made.gifs == 5


def test_what_the_network_denied_is_tried_again_at_the_end(tmp_path, corpus, monkeypatch):
    asked = []

    def fetch_all(urls, **_):
        for name, _ in urls:
            asked.append(name)
            gone, busy = name == "g.gif", name in ("b.gif", "c.gif")
            if gone or (busy and (name == "c.gif" or asked.count(name) == 1)):
                yield name, FetchError("HTTP status 404" if gone else "HTTP status 503", transient=busy)
            else:
                yield name, Path(corpus.gifs[name]).read_bytes()

    monkeypatch.setattr("helpers.store.workers.fetch_all", fetch_all)
    gifs = {name: f"http://host/{name}" for name in corpus.gifs}
    made = shard_gifs(Corpus("web", corpus.questions, gifs, corpus.rejects), tmp_path / "01", data_config())
    reasons = {row.gif: row.reason for row in made.sources.itertuples() if row.reason}
    assert reasons["g.gif"] == "HTTP status 404" and reasons["c.gif"] == "HTTP status 503" and "b.gif" not in reasons
    assert asked.count("g.gif") == 1 and asked.count("b.gif") == asked.count("c.gif") == 2


# ------------------------------------------------------------------------------------------------ features


@pytest.fixture(scope="module")
def frames_folder(tmp_path_factory, files) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    shard_gifs(make_corpus(folder / "gifs", files), folder / "01", data_config())
    return folder / "01" / "frames"


def expected_embeddings(content: bytes, groups: int) -> np.ndarray:
    """One group at a time, without batches, tables or padding to a batch."""
    decoded = decode(content, image_size=SIZE, groups=[groups])
    frames = decoded.frames[decoded.views[0]["rows"]]
    encoder, parts = Encoder(), []
    for start in range(0, len(frames), 16):
        part = frames[start : start + 16]
        padded = np.zeros((1, 16, SIZE, SIZE, 3), np.uint8)
        padded[0, : len(part)] = part
        with torch.no_grad():
            parts.append(encoder(torch.from_numpy(padded), torch.tensor([len(part)]))[0, : len(part)].numpy())
    return np.concatenate(parts)


def test_features_equal_a_plain_loop_at_every_view(tmp_path, frames_folder, files):
    cached = cache_features(frames_folder, tmp_path / "features.lance", Encoder(), data_config(), batch_groups=3)
    table = FeatureTable(tmp_path / "features.lance")
    assert table.ids == sorted(table.ids) and len(table) == cached.gifs == len(files)
    assert (table.encoder_key, table.dim) == ("fake@1", 8)
    for content in files.values():
        sha = hashlib.sha256(content).hexdigest()
        for groups in (1, 2, 3):
            expected = expected_embeddings(content, groups)
            frames, lengths = table.fetch([sha], groups)
            assert frames.dtype == np.float16 and lengths.tolist() == [len(expected)]
            np.testing.assert_allclose(frames[0], expected, atol=2e-3, rtol=2e-3)


def test_a_deadline_keeps_what_is_encoded_and_the_next_call_goes_on(tmp_path, frames_folder):
    whole = cache_features(frames_folder, tmp_path / "whole.lance", Encoder(), data_config(), batch_groups=7)
    with pytest.raises(DeadlineReached, match=f"7 of {whole.groups} groups"):
        cache_features(frames_folder, tmp_path / "parts.lance", Encoder(), data_config(), batch_groups=7, deadline=0)
    assert not (tmp_path / "parts.lance").exists()
    assert 0 < len(table_rows(tmp_path / "parts.lance.unfinished")) < whole.gifs
    cache_features(frames_folder, tmp_path / "parts.lance", Encoder(), data_config(), batch_groups=7)
    assert table_rows(tmp_path / "whole.lance") == table_rows(tmp_path / "parts.lance")


def test_measuring_the_pace_of_encoding_keeps_what_it_encodes(tmp_path, frames_folder, monkeypatch):
    """The runner lets a stage encode a few batches, forecasts the rest from them, and lets it go on."""
    whole = cache_features(frames_folder, tmp_path / "whole.lance", Encoder(), data_config(), batch_groups=3)
    monkeypatch.setenv("SUITE_PROBE_STEPS", "2")
    with pytest.raises(DeadlineReached, match=f"6 of {whole.groups} groups"):
        cache_features(frames_folder, tmp_path / "parts.lance", Encoder(), data_config(), batch_groups=3)
    (pace,) = json.loads((tmp_path / "pace.json").read_text())
    assert (pace["done"], pace["left"]) == (6, whole.groups - 6) and pace["seconds"] > 0
    told = own_pace(tmp_path)
    rate = 6 / pace["seconds"]
    assert told[0] == pytest.approx((whole.groups - 6) / rate + START_UP_SECONDS)
    assert told[1].startswith(f"{whole.groups - 6} groups at ")
    monkeypatch.delenv("SUITE_PROBE_STEPS")
    rest = cache_features(frames_folder, tmp_path / "parts.lance", Encoder(), data_config(), batch_groups=3)
    assert rest.encoded_groups < whole.groups and not (tmp_path / "pace.json").exists()
    assert own_pace(tmp_path) is None
    assert table_rows(tmp_path / "whole.lance") == table_rows(tmp_path / "parts.lance")


def test_feature_rows_keep_only_distinct_views_and_their_times(tmp_path, frames_folder, files):
    cached = cache_features(frames_folder, tmp_path / "features.lance", Encoder(), data_config(), batch_groups=4)
    rows = {row["gif_sha256"]: row for row in table_rows(tmp_path / "features.lance")}
    expected_groups = 0
    for name, content in files.items():
        row, n = rows[hashlib.sha256(content).hexdigest()], LENGTHS[name]
        groups = [1] if n <= 16 else [1, 2] if n <= 32 else [1, 2, 3]
        lengths = [min(n, 16 * g) for g in groups]
        assert (row["groups"], row["lengths"], row["num_frames"]) == (groups, lengths, n)
        times = [t for g in groups for t in decode(content, image_size=8, groups=[g]).frame_times_ms]
        repeated = sum(lengths) != len(times)  # a frame shown long may be sampled twice
        assert repeated or row["frame_times_ms"] == times
        assert len(row["frame_times_ms"]) == len(row["embeddings"]) == sum(lengths)
        expected_groups += sum(-(-length // 16) for length in lengths)
    assert cached.groups == cached.encoded_groups == expected_groups


def test_features_of_the_real_encoder(tmp_path, frames_folder, files, tiny_xclip_dir):
    encoder = FrameEncoder(load_xclip(str(tiny_xclip_dir)), "tiny")
    cache_features(frames_folder, tmp_path / "features.lance", encoder, data_config(), batch_groups=4)
    table = FeatureTable(tmp_path / "features.lance")
    assert table.encoder_key == encoder.key
    for content in files.values():
        decoded = decode(content, image_size=SIZE, groups=[2])
        pictures = decoded.frames[decoded.views[0]["rows"]]
        expected = []
        for part in (pictures[:16], pictures[16:]):
            if len(part):
                padded = np.zeros((1, 16, SIZE, SIZE, 3), np.uint8)
                padded[0, : len(part)] = part
                with torch.no_grad():
                    expected.append(encoder(torch.from_numpy(padded), torch.tensor([len(part)]))[0, : len(part)])
        frames, _ = table.fetch([hashlib.sha256(content).hexdigest()], 2)
        np.testing.assert_allclose(frames[0], torch.cat(expected).numpy(), atol=2e-3, rtol=2e-3)


def test_batches_fill_across_gifs(tmp_path, frames_folder):
    encoder = Encoder()
    cached = cache_features(frames_folder, tmp_path / "features.lance", encoder, data_config(), batch_groups=5)
    assert encoder.batches == [5] * (cached.groups // 5) + [cached.groups % 5] * (cached.groups % 5 > 0)


@pytest.mark.parametrize("survive", [0, 1, 2, 4])
def test_interrupted_caching_ends_with_the_same_rows_bit_for_bit(tmp_path, frames_folder, monkeypatch, survive):
    monkeypatch.setattr(encoding, "BATCH_GIFS", 1)
    cache_features(frames_folder, tmp_path / "whole.lance", Encoder(), data_config(), batch_groups=3)

    class Mortal(Encoder):
        def forward(self, frames, lengths):
            if len(self.batches) == survive:
                raise Stop
            return super().forward(frames, lengths)

    with pytest.raises(Stop):
        cache_features(frames_folder, tmp_path / "cut.lance", Mortal(), data_config(), batch_groups=3)
    second = Encoder()
    cached = cache_features(frames_folder, tmp_path / "cut.lance", second, data_config(), batch_groups=3)
    assert table_rows(tmp_path / "whole.lance") == table_rows(tmp_path / "cut.lance")
    assert sum(second.batches) == cached.encoded_groups
    if survive == 4:
        assert cached.encoded_groups < cached.groups  # what was committed is not encoded again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.lance", "whole.lance"]


def test_a_finished_table_is_not_encoded_again(tmp_path, frames_folder):
    out = tmp_path / "features.lance"
    cache_features(frames_folder, out, Encoder(), data_config(), batch_groups=3)
    encoder = Encoder()
    assert cache_features(frames_folder, out, encoder, data_config(), batch_groups=3).encoded_groups == 0
    assert encoder.batches == []


def test_new_gifs_join_a_finished_table(tmp_path, files):
    few = {name: files[name] for name in ("b.gif", "d.gif")}
    for folder, chosen in (("few", few), ("many", files)):
        shard_gifs(make_corpus(tmp_path / folder / "gifs", chosen), tmp_path / folder, data_config())
    out = tmp_path / "features.lance"
    cache_features(tmp_path / "few" / "frames", out, Encoder(), data_config(), batch_groups=3)
    kept = {row["gif_sha256"]: row for row in table_rows(out)}
    cached = cache_features(tmp_path / "many" / "frames", out, Encoder(), data_config(), batch_groups=3)
    rows = table_rows(out)
    assert [row["gif_sha256"] for row in rows] == sorted(hashlib.sha256(c).hexdigest() for c in files.values())
    assert cached.encoded_groups < cached.groups
    assert {row["gif_sha256"]: row for row in rows if row["gif_sha256"] in kept} == kept


def test_another_encoders_rows_are_refused_with_both_keys(tmp_path, frames_folder, monkeypatch):
    out = tmp_path / "features.lance"
    cache_features(frames_folder, out, Encoder(), data_config(), batch_groups=3)
    before = table_rows(out)
    with pytest.raises(StoreError, match=r"'fake@1'.*'fake@2'"):
        cache_features(frames_folder, out, Encoder("fake@2"), data_config(), batch_groups=3)
    assert table_rows(out) == before
    os.replace(out, out.with_name("features.lance.unfinished"))  # the same for a run that did not end
    with pytest.raises(StoreError, match=r"'fake@1'.*'fake@2'"):
        cache_features(frames_folder, out, Encoder("fake@2"), data_config(), batch_groups=3)


def test_features_of_frames_of_other_settings_are_refused(tmp_path, frames_folder, files):
    out = tmp_path / "features.lance"
    cache_features(frames_folder, out, Encoder(), data_config(), batch_groups=3)
    shard_gifs(make_corpus(tmp_path / "gifs", files), tmp_path / "01", data_config(frame_format="webp"))
    with pytest.raises(StoreError, match="frames of other settings"):
        cache_features(tmp_path / "01" / "frames", out, Encoder(), data_config(), batch_groups=3)


def test_an_encoder_of_another_image_size_is_refused(tmp_path, frames_folder):
    encoder = Encoder()
    encoder.image_size = 224
    with pytest.raises(StoreError, match=r"image_size 32.*takes 224"):
        cache_features(frames_folder, tmp_path / "features.lance", encoder, data_config(), batch_groups=3)


def test_embeddings_that_overflow_fp16_are_an_error_not_a_row(tmp_path, frames_folder):
    encoder = Encoder()
    nn.init.constant_(encoder.linear.weight, 1e3)
    with pytest.raises(StoreError, match="not finite in fp16"):
        cache_features(frames_folder, tmp_path / "features.lance", encoder, data_config(), batch_groups=3)
    assert not (tmp_path / "features.lance").exists()


@pytest.fixture(scope="module")
def features_path(tmp_path_factory, frames_folder) -> Path:
    path = tmp_path_factory.mktemp("features") / "features.lance"
    cache_features(frames_folder, path, Encoder(), data_config(), batch_groups=4)
    return path


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
def test_fetch_pads_ragged_rows_and_repeats_ids(features_path, memory_gb):
    table = FeatureTable(features_path, memory_gb)
    rows = {row["gif_sha256"]: row for row in table_rows(features_path)}
    rng = np.random.default_rng(0)
    for _ in range(10):
        ids = [table.ids[i] for i in rng.integers(0, len(table), 9)]
        groups = rng.integers(1, 6, 9)  # also more groups than any view has
        frames, lengths = table.fetch(ids, groups.tolist())
        assert np.array_equal(lengths, table.lengths(ids, groups)) and frames.shape == (9, lengths.max(), 8)
        for sha, g, values, length in zip(ids, groups, frames, lengths, strict=True):
            row = rows[sha]
            chosen = max(i for i, count in enumerate(row["groups"]) if count <= g)
            start = sum(row["lengths"][:chosen])
            assert length == row["lengths"][chosen]
            assert values[:length].tolist() == row["embeddings"][start : start + length]
            assert not values[length:].any()


def test_unknown_gifs_and_views_are_named(tmp_path, features_path, frames_folder, files):
    table = FeatureTable(features_path)
    with pytest.raises(StoreError, match=r"2 GIFs .* the first: nowhere"):
        table.fetch([table.ids[0], "nowhere", "neither"], 1)
    with pytest.raises(StoreError, match="no cached view of 0 groups"):
        table.fetch([table.ids[0]], 0)
    frames = FrameTable(frames_folder)
    with pytest.raises(StoreError, match="not among the 7 GIFs"):
        frames.frames("nowhere", 1)
    with pytest.raises(StoreError, match="no view of 0 groups"):
        frames.frames(frames.ids[0], 0)
    with pytest.raises(StoreError, match="run notebook 02 first"):
        FeatureTable(tmp_path / "none.lance")
    with pytest.raises(StoreError, match="run notebook 01 first"):
        FrameTable(tmp_path)


def test_a_table_of_two_encoders_is_not_opened(tmp_path, features_path):
    path = tmp_path / "mixed.lance"
    shutil.copytree(features_path, path)
    lance.dataset(str(path)).update({"encoder_key": "'fake@2'"}, where=f"gif_sha256 = '{FeatureTable(path).ids[0]}'")
    with pytest.raises(StoreError, match=r"one encoder, not of 2.*fake@1.*fake@2"):
        FeatureTable(path)


def test_real_gifs_end_in_frames_or_a_reason(tmp_path, shared_data):
    gifs = {path.name: str(path) for path in sorted((shared_data / "gifs" / "decoder_cases").glob("*.gif"))}
    rows = [
        question_row(question_id=name, gif=name, split="train", task="count", question="how many ?", answer="2")
        for name in gifs
    ]
    corpus = Corpus("cases", question_table(rows), gifs, reject_table([]))
    made = shard_gifs(corpus, tmp_path / "01", data_config(shard_size=100))
    assert len(made.sources) == len(gifs) >= 40
    stored = set(FrameTable(tmp_path / "01" / "frames").ids)
    for row in made.sources.itertuples():
        assert (row.reason is None) == (row.gif_sha256 in stored)


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
@pytest.mark.parametrize("place", [0, -1])
def test_cached_embeddings_that_are_not_finite_are_an_error_naming_the_gif(tmp_path, features_path, memory_gb, place):
    """The table is written by Lance itself, with one number of the fourth row made NaN: its first, or its last."""
    whole = lance.dataset(str(features_path)).to_table()
    rows = [
        row | {"embeddings": [np.array(frame, np.float16) for frame in row["embeddings"]]} for row in whole.to_pylist()
    ]
    rows[3]["embeddings"][place][place] = math.nan
    lance.write_dataset(pa.Table.from_pylist(rows, schema=whole.schema), str(tmp_path / "features.lance"))
    table = FeatureTable(tmp_path / "features.lance", memory_gb)
    with pytest.raises(StoreError, match=f"features.lance holds .*not finite.* of GIF {rows[3]['gif_sha256']}:"):
        table.fetch([table.ids[i] for i in (5, 3, 2)], 5)
