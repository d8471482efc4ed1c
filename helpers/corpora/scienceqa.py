"""ScienceQA: the official layout, read strictly, and the prompts that ADEM-VL is trained and scored with.

Lu et al., "Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question Answering" (NeurIPS 2022);
files of github.com/lupantech/ScienceQA: problems.json, pid_splits.json, captions.json and
images/<split>/<pid>/image.png. Prompts as in ADEM-VL's official code (github.com/Hao840/ADEM-VL).
"""

from __future__ import annotations

import os
import re
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from helpers.config import nearest
from helpers.corpora.json_files import read_json
from helpers.corpora.schema import CorpusError, RowError, reject_table, require_questions
from helpers.workspace.disk import put_in_place, require_disk, whole
from helpers.workspace.inputs import attached_paths
from helpers.workspace.names import is_leftover

SPLITS = ("train", "val", "test")
SUBJECTS = ("natural science", "social science", "language science")
LETTERS = ("A", "B", "C", "D", "E")  # no problem has more choices
PROBLEM_COLUMNS = [
    "pid",
    "split",
    "question",
    "choices",
    "answer",
    "hint",
    "image",
    "caption",
    "subject",
    "grade",
    "topic",
    "category",
    "skill",
]
ANSWER_START = "The answer is"
ORDERS = ("QCM-A", "CQM-A")


TEXTS = {
    "problems.json": "https://raw.githubusercontent.com/lupantech/ScienceQA/main/data/scienceqa/problems.json",
    "pid_splits.json": "https://raw.githubusercontent.com/lupantech/ScienceQA/main/data/scienceqa/pid_splits.json",
    "captions.json": "https://raw.githubusercontent.com/lupantech/ScienceQA/main/data/captions.json",
}
IMAGES = "https://scienceqa.s3.us-west-1.amazonaws.com/images/{split}.zip"
GIGABYTES = 3.0  # asked for before fetching: archives and images together, generously
MAX_IMAGE_BYTES = 50_000_000
FEW = 100  # images, opened in less than a second: no progress is shown


# ---- The files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScienceQA:
    """ScienceQA's problems, and what was left out."""

    problems: pd.DataFrame
    """One row a problem: `PROBLEM_COLUMNS`. choices: list of 2 to 5 texts; answer: 0-based index into them; hint and
    caption: "" if there is none; image: path of the file, "" if there is none; grade: 1 to 12."""
    rejects: pd.DataFrame
    """What was left out: `item` (the problem's id), `where` (file), `reason`."""


def load(folder: str | Path, splits: Sequence[str] = SPLITS, captions: bool = False, decode: bool = True) -> ScienceQA:
    """Read problems.json, pid_splits.json and the images' paths of `folder`, in the order of pid_splits.json.

    captions: read captions.json too; without it every caption is "". decode: open every image once, so that a broken
    one is found now and not in the middle of a training.
    A problem that cannot be used (no choices, an answer outside them, a missing or broken image, ...) is listed in the
    rejects.
    Raises `CorpusError` if a file is missing or not in the format, a split is unknown, or nothing is left.
    """
    folder = Path(folder)
    for split in splits:
        if split not in SPLITS:
            raise CorpusError(f"ScienceQA has no split {split!r}; {nearest(split, SPLITS)}")
    records = read_records(folder / "problems.json")
    members = read_splits(folder / "pid_splits.json")
    described = read_captions(folder / "captions.json") if captions else {}
    rows: dict[str, dict[str, Any]] = {}
    rejects: list[tuple[str, str, str]] = []
    for split in splits:
        if split not in members:
            raise CorpusError(f"{folder / 'pid_splits.json'} has no split {split!r}; it has {', '.join(members)}.")
        for pid in members[split]:
            try:
                if pid in rows:
                    raise RowError(f"is listed twice in pid_splits.json: in {rows[pid]['split']} and in {split}")
                if pid not in records:
                    raise RowError(f"is in the split {split}, but problems.json does not have it")
                row = problem_row(pid, records[pid])
                if row["split"] not in ("", split):
                    raise RowError(f"calls itself {row['split']}, but pid_splits.json puts it in {split}")
                row["split"] = split
                row["image"] = _image_path(folder, row)
            except RowError as error:
                rejects.append((pid, "problems.json", str(error)))
                continue
            row["caption"] = described.get(pid, "") if row["image"] else ""
            rows[pid] = row
    if decode:
        for pid, fault in image_faults({pid: row["image"] for pid, row in rows.items()}).items():
            rejects.append((pid, Path(rows.pop(pid)["image"]).relative_to(folder).as_posix(), fault))
    require_questions(list(rows), rejects, folder)
    problems = pd.DataFrame(list(rows.values()), columns=PROBLEM_COLUMNS)
    return ScienceQA(problems.astype({"answer": "int64", "grade": "int64"}), reject_table(rejects))


