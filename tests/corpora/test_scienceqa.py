"""ScienceQA: the official layout read strictly, prompts by hand, bad input; and the real slice where it is at hand."""

import http.server
import io
import json
import random
import re
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from helpers.corpora import scienceqa
from helpers.corpora.schema import CorpusError
from helpers.corpora.scienceqa import PromptStyle, prompt, protocol, target


def record(**changes):
    base = {
        "question": "Which is a solid?",
        "choices": ["water", "stone"],
        "answer": 1,
        "hint": "",
        "image": None,
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "physics",
        "category": "Matter",
        "skill": "Sort matter",
        "lecture": "Solids keep their shape.",
        "solution": "A stone is a solid.",
        "split": "train",
    }
    return base | changes


@pytest.fixture
def write(tmp_path):
    """Write problems (by id), their splits and captions in the official layout; images for those named in `drawn`."""

    def write(problems, splits=None, captions=None, drawn=()):
        splits = splits or {s: [pid for pid, p in problems.items() if p.get("split") == s] for s in scienceqa.SPLITS}
        (tmp_path / "problems.json").write_text(json.dumps(problems))
        (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
        if captions is not None:
            (tmp_path / "captions.json").write_text(json.dumps({"model": "x", "captions": captions}))
        for pid in drawn:
            folder = tmp_path / "images" / problems[pid]["split"] / pid
            folder.mkdir(parents=True)
            Image.new("RGBA", (5, 3), (255, 0, 0, 255)).save(folder / "image.png")
        return tmp_path

    return write


def test_a_folder_is_read_in_the_order_of_its_splits(write):
    problems = {
        "1": record(split="test", grade="grade11", subject="social science"),
        "2": record(image="image.png", hint="Look."),
        "3": record(choices=list("vwxyz"), answer=4),
    }
    folder = write(problems, {"train": ["3", "2"], "val": [], "test": ["1"]}, {"2": " A red box. ", "1": "?"}, ["2"])
    corpus = scienceqa.load(folder, captions=True)
    assert len(corpus.rejects) == 0
    rows = corpus.problems.set_index("pid")
    assert rows.index.tolist() == ["3", "2", "1"]
    assert rows.grade.tolist() == [2, 2, 11] and rows.answer.tolist() == [4, 1, 1]
    assert rows.loc["2", "caption"] == "A red box." and rows.loc["1", "caption"] == ""
    assert rows.loc["1", "image"] == "" and rows.loc["1", "hint"] == ""
    image = scienceqa.open_image(rows.loc["2", "image"])
    assert image.mode == "RGB" and image.size == (5, 3)
    assert scienceqa.load(folder, ["test"]).problems.pid.tolist() == ["1"]
    assert set(scienceqa.load(folder).problems.caption) == {""}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"choices": []}, "has 0 choices"),
        ({"choices": ["one"], "answer": 0}, "has 1 choices"),
        ({"choices": list("abcdef")}, "has 6 choices"),
        ({"choices": None}, "no list of texts"),
        ({"choices": ["a", " "]}, "empty choice"),
        ({"answer": 2}, "answer 2 is no index into its 2 choices"),
        ({"answer": -1}, "answer -1"),
        ({"answer": True}, "answer True"),
        ({"answer": "1"}, "answer '1'"),
        ({"question": "  "}, "question is missing or empty"),
        ({"image": "image.png"}, "image images/train/2/image.png is missing"),
        ({"image": "../1/image.png"}, "no plain file name"),
        ({"subject": "history"}, "subject 'history'"),
        ({"grade": "grade13"}, "grade 'grade13'"),
        ({"split": "val"}, "calls itself val"),
        ({"hint": 3}, "`hint` and `image` must be texts"),
    ],
)
def test_a_problem_that_cannot_be_used_is_listed(write, changes, reason):
    splits = {"train": ["1", "2"], "val": [], "test": []}
    corpus = scienceqa.load(write({"1": record(), "2": record(**changes)}, splits))
    assert corpus.problems.pid.tolist() == ["1"]
    assert corpus.rejects[["item", "where"]].values.tolist() == [["2", "problems.json"]]
    assert reason in corpus.rejects.reason[0]


