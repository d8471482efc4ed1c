"""A folder of videos or GIFs and a CSV of captions alone, for retrieval."""

import importlib.util

import pytest
from PIL import Image

from helpers.corpora import own_gifs
from helpers.corpora.schema import ENDINGS, CorpusError
from helpers.gifs.decode import read_gif
from helpers.gifs.formats import Limits, open_animation
from helpers.gifs.kinds import kind_of, refusal


@pytest.fixture
def folder(tmp_path):
    for name in ("cat.mp4", "dog.gif", "sub/fox.webm", "owl.gif", "owl.mp4", "notes.txt", "._cat.mp4"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "outside.gif").touch()
    return tmp_path / "in"


def load(folder, *lines, encoding="utf-8", **settings):
    path = folder.parent / "captions.csv"
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return own_gifs.load_captions(folder, path, **settings)


@pytest.mark.parametrize("column", ["video", "gif", "GIF"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_captions_of_videos_and_gifs(folder, column, encoding, separator):
    rows = [f"{column},caption,note", "cat.mp4,a cat plays the piano,x", "cat,a  cat yawns", "sub\\fox,a fox ,x,"[:-1]]
    rows = [row.replace(",", separator) for row in rows]
    corpus = load(folder, *rows, f'dog.gif{separator}"a dog, then a cat; both run"', holdout=0, encoding=encoding)
    assert corpus.captions[["caption_id", "split", "caption"]].to_numpy().tolist() == [
        ["cat.mp4-1", "train", "a cat plays the piano"],
        ["cat.mp4-2", "train", "a cat yawns"],
        ["sub/fox.webm-1", "train", "a fox"],
        ["dog.gif-1", "train", "a dog, then a cat; both run"],
    ]
    assert corpus.gifs == {name: str(folder / name) for name in ("cat.mp4", "sub/fox.webm", "dog.gif")}
    assert corpus.questions.empty and corpus.told == 4
    assert corpus.rejects.to_numpy().tolist() == [
        ["owl.gif", "in", "no caption in captions.csv: it is not looked for"],
        ["owl.mp4", "in", "no caption in captions.csv: it is not looked for"],
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("bird.mp4,a bird", "there is no such GIF in the folder in"),
        ("foks,a fox", r"no such GIF in the folder in$"),
        ("fox,a fox", r"no such GIF in the folder in; did you mean sub/fox\.webm\?"),
        ("owl,an owl", r"several files could be meant, write the name of one: owl\.gif, owl\.mp4"),
        ("../outside.gif,a thing", "leads out of the folder in"),
        ("/etc/passwd,a thing", "leads out of the folder in"),
        ("._cat.mp4,a cat", "left behind"),
        (",a cat", "no GIF is named"),
        ("cat,", "the caption is empty"),
        ("cat,a c\0at", "holds NUL characters"),
        ("cat,a cat,train,more", "4 columns, but the header has 3: quote a text that holds the separator"),
        ("cat,a cat,val", "unknown split 'val'; the splits are train, test"),
        ("cat,a cat", "repeats row 2"),
        ("dog,a dog barks,train", "of the split train, but row 3 has its video in test: left out of training"),
    ],
)
def test_a_row_that_cannot_be_used_is_listed(folder, row, reason):
    corpus = load(folder, "video,caption,split", "cat,a cat,train", "dog,a dog,test", row, "sub/fox.webm,a fox,test")
    assert corpus.captions.caption.tolist() == ["a cat", "a dog", "a fox"] and corpus.told == 4
    item, where, told = corpus.rejects.iloc[0]
    assert (item, where) == (row.split(",")[0], "captions.csv row 4")
    assert corpus.rejects.reason.iloc[:1].str.contains(reason).all(), told


def test_splits_are_by_video(folder):
    rows = ["video,caption", *(f"{name},caption {number}" for name in ("cat", "dog") for number in range(4))]
    splits = load(folder, *rows, holdout=0.2).captions.groupby("gif").split.agg(set)
    assert sorted(map(tuple, splits)) == [("test",), ("train",)]  # one of two is held out, at least
    assert set(load(folder, *rows, holdout=1).captions.split) == {"test"}
    said = ["video,caption,split", "cat,one,Test", "cat,two,", "dog,three,train", "sub/fox,four,"]
    assert load(folder, *said, holdout=0).captions.split.tolist() == ["test", "test", "train", "train"]
    empty = ["video,caption,split", "cat,one,", "dog,two,"]
    assert sorted(load(folder, *empty, holdout=0.2).captions.split) == ["test", "train"]


def test_files_that_cannot_be_used_are_clear_errors(folder):
    cases = [
        (["file,caption", "cat,a cat"], "one column, video or gif, names.*; found neither of them, but file, caption"),
        (["video,gif,caption", "cat,cat,a cat"], "found both video and gif"),
        (["video,sentence", "cat,a cat"], "no column caption; the columns found are video, sentence"),
        (["video,caption"], r"captions\.csv has a header but no captions\.$"),
        ([""], "is empty: expected the header video,caption,split and a row for each caption"),
        (["video,caption", "bird,a bird"], r"No usable caption is left of .*\nLeft out: 1\n  captions.csv row 2, bird"),
        (["video,caption", "cat,a cat", "cat,a cat yawns"], "needs at least 2, but the rows are about 1"),
    ]  # fmt: skip
    for lines, message in cases:
        with pytest.raises(CorpusError, match=message):
            load(folder, *lines)
    with pytest.raises(CorpusError, match="from 0 to 1; found 2"):
        load(folder, "video,caption", "cat,a cat", holdout=2)
    with pytest.raises(CorpusError, match=r"^Captions: there is no file .*absent\.csv"):
        own_gifs.load_captions(folder, folder / "absent.csv")
    with pytest.raises(CorpusError, match="GIFs: there is no folder"):
        own_gifs.load_captions(folder / "absent", folder / "absent.csv")


STARTS = {
    ".mp4": b"\0\0\0\x18ftypisom",
    ".m4v": b"\0\0\0\x18ftypM4V ",
    ".mov": b"\0\0\0\x14ftypqt  ",
    ".webm": b"\x1aE\xdf\xa3",
    ".mkv": b"\x1aE\xdf\xa3",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_of_every_ending_are_read(tmp_path, ending):
    """What Pillow writes is decoded to its frames; a video's start is one that is read where PyAV is installed."""
    path = tmp_path / f"cat{ending}"
    if ending in STARTS:
        assert kind_of(STARTS[ending]).reader == "video"
        assert (refusal(STARTS[ending]) is None) == bool(importlib.util.find_spec("av"))
        return
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    kind = {".apng": "PNG"}.get(ending, ending[1:].upper())
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], duration=100)
    corpus = load(tmp_path, "video,caption", "cat,a colour changes", holdout=1)
    assert len(open_animation(read_gif(corpus.gifs[path.name]), Limits()).durations_ms) == 3