def find_attached() -> Path | None:
    """The attached folder that holds problems.json and pid_splits.json, whatever it is called; None without one.

    Raises `CorpusError` if there is more than one.
    """
    found = [path.parent for path in attached_paths("problems.json") if (path.parent / "pid_splits.json").is_file()]
    if len(found) > 1:
        raise CorpusError(
            f"several attached folders hold ScienceQA: {', '.join(map(str, found))}. Name one: -p data FOLDER"
        )
    return found[0] if found else None


def fetch(folder: str | Path, splits: Sequence[str] = SPLITS) -> Path:
    """Fetch ScienceQA from its authors' addresses into `folder`, in the official layout, and return `folder`.

    What an earlier call finished is not fetched again. Raises `CorpusError` with every way out if that fails.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    require_disk(folder, GIGABYTES, "Fetching ScienceQA")
    try:
        for name, url in TEXTS.items():
            if not (folder / name).is_file():
                partial = _download(url, folder / f"{name}.part")
                read_json(partial)
                put_in_place(partial, folder / name)
        for split in splits:
            if not (folder / "images" / split).is_dir():
                archive = _download(IMAGES.format(split=split), folder / f"{split}.zip.part")
                _unpack(archive, folder / "images" / split)
                archive.unlink()
    except (OSError, CorpusError, zipfile.BadZipFile) as error:
        raise CorpusError(
            f"ScienceQA could not be fetched ({error}). Run again; or attach a copy on Kaggle; or name your own copy: "
            "-p data FOLDER. The JSON files are in data/ of github.com/lupantech/ScienceQA; its tools/download.sh "
            "fetches images/train, images/val and images/test."
        ) from error
    return folder


def _download(url: str, temporary: Path) -> Path:
    with urllib.request.urlopen(url, timeout=60) as answer, temporary.open("wb") as file:
        length = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=length or None, desc=url.rsplit("/", 1)[-1], unit="B", unit_scale=True) as bar:
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    if length and temporary.stat().st_size != length:
        raise OSError(f"{url} was cut short: {temporary.stat().st_size:,} of {length:,} bytes")
    return temporary


def _unpack(archive: Path, folder: Path) -> None:
    """Write every <pid>/image.png of a split's archive into `folder`, at once or not at all; other names are left."""
    with whole(folder) as staging, zipfile.ZipFile(archive) as opened:
        staging.mkdir()
        for member in opened.infolist():
            match = re.fullmatch(r"(?:[A-Za-z0-9_-]+/)*([A-Za-z0-9_-]+)/(image\.[a-z]+)", member.filename)
            if match is None or is_leftover(member.filename) or member.file_size > MAX_IMAGE_BYTES:
                continue
            (staging / match[1]).mkdir(exist_ok=True)
            (staging / match[1] / match[2]).write_bytes(opened.read(member))
        if not any(staging.iterdir()):
            raise CorpusError(f"{archive.name} holds no <problem>/image.png")


def read_records(path: str | Path) -> dict[str, dict[str, Any]]:
    """problems.json as it is: problem id -> record. Raises `CorpusError` if it is not an object of objects."""
    records = read_json(path)
    if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
        raise CorpusError(f"{path}: expected an object of problems by id, each of them an object.")
    return records