def test_ids_listed_twice_or_without_a_problem_are_listed(write):
    splits = {"train": ["1", "9", "../1"], "val": ["1"], "test": []}
    corpus = scienceqa.load(write({"1": record(split=""), "../1": record()}, splits))
    assert corpus.problems.pid.tolist() == ["1"]
    assert corpus.rejects.item.tolist() == ["9", "../1", "1"]
    assert "does not have it" in corpus.rejects.reason[0] and "listed twice" in corpus.rejects.reason[2]


def test_files_that_are_not_in_the_format_are_refused(write):
    folder = write({"1": record()})
    with pytest.raises(CorpusError, match=r"captions\.json"):
        scienceqa.load(folder, captions=True)
    with pytest.raises(CorpusError, match="did you mean 'train'"):
        scienceqa.load(folder, ["trian"])
    (folder / "captions.json").write_text('{"1": "a box"}')
    with pytest.raises(CorpusError, match="`captions`"):
        scienceqa.load(folder, captions=True)
    for name, content, fault in [
        ("pid_splits.json", '{"train": [1], "val": [], "test": []}', "ids as texts"),
        ("pid_splits.json", '{"train": ["1"], "val": []}', "no split 'test'"),
        ("problems.json", "[]", "object of problems"),
        ("problems.json", '{"1": {}, "1": {}}', "'1' occurs twice"),
        ("problems.json", "{", "not readable as JSON"),
    ]:
        (folder / name).write_text(content)
        with pytest.raises(CorpusError, match=fault):
            scienceqa.load(folder)
    (folder / "problems.json").unlink()
    with pytest.raises(CorpusError, match="no file"):
        scienceqa.load(folder)


def test_nothing_left_is_an_error_with_the_reasons(write):
    with pytest.raises(CorpusError, match=r"problems.json, 1: has 0 choices; 2 to 5 are expected$"):
        scienceqa.load(write({"1": record(choices=[])}))


def test_a_broken_image_is_named(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(CorpusError, match=r"image\.png is not readable as an image"):
        scienceqa.open_image(path)


def png(image, **options):
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def noise(mode="RGB", side=64):
    return Image.frombytes(mode, (side, side), random.Random(0).randbytes(side * side * len(mode)))


def jpeg(image):
    out = io.BytesIO()
    image.save(out, "JPEG")
    return out.getvalue()


def wordy_png():
    """A whole PNG with a compressed comment of two million letters, more than Pillow reads."""
    info = PngInfo()
    info.add_text("Comment", "x" * 2_000_000, zip=True)
    return png(noise(), pnginfo=info)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page in place of the image"),
        (b"\xef\xbb\xbf\n<HTML>", "a web page in place of the image"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page in place of the image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (png(noise())[:6000], "torn or damaged"),
        (png(noise())[:20], "torn or damaged"),
        (png(noise())[:10], "torn or damaged|of no kind"),
        (jpeg(noise())[:1500], "torn or damaged"),
        (png(noise())[:3000] + bytes(100) + png(noise())[3100:], "torn or damaged"),
        (wordy_png(), "text chunks are larger than any image needs"),
        (b"no image at all", "of no kind that is known"),
    ],
)
def test_a_broken_image_is_a_reject_when_the_problems_load(write, content, reason):
    folder = write({"1": record(), "2": record(image="image.png")}, drawn=["2"])
    image = folder / "images" / "train" / "2" / "image.png"
    whole = scienceqa.load(folder)
    assert whole.problems.pid.tolist() == ["1", "2"] and len(whole.rejects) == 0
    image.write_bytes(content)
    corpus = scienceqa.load(folder)
    assert corpus.problems.pid.tolist() == ["1"]
    assert corpus.rejects[["item", "where"]].values.tolist() == [["2", "images/train/2/image.png"]]
    assert re.search(f"its image is not readable: .*({reason})", corpus.rejects.reason[0])
    with pytest.raises(CorpusError, match=rf"image\.png is not readable as an image: .*({reason})"):
        scienceqa.open_image(image)
    assert scienceqa.load(folder, decode=False).problems.pid.tolist() == ["1", "2"]


