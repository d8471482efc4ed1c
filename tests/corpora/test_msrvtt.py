"""MSR-VTT: the official layouts, written here as they are published; what is right is counted by hand or published."""

import csv
import json
from collections import Counter

import pytest

from helpers.corpora import msrvtt
from helpers.corpora.schema import CAPTION_COLUMNS, CorpusError

HEADER = "key,vid_key,video_id,sentence"
SPLITS = [("train", range(6513)), ("validate", range(6513, 7010)), ("test", range(7010, 10_000))]  # as published


def annotate(path, split_of, captions=20, told=None):
    """Write annotations of these videos; each has the captions `told` of it, or so many numbered ones."""
    videos = [
        {"category": 9, "url": "", "video_id": video, "start time": 0.5, "end time": 9.5, "split": split, "id": number}
        for number, (video, split) in enumerate(split_of.items())
    ]
    told = told or {video: [f"caption {number} of {video}" for number in range(captions)] for video in split_of}
    sentences = [
        {"caption": caption, "video_id": video, "sen_id": 0} for video, texts in told.items() for caption in texts
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {}, "videos": videos, "sentences": sentences}))


def listed(folder, rows, name="MSRVTT_JSFUSION_test.csv", header=HEADER):
    """Write 1k-A's list of (video, sentence) rows."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"ret{number},msr{video[5:]},{video},{sentence}" for number, (video, sentence) in enumerate(rows)]
    (folder / name).write_text("\n".join([header, *lines]) + "\n")


def members(path, videos, header="video_id"):
    path.write_text("\n".join([header, *videos] if header else videos) + "\n")


def one_k_a():
    """A thousand videos of the test split, 995 distinct captions: 9 rows share 4, as in the official file."""
    texts = [f"caption {number}" for number in range(991)] + ["a", "a", "a", "b", "b", "c", "c", "d", "d"]
    return [(f"video{7020 + 2 * number}", text) for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """All of MSR-VTT's captions in the official layout: 10,000 videos with 20 captions each."""
    folder = tmp_path_factory.mktemp("msrvtt")
    split_of = {f"video{number}": split for split, numbers in SPLITS for number in numbers}
    annotate(folder / "MSRVTT_data.json", split_of)
    listed(folder, one_k_a())
    tested = {video for video, _ in one_k_a()}
    members(folder / "MSRVTT_train.9k.csv", [video for video in split_of if video not in tested])
    return folder


@pytest.fixture
def small(tmp_path):
    """A part of the data set: two training, one validation and two test videos, of which 1k-A has both."""
    split_of = {"video1": "train", "video2": "train", "video3": "validate", "video8": "test", "video9": "test"}
    annotate(tmp_path / "MSRVTT_data.json", split_of, captions=3)
    listed(tmp_path, [("video9", "a man sings"), ("video8", "a dog runs")])
    members(tmp_path / "MSRVTT_train.9k.csv", ["video1", "video2", "video3"])
    return tmp_path


def sizes(corpus):
    """Videos and captions of each split."""
    return {split: (rows.gif.nunique(), len(rows)) for split, rows in corpus.captions.groupby("split")}


@pytest.mark.parametrize(
    ("protocol", "train", "expected"),
    [
        ("1k-A", "9k", {"test": (1000, 1000), "train": (9000, 180_000)}),
        ("1k-A all-captions", None, {"test": (1000, 20_000)}),
        ("full all-captions", "full", {"test": (2990, 59_800), "train": (6513, 130_260), "val": (497, 9940)}),
    ],
)
def test_each_protocol_has_the_published_counts(official, protocol, train, expected):
    corpus = msrvtt.load(official, protocol, train=train)
    assert sizes(corpus) == expected
    assert corpus.name == f"msrvtt {protocol}" and corpus.rejects.empty and corpus.questions.empty
    assert list(corpus.captions.columns) == CAPTION_COLUMNS and corpus.captions.caption_id.is_unique
    assert corpus.told == len(corpus.captions) and corpus.gifs == {}