def read_splits(path: str | Path) -> dict[str, list[str]]:
    """pid_splits.json: split -> problem ids. Raises `CorpusError` if it is not an object of lists of texts."""
    splits = read_json(path)
    if not isinstance(splits, dict) or not all(
        isinstance(pids, list) and all(isinstance(pid, str) for pid in pids) for pids in splits.values()
    ):
        raise CorpusError(f"{path}: expected an object of splits, each a list of problem ids as texts.")
    return splits


def read_captions(path: str | Path) -> dict[str, str]:
    """captions.json: problem id -> caption. Raises `CorpusError` if it is not in the official form."""
    content = read_json(path)
    captions = content.get("captions") if isinstance(content, dict) else None
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise CorpusError(f"{path}: expected an object with `captions`, an object of texts by problem id.")
    return {pid: text.strip() for pid, text in captions.items()}


def problem_row(pid: str, record: Mapping[str, Any], partial: bool = False) -> dict[str, Any]:
    """One checked row of `PROBLEM_COLUMNS` from a record of problems.json; image is the file's name, caption is "".

    partial: question, subject and grade may be absent (then None), as in a gold file made for scoring alone.
    Raises `RowError` with the reason if the problem cannot be used.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", pid):
        raise RowError("its id is not of letters, digits, '-' and '_', so it can name no folder")
    question, choices, answer = (record.get(key) for key in ("question", "choices", "answer"))
    if not (partial and question is None) and (not isinstance(question, str) or not question.strip()):
        raise RowError("the question is missing or empty")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise RowError(f"`choices` is no list of texts: {choices!r}")
    if not 2 <= len(choices) <= len(LETTERS):
        raise RowError(f"has {len(choices)} choices; 2 to {len(LETTERS)} are expected")
    if not all(choice.strip() for choice in choices):
        raise RowError(f"has an empty choice: {choices}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise RowError(f"the answer {answer!r} is no index into its {len(choices)} choices (0 to {len(choices) - 1})")
    hint, image = record.get("hint") or "", record.get("image") or ""
    if not isinstance(hint, str) or not isinstance(image, str):
        raise RowError("`hint` and `image` must be texts or null")
    if image and not re.fullmatch(r"[A-Za-z0-9_-]+\.[A-Za-z0-9]+", image):
        raise RowError(f"the image's name {image!r} is no plain file name such as image.png")
    subject, grade = record.get("subject"), record.get("grade")
    if not (partial and subject is None) and subject not in SUBJECTS:
        raise RowError(f"the subject {subject!r} is none of {', '.join(SUBJECTS)}")
    match = re.fullmatch(r"grade([1-9]|1[0-2])", str(grade))
    if not (partial and grade is None) and not match:
        raise RowError(f"the grade {grade!r} is none of grade1 to grade12")
    split = record.get("split") or ""
    if split not in ("", *SPLITS):
        raise RowError(f"the split {split!r} is none of {', '.join(SPLITS)}")
    return {
        "pid": pid,
        "split": split,
        "question": question,
        "choices": list(choices),
        "answer": answer,
        "hint": hint,
        "image": image,
        "caption": "",
        "subject": subject,
        "grade": int(match[1]) if match else None,
        **{key: str(record.get(key) or "") for key in ("topic", "category", "skill")},
    }


def _image_path(folder: Path, row: Mapping[str, Any]) -> str:
    if not row["image"]:
        return ""
    name = Path("images", row["split"], row["pid"], row["image"])
    if not (folder / name).is_file():
        raise RowError(f"its image {name.as_posix()} is missing")
    return str(folder / name)


def open_image(path: str | Path) -> Image.Image:
    """A problem's image in RGB, as the official code reads it, but that 16-bit grey is scaled to 0..255.

    Raises `CorpusError` if the file is no image, or a broken one.
    """
    try:
        with Image.open(path) as image:
            return _to_rgb(image)
    except Exception as error:  # what a damaged file makes Pillow raise is of any kind
        raise CorpusError(f"{path} is not readable as an image: {_image_fault(Path(path), error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # grey of 16 bits: Pillow would clip it at 255, so that nearly all turns white
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("its grey values are not of 8 or 16 bits")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))  # 65535 is 255 times 257
    return image.convert("RGB")


def _image_fault(path: Path, error: Exception) -> str:
    """What is wrong with a file that could not be read as an image, and what to do."""
    try:
        with path.open("rb") as file:
            start = file.read(200).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    except OSError:
        return str(error)
    if not start:
        return "the file is empty. Fetch it again."
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the image. Run `git lfs pull` where it came from."
    if start.startswith(b"<") and b"<svg" not in start:
        return "it is a web page in place of the image. Fetch it again."
    if "MAX_TEXT" in str(error):
        return "its text chunks are larger than any image needs. Save it again without them."
    if isinstance(error, UnidentifiedImageError):
        return "it is of no kind that is known. Fetch it again."
    return f"it is torn or damaged ({error}). Fetch it again."


def image_faults(paths: Mapping[str, str]) -> dict[str, str]:
    """Problem id -> what is wrong with its image, of those that cannot be read; each is decoded once, none is kept.

    paths: the images' files by problem id, "" for a problem without one.
    """
    paths = {pid: path for pid, path in paths.items() if path}

    def fault(path: str) -> str:
        try:
            open_image(path)
        except CorpusError as error:
            return f"its image is not readable: {_image_fault(Path(path), error.__cause__)}"
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        told = pool.map(fault, paths.values())
        found = list(tqdm(told, desc="opening images", total=len(paths), unit="image", disable=len(paths) < FEW))
    return {pid: text for pid, text in zip(paths, found, strict=True) if text}


# ---- Prompts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptStyle:
    """How a problem is written down: the order of its parts, and whether the image's caption is part of the context.

    order: "QCM-A" (question, context, options) or "CQM-A" (context, question, options); the answer follows, without
    lecture or solution. Captions come from a captioning model: with them a score is not of the visual path alone.
    """

    order: str = "QCM-A"
    captions: bool = False

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"prompt order {self.order!r}; {nearest(self.order, ORDERS)}")


@dataclass(frozen=True)
class Protocol:
    """The prompt style of training and that of evaluation."""

    train: PromptStyle
    evaluation: PromptStyle


def _same(order: str, captions: bool) -> Protocol:
    return Protocol(PromptStyle(order, captions), PromptStyle(order, captions))


PROTOCOLS = {
    "QCM-A": _same("QCM-A", False),
    "QCM-A with captions": _same("QCM-A", True),
    "CQM-A": _same("CQM-A", False),
    "CQM-A with captions": _same("CQM-A", True),
    # what the released commands do: train.py's defaults against the evaluator's fixed format
    "released mismatch": Protocol(PromptStyle("CQM-A", False), PromptStyle("QCM-A", True)),
}
"""Protocols by name; "QCM-A" is the suite's default. All but "released mismatch" use one style throughout."""


def protocol(name: str = "QCM-A") -> Protocol:
    """The protocol of `PROTOCOLS` called `name`. Raises ValueError, with the nearest name, if there is none."""
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; {nearest(name, list(PROTOCOLS))}")
    return PROTOCOLS[name]


def prompt(problem: Mapping[str, Any], style: PromptStyle | None = None) -> str:
    """The text in front of the answer, up to and including "Response:"; `problem` is a row of `PROBLEM_COLUMNS`.

    The answer, or `ANSWER_START` when it is to be generated, follows without a space. Double spaces are replaced by
    single ones once, as in the official code, so that three become two.
    """
    style = style or PromptStyle()
    context = f"{problem['hint']} {problem['caption'] if style.captions else ''}".strip() or "N/A"
    options = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, problem["choices"], strict=False))
    lines = [f"Question: {problem['question']}\n", f"Context: {context}\n", f"Options: {options}\n"]
    if style.order == "CQM-A":
        lines[:2] = lines[1::-1]
    return f"{''.join(lines)}Response:".replace("  ", " ").strip()


def target(problem: Mapping[str, Any]) -> str:
    """The text that follows the prompt in training: "The answer is B."."""
    return f"{ANSWER_START} {LETTERS[problem['answer']]}."