def test_every_image_is_decoded_once_and_only_of_the_splits_asked(write, monkeypatch):
    problems = {str(i): record(image="image.png", split="train" if i < 5 else "test") for i in range(8)}
    folder = write(problems | {"8": record()}, drawn=list(problems))
    opened, original = [], scienceqa.open_image
    monkeypatch.setattr(scienceqa, "open_image", lambda path: opened.append(str(path)) or original(path))
    found = scienceqa.load(folder, ["train"]).problems
    assert sorted(opened) == sorted(found.image[found.image != ""]) and len(opened) == 5


def test_nothing_left_but_broken_images_says_why(write):
    folder = write({"1": record(image="image.png")}, drawn=["1"])
    (folder / "images" / "train" / "1" / "image.png").write_bytes(b"")
    with pytest.raises(CorpusError, match="the file is empty"):
        scienceqa.load(folder)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_shades(tmp_path, kind):
    """Against the float formula: v / 65535 of white; all 65,536 values."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = tmp_path / f"image.{kind.lower()}"
    Image.fromarray(values).save(path, kind)
    seen = scienceqa.open_image(path)
    assert seen.mode == "RGB"
    expected = np.rint(values.astype(np.float64) / 65535 * 255)
    for channel in range(3):
        assert np.array_equal(np.asarray(seen)[..., channel], expected)


def test_grey_kept_as_32_bits_is_scaled_as_16_or_refused(tmp_path):
    """Older versions of Pillow give a PNG of 16 bits that way."""
    values = np.array([[0, 257, 32768, 65535]], dtype=np.int32)
    Image.fromarray(values).save(tmp_path / "image.tiff")
    assert np.asarray(scienceqa.open_image(tmp_path / "image.tiff"))[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(values * 100).save(tmp_path / "deep.tiff")
    with pytest.raises(CorpusError, match="not of 8 or 16 bits"):
        scienceqa.open_image(tmp_path / "deep.tiff")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_images_are_read_as_the_official_code_reads_them(tmp_path, mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    noise().convert("RGBA" if mode == "RGBA" else "RGB").convert(mode).save(tmp_path / "image", kind)
    official = Image.open(tmp_path / "image").convert("RGB")
    assert scienceqa.open_image(tmp_path / "image").tobytes() == official.tobytes()


PROBLEM = {"question": "Which?", "choices": ["a  b", "c"], "answer": 1, "hint": "Two states.", "caption": "A map."}


def test_prompts_are_the_official_ones():
    options = "Options: (A) a b (B) c\nResponse:"
    cqm, qcm = PromptStyle("CQM-A"), PromptStyle("QCM-A")
    assert prompt(PROBLEM) == prompt(PROBLEM, qcm) == f"Question: Which?\nContext: Two states.\n{options}"
    assert prompt(PROBLEM, cqm) == f"Context: Two states.\nQuestion: Which?\n{options}"
    assert prompt(PROBLEM, PromptStyle("QCM-A", True)) == f"Question: Which?\nContext: Two states. A map.\n{options}"
    bare = PROBLEM | {"hint": "", "caption": "A map."}
    assert "Context: N/A\n" in prompt(bare, qcm)
    assert "Context: A map.\n" in prompt(bare, PromptStyle("QCM-A", True))
    assert prompt(PROBLEM) + target(PROBLEM) == f"Question: Which?\nContext: Two states.\n{options}The answer is B."


def test_double_spaces_are_collapsed_once_and_ends_stripped():
    text = prompt(PROBLEM | {"question": "a   b", "hint": "  "})
    assert text.startswith("Question: a  b\nContext: N/A\n")  # three spaces become two


def test_protocols_use_one_style_but_for_the_named_mismatch():
    assert protocol().train == protocol().evaluation == PromptStyle("QCM-A", False)
    different = [name for name, p in scienceqa.PROTOCOLS.items() if p.train != p.evaluation]
    assert different == ["released mismatch"]
    released = protocol("released mismatch")
    assert released.train == PromptStyle("CQM-A", False) and released.evaluation == PromptStyle("QCM-A", True)
    with pytest.raises(ValueError, match="did you mean 'CQM-A'"):
        protocol("CQM")
    with pytest.raises(ValueError, match="prompt order 'MQC-A'"):
        PromptStyle("MQC-A")


def test_the_real_slice_is_read_without_a_reject(shared_data):
    folder = shared_data / "scienceqa"
    if not folder.is_dir():
        pytest.skip(f"no ScienceQA at {folder}")
    corpus = scienceqa.load(folder, captions=True)
    problems = corpus.problems
    assert len(corpus.rejects) == 0
    assert problems.split.value_counts().to_dict() == {"train": 1041, "val": 371, "test": 361}
    pictured = problems[problems.image != ""]
    assert len(pictured) == 879 and (pictured.caption != "").all()
    assert scienceqa.open_image(pictured.image.iloc[0]).mode == "RGB"
    texts = [prompt(row, PromptStyle("CQM-A", True)) for row in problems.to_dict("records")]
    assert len(set(texts)) > 1700 and all(text.endswith("\nResponse:") for text in texts)


# ---- Fetching ----


@pytest.fixture
def site(tmp_path, write, monkeypatch):
    """The authors' addresses on loopback: the folder that is served, and what was asked for."""
    problems = {"1": record(image="image.png"), "2": record(split="test", image="image.png"), "3": record(split="test")}
    made = write(problems, captions={"1": "a red bar"}, drawn=("1", "2"))
    served = tmp_path / "served"
    served.mkdir()
    for name in scienceqa.TEXTS:
        (made / name).rename(served / name)
    for split, pid in (("train", "1"), ("test", "2")):
        picture = (made / "images" / split / pid / "image.png").read_bytes()
        with zipfile.ZipFile(served / f"{split}.zip", "w") as archive:
            archive.writestr(f"{split}/{pid}/image.png", picture)
            archive.writestr(f"__MACOSX/{split}/{pid}/image.png", b"a Mac's")
            archive.writestr(f"{split}/../../evil/image.png", picture)
            archive.writestr("/etc/evil/image.png", picture)
            archive.writestr(f"{split}/{pid}/choice_0.png", picture)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def do_GET(self):
            asked.append(self.path.strip("/"))
            super().do_GET()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(scienceqa, "TEXTS", {name: f"{root}/{name}" for name in scienceqa.TEXTS})
    monkeypatch.setattr(scienceqa, "IMAGES", root + "/{split}.zip")
    yield served, asked
    server.shutdown()