def test_the_real_lists(shared_data, tmp_path):
    """1k-A and its train lists as they are handed out, with captions written here for the videos to train on."""
    folder = shared_data / "msrvtt"
    if not folder.is_dir():
        pytest.skip(f"no MSR-VTT at {folder}")
    corpus = msrvtt.load(folder)
    words = corpus.captions.caption.str.split().str.len()
    assert sizes(corpus) == {"test": (1000, 1000)} and corpus.rejects.empty
    assert (words.min(), words.median(), round(words.mean(), 1), words.max()) == (3, 9, 9.4, 30)
    shared = [number for number in Counter(corpus.captions.caption).values() if number > 1]
    assert len(shared) == 4 and sum(shared) == 9 and corpus.captions.caption.nunique() == 995
    with (folder / "MSRVTT_JSFUSION_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert corpus.captions[["gif", "caption"]].to_numpy().tolist() == [[r["video_id"], r["sentence"]] for r in rows]
    numbers = corpus.captions.gif.str.removeprefix("video").astype(int)
    assert (numbers.min(), numbers.max()) == (7020, 9975)

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    annotate(tmp_path / "MSRVTT_data.json", {f"video{n}": split for split, numbers in SPLITS for n in numbers})
    trained = msrvtt.load(tmp_path, train="9k").captions
    assert set(trained.gif) == {f"video{number}" for number in range(10_000)}
    seven = set((folder / "MSRVTT_train.7k.csv").read_text().split()[1:])
    assert len(seven) == 7010 and seven < set(trained.gif[trained.split == "train"])
    with pytest.raises(
        CorpusError, match=r"^1,990 of the 2,990 test videos of full all-captions are in the train list"
    ):
        msrvtt.load(tmp_path, "full all-captions", train="9k")


def test_captions_of_each_split(small):
    corpus = msrvtt.load(small, train="full", complete=False)
    assert corpus.captions[["caption_id", "split", "caption"]].to_numpy().tolist() == [
        ["video9-1", "test", "a man sings"],
        ["video8-1", "test", "a dog runs"],
        *(
            [f"video{video}-{number + 1}", split, f"caption {number} of video{video}"]
            for video, split in ((1, "train"), (2, "train"), (3, "val"))
            for number in range(3)
        ),
    ]
    assert set(map(tuple, corpus.captions.facts)) == {()}
    assert sizes(msrvtt.load(small, train="9k", complete=False)) == {"test": (2, 2), "train": (3, 9)}
    assert sizes(msrvtt.load(small, "1k-A all-captions", complete=False)) == {"test": (2, 6)}
    assert sizes(msrvtt.load(small, "full all-captions", train="full", complete=False))["test"] == (2, 6)


def test_the_two_official_files_are_the_one(small, tmp_path):
    whole = msrvtt.load(small, "full all-captions", train="full", complete=False).captions
    (small / "MSRVTT_data.json").unlink()
    parts = {"video1": "train", "video2": "train", "video3": "validate"}
    annotate(small / "train_val_annotation" / "train_val_videodatainfo.json", parts, captions=3)
    annotate(small / "test_videodatainfo.json", {"video8": "test", "video9": "test"}, captions=3)
    assert msrvtt.load(small, "full all-captions", train="full", complete=False).captions.equals(whole)
    (small / "test_videodatainfo.json").unlink()
    assert sizes(msrvtt.load(small, train="full", complete=False)) == {"test": (2, 2), "train": (2, 6), "val": (1, 3)}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_variant_with_semicolons(tmp_path, encoding):
    rows = ["ret0;msr9;video9;a man, old, sings", 'ret1;msr8;video8;"a ""dog"" runs "']
    text = "\r\n".join(["key;vid_key;video_id;sentence", *rows])
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_bytes(text.encode(encoding))
    captions = msrvtt.load(tmp_path, complete=False).captions
    assert captions.caption.tolist() == ["a man, old, sings", 'a "dog" runs'] and captions.gif.tolist() == [
        "video9",
        "video8",
    ]


def test_a_video_told_the_same_twice_asks_twice(small):
    annotate(small / "MSRVTT_data.json", {"video8": "test"}, told={"video8": ["a dog", "a cat", "a  dog "]})
    captions = msrvtt.load(small, "full all-captions", complete=False).captions
    assert captions.caption.tolist() == ["a dog", "a cat", "a dog"]
    assert captions.caption_id.tolist() == ["video8-1", "video8-2", "video8-3"]


def test_other_counts_than_the_published_ones_are_named(tmp_path):
    listed(tmp_path, one_k_a()[:-1])
    with pytest.raises(CorpusError) as error:
        msrvtt.load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} is not MSR-VTT as published: 999 test videos (1,000), 999 test captions (1,000); in brackets what "
        "the official files hold. Scores on other captions cannot be compared: get the official files, or load what is "
        "there with complete=False."
    )
    listed(tmp_path, [*one_k_a()[:-1], ("video9998", "something else")])
    with pytest.raises(CorpusError, match=r"as published: 996 distinct test captions \(995\); in brackets"):
        msrvtt.load(tmp_path)
    listed(tmp_path, [*one_k_a()[:-1], ("video9998", "too, many")])
    with pytest.raises(
        CorpusError,
        match=r"complete=False\.\nLeft out: 1\n  MSRVTT_JSFUSION_test.csv row 1001, ret999: 5 columns, but the header",
    ):
        msrvtt.load(tmp_path)


