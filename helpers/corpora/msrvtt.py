"""MSR-VTT: captions and splits of its retrieval protocols, read from the official files.

Xu et al., "MSR-VTT: A Large Video Description Dataset for Bridging Video and Language" (CVPR 2016); the list 1k-A by Yu
et al., "A Joint Sequence Fusion Model for Video Question Answering and Retrieval" (ECCV 2018). The files, as their
authors and CLIP4Clip's data hand them out:

    MSRVTT_data.json            {"videos": [{"video_id", "split", ...}], "sentences": [{"video_id", "caption", ...}]}
    train_val_videodatainfo.json, test_videodatainfo.json   the same in two files
    MSRVTT_JSFUSION_test.csv    key,vid_key,video_id,sentence: the test videos of 1k-A, one caption each
    MSRVTT_train.9k.csv, MSRVTT_train.7k.csv   video_id: what is trained on where 1k-A is the test

The counts that are checked are those of the official files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

from helpers.config import nearest
from helpers.corpora.json_files import read_json
from helpers.corpora.schema import (
    ENDINGS,
    Corpus,
    CorpusError,
    RowError,
    caption_table,
    caption_text,
    listed_rejects,
    question_table,
    reject_table,
    require_folder,
    require_one_caption,
)
from helpers.corpora.sheets import by_column, read_sheet, table_text
from helpers.workspace.names import files_below, visible

ANNOTATIONS = ("MSRVTT_data.json", "train_val_videodatainfo.json", "test_videodatainfo.json")
TEST_LIST = "MSRVTT_JSFUSION_test.csv"
TRAIN_LISTS = {"9k": "MSRVTT_train.9k.csv", "7k": "MSRVTT_train.7k.csv"}
SPLITS = {"train": "train", "validate": "val", "test": "test"}
"""The splits as the annotations call them, and as they are called here."""

PROTOCOLS = {
    "1k-A": {"test videos": 1000, "test captions": 1000, "distinct test captions": 995},
    "1k-A all-captions": {"test videos": 1000, "test captions": 20_000},
    "full all-captions": {"test videos": 2990, "test captions": 59_800},
}
"""What is tested on, and what the official files hold of it."""
TRAINED_ON = {
    "9k": {"train videos": 9000, "train captions": 180_000},
    "7k": {"train videos": 7010, "train captions": 140_200},
    "full": {"train videos": 6513, "train captions": 130_260, "val videos": 497, "val captions": 9940},
}
"""What is trained on, and what the official files hold of it."""

Told = tuple[str, str]
"""A video and what a sentence tells of it."""


def load(
    folder: str | Path,
    protocol: str = "1k-A",
    *,
    train: str | Path | None = None,
    videos: str | Path | None = None,
    allow_overlap: bool = False,
    complete: bool = True,
) -> Corpus:
    """The captions of a protocol from the official files in `folder`, which are found at any depth by their names.

    protocol: "1k-A" (one caption a video), "1k-A all-captions" (the same videos with all captions) or
    "full all-captions" (all of the official test split). train: what is trained on, None for nothing: "9k", "7k",
    "full" (the official train split, and its validation videos as the split "val"), or the path of a list of videos.
    videos: a folder of files called after their videos (video7020.mp4) at any depth; None loads the text alone.
    allow_overlap: train on test videos all the same; they are in both splits then, and the corpus's name says so.
    complete: refuse files whose counts are not the official ones, and test videos without a file; a part of the data
    set is loaded with False, and what it lacks is listed in the rejects.
    What a video is told twice is kept twice, since published scores count each caption. Also listed are captions
    without video and videos without caption. Raises `CorpusError` for all that is refused, and if nothing is left.
    """
    folder, rejects = Path(folder), []
    if protocol not in PROTOCOLS:
        raise CorpusError(f"MSR-VTT has no protocol {protocol!r}; {nearest(protocol, [*PROTOCOLS])}")
    found = _found(folder)
    told: list[Told] = []
    split_of: dict[str, str] = {}
    if protocol != "1k-A" or train is not None:
        split_of, told = _annotations(folder, found, rejects)
    tested = told
    if protocol.startswith("1k-A"):
        path = _one(folder, found, TEST_LIST)
        listed = _test_list(path, rejects)
        test = [*dict.fromkeys(video for video, _ in listed)]
        tested = listed if protocol == "1k-A" else told
    else:
        test = [video for video, split in split_of.items() if split == "test"]
    splits = {"test": test} | _trained_on(folder, found, train, split_of)
    trained = {video for split, members in splits.items() if split != "test" for video in members}
    overlap = [video for video in test if video in trained]
    if overlap and not allow_overlap:
        raise CorpusError(
            f"{len(overlap):,} of the {len(test):,} test videos of {protocol} are in the train list {train}: "
            f"{_some(overlap)}. A score on videos that were trained on tells nothing. 9k and 7k have none of 1k-A, 7k "
            "and full none of the full test; allow_overlap=True trains on them all the same."
        )
    sentences = _sentences(splits, tested, told, rejects)
    captions = _table(sentences, rejects)
    if protocol == "1k-A":
        require_one_caption(captions[captions.split == "test"], path)
    if complete:
        _check_counts(folder, captions, PROTOCOLS[protocol] | TRAINED_ON.get(str(train), {}), rejects)
    gifs: dict[str, str] = {}
    if videos is not None:
        gifs = _files(Path(videos), captions.gif.unique())
        captions = _with_files(captions, gifs, Path(videos), protocol if complete else "", rejects)
    if captions.empty:
        raise CorpusError(f"No usable caption is left of {folder}.{listed_rejects(rejects)}")
    name = f"msrvtt {protocol}" + (f", trained on {len(overlap):,} of its test videos" if overlap else "")
    return Corpus(name, question_table([]), gifs, reject_table(rejects), captions=captions, told=len(sentences))


def _found(folder: Path) -> dict[str, list[Path]]:
    """Where the official files lie, by their names."""
    require_folder(folder, "MSR-VTT")
    found: dict[str, list[Path]] = {}
    for path in files_below(folder):
        found.setdefault(path.name, []).append(path)
    return found


def _one(folder: Path, found: dict[str, list[Path]], name: str) -> Path:
    paths = found.get(name, [])
    if len(paths) != 1:
        listed = ", ".join(path.relative_to(folder).as_posix() for path in paths)
        what = f"holds {len(paths)} of them ({listed}). Leave one" if paths else "holds none. Put it there"
        raise CorpusError(f"MSR-VTT needs {name}, but {folder} {what}.")
    return paths[0]


def _annotations(
    folder: Path, found: dict[str, list[Path]], rejects: list[tuple[str, str, str]]
) -> tuple[dict[str, str], list[Told]]:
    """The split of each video, and every sentence."""
    whole, *parts = ANNOTATIONS
    names = [whole] if whole in found else [name for name in parts if name in found]
    if not names:
        raise CorpusError(f"MSR-VTT's captions: {folder} has neither {whole} nor {' and '.join(parts)}.")
    listed: list[tuple[str, str]] = []
    told: list[Told] = []
    lost: Counter[tuple[str, str]] = Counter()
    for name in names:
        path = _one(folder, found, name)
        content = read_json(path)
        listed += _texts(path, content, "videos", "video_id", "split")
        sentences = _texts(path, content, "sentences", "video_id", "caption")
        known = {video for video, _ in listed}
        told += [(video, caption) for video, caption in sentences if video in known]
        lost.update((video, name) for video, _ in sentences if video not in known)
    _require_unique([video for video, _ in listed], " and ".join(names))
    if unknown := sorted({split for _, split in listed} - {*SPLITS}):
        raise CorpusError(f"{folder}: unknown split {', '.join(unknown)}; MSR-VTT's are {', '.join(SPLITS)}.")
    rejects += [
        (video, name, f"{number} captions of a video that is not among the videos: left out")
        for (video, name), number in lost.items()
    ]
    return {video: SPLITS[split] for video, split in listed}, told


def _texts(path: Path, content: Any, part: str, *keys: str) -> list[tuple[str, str]]:
    """Two texts of each entry of a list in the annotations."""
    entries = content.get(part) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise CorpusError(f"{path}: expected an object with a list `{part}`.")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
            raise CorpusError(f"{path}: {part}[{number}] is no object with the texts {' and '.join(keys)}.")
    return [tuple(entry[key] for key in keys) for entry in entries]


def _test_list(path: Path, rejects: list[tuple[str, str, str]]) -> list[Told]:
    columns = ["key", "vid_key", "video_id", "sentence"]
    header, rows = read_sheet(path, columns, needed=columns[2:], each="caption")
    told = []
    for number, cells in rows:
        try:
            row = by_column(cells, header)
            if not (video := visible(row["video_id"])):
                raise RowError("no video is named")
            told.append((video, row["sentence"]))
        except RowError as error:
            rejects.append((visible(cells[0]), f"{path.name} row {number}", str(error)))
    return told


def _trained_on(
    folder: Path, found: dict[str, list[Path]], train: str | Path | None, split_of: dict[str, str]
) -> dict[str, list[str]]:
    """The videos of the splits train and val."""
    if train is None:
        return {}
    if train == "full":
        return {split: [video for video, of in split_of.items() if of == split] for split in ("train", "val")}
    path = _one(folder, found, TRAIN_LISTS[train]) if train in TRAIN_LISTS else Path(train)
    if not path.is_file():
        known = ", ".join([*TRAIN_LISTS, "full"])
        raise CorpusError(f"MSR-VTT's train list: there is no file {path}. Name one, or take {known}.")
    text, separator = table_text(path)
    rows = [[visible(cell) for cell in line.split(separator)] for line in text.split("\n") if visible(line)]
    column = 0
    if rows and "video_id" in rows[0]:  # other lists have no header
        column = rows.pop(0).index("video_id")
    if not (members := ["".join(row[column : column + 1]) for row in rows]):
        raise CorpusError(f"MSR-VTT's train list {path} names no video.")
    _require_unique(members, path)
    return {"train": members}


def _sentences(
    splits: dict[str, list[str]], tested: list[Told], told: list[Told], rejects: list[tuple[str, str, str]]
) -> list[tuple[str, str, str]]:
    """Video, split and sentence, split by split and video by video."""
    rows = []
    for split, members in splits.items():
        sentences: dict[str, list[str]] = {video: [] for video in members}
        for video, sentence in tested if split == "test" else told:
            if video in sentences:
                sentences[video].append(sentence)
        rows += [(video, split, sentence) for video in members for sentence in sentences[video]]
        untold = [video for video in members if not sentences[video]]
        rejects += [(video, f"split {split}", "a video without caption: left out") for video in untold]
    return rows


def _table(sentences: list[tuple[str, str, str]], rejects: list[tuple[str, str, str]]) -> pd.DataFrame:
    rows = []
    for video, split, sentence in sentences:
        try:
            rows.append((video, split, caption_text(sentence), []))
        except RowError as error:
            rejects.append((video, f"split {split}", str(error)))
    return caption_table(rows, repeated=True)


def _check_counts(
    folder: Path, captions: pd.DataFrame, official: dict[str, int], rejects: list[tuple[str, str, str]]
) -> None:
    """Raise `CorpusError` where the table does not hold what the official files hold, naming what differs."""
    found = {"distinct test captions": captions.caption[captions.split == "test"].nunique()}
    for split in SPLITS.values():
        of_split = captions[captions.split == split]
        found |= {f"{split} videos": of_split.gif.nunique(), f"{split} captions": len(of_split)}
    differing = [f"{found[what]:,} {what} ({number:,})" for what, number in official.items() if found[what] != number]
    if differing:
        raise CorpusError(
            f"{folder} is not MSR-VTT as published: {', '.join(differing)}; in brackets what the official files hold. "
            "Scores on other captions cannot be compared: get the official files, or load what is there with "
            f"complete=False.{listed_rejects(rejects)}"
        )


def _files(folder: Path, wanted: Collection[str]) -> dict[str, str]:
    """The file of each wanted video that has one."""
    require_folder(folder, "MSR-VTT's videos")
    files: dict[str, str] = {}
    names = set(wanted)
    for path in files_below(folder):
        if path.suffix.lower() in ENDINGS and path.stem in names:
            if path.stem in files:
                raise CorpusError(f"{path.stem} has two files, {files[path.stem]} and {path}: name a folder with one.")
            files[path.stem] = str(path)
    return files


def _with_files(
    captions: pd.DataFrame, files: dict[str, str], folder: Path, protocol: str, rejects: list[tuple[str, str, str]]
) -> pd.DataFrame:
    """The captions of videos that have a file. protocol: the one that needs a file of each test video, "" for none."""
    kept = captions.gif.isin(files)
    absent = captions[~kept]
    test = absent.gif[absent.split == "test"].unique().tolist()
    if protocol and test:
        raise CorpusError(
            f"{len(test):,} test videos of {protocol} have no file in {folder} ({', '.join(ENDINGS)}): {_some(test)}. "
            "Among fewer videos each is easier to find: get them, or load with complete=False, which leaves them out."
        )
    rejects += [
        (video, folder.name, f"there is no file of this video: its {number} captions are left out")
        for video, number in absent.gif.value_counts(sort=False).items()
    ]
    return captions[kept].reset_index(drop=True)


def _require_unique(videos: Collection[str], source: str | Path) -> None:
    if repeated := [video for video, number in Counter(videos).items() if number > 1]:
        raise CorpusError(f"{source}: {len(repeated):,} videos are listed more than once: {_some(repeated)}.")


def _some(videos: Collection[str]) -> str:
    shown = [*videos][:5]
    return ", ".join(shown) + (f" and {len(videos) - 5:,} more" if len(videos) > 5 else "")