def test_what_is_fetched_is_the_official_layout_and_is_fetched_once(tmp_path, site):
    _, asked = site
    folder = scienceqa.fetch(tmp_path / "own", ("train", "test"))
    corpus = scienceqa.load(folder, ("train", "test"), captions=True)
    assert len(corpus.rejects) == 0 and corpus.problems["pid"].tolist() == ["1", "2", "3"]
    assert corpus.problems["caption"][0] == "a red bar"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == [
        "captions.json",
        "images/test/2/image.png",
        "images/train/1/image.png",
        "pid_splits.json",
        "problems.json",
    ]
    assert not list(tmp_path.rglob("evil"))
    count = len(asked)
    scienceqa.fetch(folder, ("train", "test"))
    assert len(asked) == count == 5


def test_a_fetch_that_fails_keeps_what_is_whole_and_goes_on(tmp_path, site):
    served, asked = site
    whole = (served / "test.zip").read_bytes()
    (served / "test.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"could not be fetched .*Run again.*-p data FOLDER"):
        scienceqa.fetch(tmp_path / "own", ("train", "test"))
    assert not (tmp_path / "own" / "images" / "test").exists()
    (served / "test.zip").write_bytes(whole)
    asked.clear()
    scienceqa.fetch(tmp_path / "own", ("train", "test"))
    assert asked == ["test.zip"] and (tmp_path / "own" / "images" / "test" / "2" / "image.png").is_file()


def test_a_page_instead_of_json_is_not_kept(tmp_path, site):
    served, _ = site
    (served / "problems.json").write_text("<html>not found</html>")
    with pytest.raises(CorpusError, match="not readable as JSON"):
        scienceqa.fetch(tmp_path / "own")
    assert not (tmp_path / "own" / "problems.json").exists()