def test_counts_of_what_is_trained_on_are_named_too(small):
    listed(small, one_k_a())
    with pytest.raises(CorpusError, match=r"published: 3 train videos \(9,000\), 9 train captions \(180,000\); in"):
        msrvtt.load(small, train="9k")
    (small / "MSRVTT_train.9k.csv").rename(small / "MSRVTT_train.7k.csv")
    with pytest.raises(CorpusError, match=r"published: 3 train videos \(7,010\), 9 train captions \(140,200\); in"):
        msrvtt.load(small, train="7k")
    with pytest.raises(
        CorpusError, match=r"2 train videos \(6,513\), 6 train captions \(130,260\), 1 val videos \(497"
    ):
        msrvtt.load(small, train="full")


def test_test_videos_in_the_train_list_are_refused(tmp_path):
    """453 of 1k-A are in the train list of 1k-B."""
    listed(tmp_path, one_k_a())
    tested = [video for video, _ in one_k_a()]
    annotate(tmp_path / "MSRVTT_data.json", {"video1": "train"} | dict.fromkeys(tested, "test"), captions=2)
    members(tmp_path / "train_list_miech.txt", ["video1", *tested[100:553]], header=None)
    with pytest.raises(CorpusError) as error:
        msrvtt.load(tmp_path, train=tmp_path / "train_list_miech.txt")
    assert str(error.value) == (
        f"453 of the 1,000 test videos of 1k-A are in the train list {tmp_path / 'train_list_miech.txt'}: video7220, "
        "video7222, video7224, video7226, video7228 and 448 more. A score on videos that were trained on tells "
        "nothing. 9k and 7k have none of 1k-A, 7k and full none of the full test; allow_overlap=True trains on them "
        "all the same."
    )
    corpus = msrvtt.load(tmp_path, train=tmp_path / "train_list_miech.txt", allow_overlap=True)
    assert sizes(corpus) == {"test": (1000, 1000), "train": (454, 908)} and corpus.captions.caption_id.is_unique
    assert corpus.name == "msrvtt 1k-A, trained on 453 of its test videos"


def test_twenty_captions_in_a_protocol_of_one_are_refused(tmp_path):
    told = [(f"video{number}", f"caption {n} of {number}") for number in range(7020, 7027) for n in range(20)]
    annotate(tmp_path / "MSRVTT_data.json", dict.fromkeys((video for video, _ in told), "test"))
    listed(tmp_path, told)
    for complete in (True, False):
        with pytest.raises(CorpusError) as error:
            msrvtt.load(tmp_path, complete=complete)
        assert str(error.value) == (
            f"{tmp_path / 'MSRVTT_JSFUSION_test.csv'}: 140 captions of 7 videos, but the protocol has one caption a "
            "video (7 have more, video7020: 20, video7021: 20, video7022: 20, video7023: 20, video7024: 20, ...). Give "
            "one caption for each, or choose a protocol of all captions, where a video is right for each caption of "
            "its own."
        )
    assert sizes(msrvtt.load(tmp_path, "1k-A all-captions", complete=False)) == {"test": (7, 140)}
    listed(tmp_path, [*one_k_a(), one_k_a()[0]])
    with pytest.raises(CorpusError, match=r"1,001 captions of 1,000 videos.*\(1 have more, video7020: 2\)\. Give one"):
        msrvtt.load(tmp_path)


