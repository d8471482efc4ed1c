"""The table of embeddings, and the .npy files of the 2023 study."""

from dataclasses import replace

import lance
import numpy as np
import pytest

from helpers.store.embeddings import EmbeddingKind, caption_names, read_embeddings, write_embeddings, write_npy
from helpers.store.tables import StoreError

VIDEO = EmbeddingKind("video", "last", "mean", "", "xclip|a", "digest", "bundle")
KEYS = ["gif-c", "gif-a", "gif-b"]


def vectors(seed: int = 0, dim: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, dim)).astype(np.float32)


def test_each_kind_is_read_back_by_its_own_facts(tmp_path):
    """Kinds that differ in one field only stand side by side."""
    path = tmp_path / "embeddings.lance"
    names = ("modality", "layer", "pooling", "prompt", "encoder_key", "language_model", "trained")
    kinds = [VIDEO, *(replace(VIDEO, **{name: f"another '{name}'"}) for name in names)]
    for seed, kind in enumerate(kinds):
        write_embeddings(path, KEYS, vectors(seed), kind)
    for seed, kind in enumerate(kinds):
        found, keys, values = read_embeddings(path, **vars(kind))
        assert found == kind and keys == sorted(KEYS)
        assert np.array_equal(values, vectors(seed)[[1, 2, 0]]) and values.dtype == np.float32
        values += 1  # a caller's own
    only = lance.dataset(str(path)).to_table(filter="layer = 'last' AND prompt = ''", columns=["embedding"])
    assert only.schema.field("embedding").type.list_size == 4  # what Lance can search


def test_what_is_written_again_gives_way_and_nothing_else_does(tmp_path):
    path = tmp_path / "embeddings.lance"
    write_embeddings(path, KEYS, vectors(), VIDEO)
    write_embeddings(path, KEYS, vectors(7), replace(VIDEO, layer="before"))
    write_embeddings(path, ["gif-d", "gif-a"], vectors(1)[:2], VIDEO)
    _, keys, values = read_embeddings(path, layer="last")
    assert keys == ["gif-a", "gif-b", "gif-c", "gif-d"]
    assert np.array_equal(values, np.stack([vectors(1)[1], vectors()[2], vectors()[0], vectors(1)[0]]))
    assert np.array_equal(read_embeddings(path, layer="before")[2], vectors(7)[[1, 2, 0]])


def test_embeddings_that_are_not_pooled_keep_their_lengths(tmp_path):
    rows = [np.random.default_rng(n).normal(size=(n, 4)).astype(np.float32) for n in (5, 1, 9)]
    write_embeddings(tmp_path / "a.lance", KEYS, rows, replace(VIDEO, pooling="none"))
    _, keys, values = read_embeddings(tmp_path / "a.lance")
    assert keys == ["gif-a", "gif-b", "gif-c"]
    assert all(np.array_equal(*pair) for pair in zip(values, [rows[1], rows[2], rows[0]], strict=True))
    with pytest.raises(StoreError, match=r"holds list<.*>, not fixed_size_list<.*another table"):
        write_embeddings(tmp_path / "a.lance", KEYS, vectors(), VIDEO)


def test_what_a_table_cannot_hold_is_named(tmp_path):
    path, broken = tmp_path / "embeddings.lance", vectors()
    broken[1, 2] = np.nan
    for keys, values, told in (
        (KEYS[:2], vectors(), "2 keys for 3 embeddings"),
        ([], [], "0 keys"),
        (["gif-a", "gif-b", "gif-a"], vectors(), "1 keys come twice, the first: 'gif-a'"),
        (KEYS, broken, "NaN or infinity, the first of 'gif-a'"),
        (KEYS, [*vectors()[:2], vectors(dim=5)[2]], "of one size"),
        (KEYS, vectors()[:, None, None], "of one size"),
    ):
        with pytest.raises(StoreError, match=told):
            write_embeddings(path, keys, values, VIDEO)
    with pytest.raises(StoreError, match="no table of embeddings"):
        read_embeddings(path)
    write_embeddings(path, KEYS, vectors(), VIDEO)
    with pytest.raises(StoreError, match=r"4.*not fixed_size_list.*5"):
        write_embeddings(path, KEYS, vectors(dim=5), VIDEO)
    write_embeddings(path, KEYS, vectors(), replace(VIDEO, modality="text"))
    with pytest.raises(StoreError, match=r"(?s)holds 2 kinds .*modality='video'.*modality='text'"):
        read_embeddings(path, layer="last")
    with pytest.raises(StoreError, match=r"(?s)holds 0 kinds .*modality='video'"):
        read_embeddings(path, encoder_key="another")


def test_npy_files_are_named_as_in_the_study(tmp_path):
    names = caption_names(["video7890", "video12", "video7890", "video7890", "video12"])
    assert names == ["video7890-1", "video12-1", "video7890-2", "video7890-3", "video12-2"]
    values = [np.full((place + 1, 4), place, np.float32) for place in range(5)]
    (tmp_path / "none").mkdir()  # an empty folder is as good as none
    write_npy(tmp_path / "none", names, values)
    assert sorted(path.name for path in (tmp_path / "none").iterdir()) == [
        "video12-1.npy", "video12-2.npy", "video7890-1.npy", "video7890-2.npy", "video7890-3.npy",
    ]  # fmt: skip
    for name, value in zip(names, values, strict=True):
        assert np.array_equal(np.load(tmp_path / "none" / f"{name}.npy"), value)
    write_npy(tmp_path / "mean", ["video7890"], [value.mean(0) for value in values[:1]])
    assert np.load(tmp_path / "mean" / "video7890.npy").shape == (4,)


@pytest.mark.parametrize(
    "name", ["../video1", "a/b", "/etc/video1", "a\\b", "..\\b", "C:\\b", "C:b", "", ".", "a/", "a\0b"]
)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    with pytest.raises(StoreError, match="name embeddings without folders"):
        write_npy(tmp_path / "out" / "mean", ["video1", name], vectors()[:2])
    assert not [*tmp_path.rglob("*.npy")]


def test_npy_files_are_never_mixed(tmp_path):
    with pytest.raises(StoreError, match="those of several embeddings, the first: 'video1'"):
        write_npy(tmp_path / "mean", ["video1", "Video1"], vectors()[:2])
    with pytest.raises(StoreError, match="2 names for 3"):
        write_npy(tmp_path / "mean", ["video1", "video2"], vectors())
    write_npy(tmp_path / "mean", KEYS, vectors())
    with pytest.raises(StoreError, match="not empty"):
        write_npy(tmp_path / "mean", ["video1"], vectors()[:1])
    write_npy(tmp_path / "dots", [".."], vectors()[:1])
    assert [path.name for path in (tmp_path / "dots").iterdir()] == ["...npy"]