def test_captions_without_video_and_videos_without_caption_are_listed(small):
    told = {"video1": ["a man"], "video2": [], "video9": [" ", "a dog", "a\0cat"], "video77": ["who ?", "what ?"]}
    split_of = {"video1": "train", "video2": "train", "video8": "test", "video9": "test"}
    annotate(small / "MSRVTT_data.json", split_of, told=told)
    members(small / "MSRVTT_train.9k.csv", ["video1", "video2", "video77"])
    corpus = msrvtt.load(small, "full all-captions", train="9k", complete=False)
    assert corpus.captions.caption.tolist() == ["a dog", "a man"] and corpus.told == 4
    assert corpus.rejects.to_numpy().tolist() == [
        ["video77", "MSRVTT_data.json", "2 captions of a video that is not among the videos: left out"],
        ["video8", "split test", "a video without caption: left out"],
        ["video2", "split train", "a video without caption: left out"],
        ["video77", "split train", "a video without caption: left out"],
        ["video9", "split test", "the caption is empty"],
        ["video9", "split test", "the caption is not whole: it holds NUL characters or bytes that are no text"],
    ]
    listed(small, [("", "a man"), ("video8", "a dog")])
    corpus = msrvtt.load(small, complete=False)
    assert corpus.captions.gif.tolist() == ["video8"]
    assert corpus.rejects.to_numpy().tolist() == [["ret0", "MSRVTT_JSFUSION_test.csv row 2", "no video is named"]]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_videos_are_found_by_their_names_at_any_depth(small, tmp_path):
    videos = touch(
        tmp_path / "in", "TestVideo/video9.mp4", "video8.GIF", "a/b/video1.webm", "video2.webp", "video3.mkv"
    )
    touch(videos, "video9.npy", "a/._video1.mp4", "video44.mp4", "video8.txt", "video8.mp4.part")
    corpus = msrvtt.load(small, train="9k", videos=videos, complete=False)
    where = {"video9": "TestVideo/video9.mp4", "video8": "video8.GIF", "video1": "a/b/video1.webm"}
    where |= {"video2": "video2.webp", "video3": "video3.mkv"}
    assert corpus.gifs == {video: str(videos / name) for video, name in where.items()} and corpus.rejects.empty


def test_test_videos_without_a_file_are_refused_or_listed(small, tmp_path):
    listed(small, one_k_a())
    videos = touch(tmp_path / "in", *(f"{video}.mp4" for video, _ in one_k_a()[7:]))
    with pytest.raises(CorpusError) as error:
        msrvtt.load(small, videos=videos)
    assert str(error.value) == (
        f"7 test videos of 1k-A have no file in {videos} (.gif, .webp, .png, .apng, .mp4, .m4v, .mov, .webm, .mkv): "
        "video7020, video7022, video7024, video7026, video7028 and 2 more. Among fewer videos each is easier to find: "
        "get them, or load with complete=False, which leaves them out."
    )
    corpus = msrvtt.load(small, train="9k", videos=videos, complete=False)
    assert sizes(corpus) == {"test": (993, 993)} and len(corpus.gifs) == 993 and corpus.told == 1009
    assert corpus.captions.index.tolist() == list(range(993))
    assert corpus.rejects.item.tolist() == [*(f"video{7020 + 2 * n}" for n in range(7)), "video1", "video2", "video3"]
    assert corpus.rejects.reason.iloc[0] == "there is no file of this video: its 1 captions are left out"
    assert corpus.rejects.reason.iloc[-1] == "there is no file of this video: its 3 captions are left out"


def test_training_videos_without_a_file_are_listed(small, tmp_path):
    listed(small, one_k_a())
    videos = touch(tmp_path / "in", *(f"{video}.mp4" for video, _ in one_k_a()), "video2.mp4")
    corpus = msrvtt.load(small, train=small / "MSRVTT_train.9k.csv", videos=videos)
    assert sizes(corpus) == {"test": (1000, 1000), "train": (1, 3)}
    assert corpus.rejects[["item", "where"]].to_numpy().tolist() == [["video1", "in"], ["video3", "in"]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: listed(folder / "again", []), r"needs MSRVTT_JSFUSION_test\.csv, but .* holds 2 of them \("),
        (lambda folder: (folder / "MSRVTT_JSFUSION_test.csv").unlink(), r"test\.csv, but .* holds none\. Put it there"),
        (lambda folder: (folder / "MSRVTT_train.9k.csv").unlink(), r"needs MSRVTT_train\.9k\.csv, but .* holds none"),
        (lambda folder: listed(folder, []), r"test\.csv has a header but no captions\.$"),
        (lambda folder: listed(folder, [], header="key,video,sentence"), "no column video_id; the columns found"),
        (lambda folder: members(folder / "MSRVTT_train.9k.csv", []), r"train list .*9k\.csv names no video\.$"),
        (
            lambda folder: members(folder / "MSRVTT_train.9k.csv", ["video1", "video2", "video1"]),
            r"9k\.csv: 1 videos are listed more than once: video1\.$",
        ),
        (lambda folder: (folder / "MSRVTT_data.json").unlink(), "has neither MSRVTT_data.json nor train_val_video"),
        (lambda folder: (folder / "MSRVTT_data.json").write_text("[{"), "data.json is not readable as JSON"),
        (lambda folder: (folder / "MSRVTT_data.json").write_text("[]"), "expected an object with a list `videos`"),
        (
            lambda folder: (folder / "MSRVTT_data.json").write_text('{"videos": [], "sentences": {}}'),
            "expected an object with a list `sentences`",
        ),
        (
            lambda folder: (folder / "MSRVTT_data.json").write_text('{"videos": [{"video_id": 7, "split": "test"}]}'),
            r"videos\[0\] is no object with the texts video_id and split",
        ),
        (
            lambda folder: annotate(folder / "MSRVTT_data.json", {"video1": "val"}),
            "unknown split val; MSR-VTT's are train, validate, test",
        ),
        (
            lambda folder: annotate(folder / "MSRVTT_data.json", {"video1": "train"}, told={"video1": [None]}),
            r"sentences\[0\] is no object with the texts video_id and caption",
        ),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_clear_errors(small, spoil, message):
    spoil(small)
    with pytest.raises(CorpusError, match=message):
        msrvtt.load(small, train="9k", complete=False)


def test_a_video_listed_twice_in_the_annotations_is_refused(small):
    (small / "MSRVTT_data.json").unlink()
    annotate(small / "train_val_videodatainfo.json", {f"video{number}": "train" for number in range(9)})
    annotate(small / "test_videodatainfo.json", {f"video{number}": "test" for number in range(2, 11)})
    with pytest.raises(
        CorpusError,
        match=r"^train_val_videodatainfo.json and test_videodatainfo.json: 7 videos are listed more than once: video2, "
        r"video3, video4, video5, video6 and 2 more\.$",
    ):
        msrvtt.load(small, train="9k", complete=False)


def test_what_is_asked_for_must_be_there(small, tmp_path):
    cases = [
        ((small, "1k-a"), {}, "no protocol '1k-a'; did you mean '1k-A'"),
        ((small, "1k-B"), {"train": "9k"}, "no protocol '1k-B'"),
        ((small / "absent",), {}, r"MSR-VTT: there is no folder .*absent\.$"),
        ((small / "MSRVTT_data.json",), {}, r"MSRVTT_data.json is a file: unpack it, and name the folder\.$"),
        ((small,), {"train": "8k"}, r"there is no file 8k\. Name one, or take 9k, 7k, full\.$"),
        ((small,), {"videos": small / "absent"}, r"MSR-VTT's videos: there is no folder .*absent\.$"),
    ]
    for positional, named, message in cases:
        with pytest.raises(CorpusError, match=message):
            msrvtt.load(*positional, **named, complete=False)
    with pytest.raises(
        CorpusError, match=r"No usable caption is left of (.|\n)*Left out: 2\n  in, video9: there is no f"
    ):
        msrvtt.load(small, videos=touch(tmp_path / "in", "video1.mp4"), complete=False)
    with pytest.raises(
        CorpusError, match=r"video8 has two files, .*video8\.mp4 and .*video8\.webm: name a folder with"
    ):
        msrvtt.load(small, videos=touch(tmp_path / "in", "a/video8.mp4", "b/video8.webm"), complete=False)
