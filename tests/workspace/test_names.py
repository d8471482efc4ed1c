"""Names of files as people have them; what is right is written out by hand in each case."""

import os
import sys
import unicodedata
from pathlib import Path

import pytest

from helpers.stage.manifest import fingerprint
from helpers.workspace.names import Names, NoSuchName, files_below, is_leftover, shown, visible


def put(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))
    return folder


@pytest.mark.parametrize(
    ("on_disk", "written", "found"),
    [
        (["cafe\u0301.gif"], "caf\u00e9.gif", "cafe\u0301.gif"),  # a Mac's, in a CSV of elsewhere
        (["caf\u00e9.gif"], "cafe\u0301", "caf\u00e9.gif"),
        (["caf\u00e9.gif", "cafe\u0301.gif"], "cafe\u0301.gif", "cafe\u0301.gif"),  # the exact one comes first
        (["u\u0308ber/ko\u0308ln.gif"], "\u00fcber/k\u00f6ln.gif", "u\u0308ber/ko\u0308ln.gif"),
        (["\u1112\u1161\u11ab.gif"], "\ud55c.gif", "\u1112\u1161\u11ab.gif"),  # Hangul
        (["CAT.GIF"], "cat.gif", "CAT.GIF"),
        (["cat.Gif"], "Cat", "cat.Gif"),
        (["Cat.gif", "cat.gif"], "cat.gif", "cat.gif"),
        (["Sub/Cat.gif"], "sub\\cat.gif", "Sub/Cat.gif"),
        (["STRASSE.gif"], "stra\u00dfe.gif", "STRASSE.gif"),
        (["at 3.45.12\u202fPM.gif"], "at 3.45.12 PM.gif", "at 3.45.12\u202fPM.gif"),  # a Mac's screenshot
        (["cat.gif"], " \ufeffcat.gif\u200b\u00a0", "cat.gif"),
        ([" cat.gif", "cat.gif"], " cat.gif", " cat.gif"),
        (["a  b.gif"], "a  b", "a  b.gif"),
        (["cat", "cat.gif"], "cat", "cat"),
        (["back\\slash.gif", "cat.gif"], "./x/../cat.gif", "cat.gif"),
    ],
)
def test_a_name_is_found_as_it_is_meant(tmp_path, on_disk, written, found):
    assert Names(put(tmp_path, *on_disk), ".gif").find(written) == found


@pytest.mark.parametrize(
    ("on_disk", "written", "found"),
    [
        (["cat.mp4"], "cat", "cat.mp4"),
        (["cat.WebM", "cat.txt"], "Cat", "cat.WebM"),
        (["cat.mp4", "cat.gif"], "cat.mp4", "cat.mp4"),
        (["cat", "cat.gif", "cat.mp4"], "cat", "cat"),
        (["cat.mp4", "cat.GIF"], "cat", "cat.mp4"),  # the exact one comes first
    ],
)
def test_a_name_may_lack_any_of_several_endings(tmp_path, on_disk, written, found):
    assert Names(put(tmp_path, *on_disk), ".gif", ".mp4", ".webm").find(written) == found


@pytest.mark.parametrize(
    ("on_disk", "written", "reason"),
    [
        (["cat.gif", "cat.mp4"], "cat", "several files could be meant, write the name of one: cat.gif, cat.mp4"),
        (["deep/cat.mp4", "deep/cat.txt"], "cat", r"no such GIF in the folder in; did you mean deep/cat\.mp4\?$"),
        (["kitten.mp4"], "kiten.gif", r"did you mean kitten\.mp4\?$"),
        (["g0.mp4", "g1.mp4"], "x.mp4", "no such GIF in the folder in$"),
    ],
)
def test_what_a_name_without_its_ending_may_mean_is_told(tmp_path, on_disk, written, reason):
    with pytest.raises(NoSuchName, match=reason):
        Names(put(tmp_path / "in", *on_disk), ".gif", ".mp4").find(written)


@pytest.mark.parametrize(
    ("on_disk", "written", "reason"),
    [
        (["Cat.gif", "cat.gif"], "CAT.gif", "several files could be meant, write the name of one: Cat.gif, cat.gif"),
        (["A/x.gif", "a/X.gif"], "a/x.gif", "several files could be meant.*: A/x.gif, a/X.gif"),
        (["cat.gif"], "../in/cat.gif", "leads out of the folder in"),
        (["sub/cat.gif"], "sub/../../in/cat.gif", "leads out of the folder in"),
        (["cat.gif"], "/etc/passwd", "leads out of the folder in"),
        (["cat.gif"], "..\\cat.gif", "leads out of the folder in"),
        (["cat.gif"], "C:/gifs/cat.gif", "leads out of the folder in"),
        (["cat.gif"], "\u200b \u00a0", "no GIF is named"),
        (["cat.gif", "._cat.gif"], "._cat.gif", "left behind"),
        (["__MACOSX/cat.gif"], "__MACOSX/cat.gif", "left behind"),
        (["deep/er/cat.gif"], "cat", r"no such GIF in the folder in; did you mean deep/er/cat\.gif\?"),
        (["kitten.gif"], "kiten.gif", r"did you mean kitten\.gif\?"),
        (["caf\udce9.gif"], "caf\u00e9.gif", r"did you mean caf\\xe9\.gif\?"),
        (["\udce9\udce8\udcea.gif"], "\u00e9\u00e8\u00ea.gif", r"did you mean \\xe9\\xe8\\xea\.gif\?"),  # Latin-1
        (["g0.gif", "g1.gif"], "x.gif", "no such GIF in the folder in$"),  # the ending alone is no likeness
        (["cat.gif"], "zebra.gif", "no such GIF in the folder in$"),
        (["cat.gif"], "cat\0.gif", "no such GIF"),
    ],
)
def test_a_name_that_stands_for_no_file_or_several_says_so(tmp_path, on_disk, written, reason):
    folder = put(tmp_path / "in", *on_disk)
    with pytest.raises(NoSuchName, match=reason) as error:
        Names(folder, ".gif").find(written)
    str(error.value).encode()


def test_links_count_by_where_they_are_written(tmp_path):
    """A cache of blobs, a linked file, a linked folder, a linked root and a folder that links back to its parent."""
    put(tmp_path, "blobs/b0", "elsewhere/fox.gif")
    snapshot = tmp_path / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (snapshot / "g0.gif").symlink_to("../../blobs/b0")
    (snapshot / "more").symlink_to(tmp_path / "elsewhere")
    (snapshot / "round").symlink_to(snapshot)
    (snapshot / "dead.gif").symlink_to("../../blobs/gone")
    (tmp_path / "mine").symlink_to(snapshot)
    for root in (snapshot, tmp_path / "mine"):
        names = Names(root, ".gif")
        assert [names.find(name) for name in ("g0", "more/fox.gif", "more/../g0.gif")] == [
            "g0.gif",
            "more/fox.gif",
            "g0.gif",
        ]
        assert names.find(f"{root}/g0.gif") == "g0.gif"
        for out in ("../../blobs/b0", "more/../../x/g0.gif", str(tmp_path / "blobs" / "b0")):
            with pytest.raises(NoSuchName, match="leads out"):
                names.find(out)
        with pytest.raises(NoSuchName, match="no such GIF"):
            names.find("dead.gif")
        assert [path.relative_to(root).as_posix() for path in files_below(root)] == ["g0.gif", "more/fox.gif"]


class Entries(list):
    """A folder's entries in an order of the test's own, as `os.scandir` gives them."""

    def __next__(self):
        if not self:
            raise StopIteration
        return self.pop(0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_the_way_to_a_linked_folder_is_the_same_on_every_disk(tmp_path, monkeypatch):
    put(tmp_path, "in/m/fox.gif")
    for name in ("z", "b", "m/deep"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "in" / "m")
    (tmp_path / "in" / "self.gif").symlink_to("self.gif")
    scandir = os.scandir
    for turned in (False, True):

        def scan(path, turned=turned):
            with scandir(path) as entries:
                return Entries(sorted(entries, key=lambda entry: entry.name, reverse=turned))

        monkeypatch.setattr(os, "scandir", scan)
        found = [path.relative_to(tmp_path / "in").as_posix() for path in files_below(tmp_path / "in")]
        assert found == ["b/fox.gif"]
    with pytest.raises(NoSuchName, match=r"self\.gif cannot be read: Too many levels"):
        Names(tmp_path / "in", ".gif").find("self")


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    folder = put(tmp_path / "in", "shut/cat.gif", "dog.gif", "lost+found/x.gif")
    listdir, scandir = os.listdir, os.scandir

    def refused(call):
        def listed(path):
            if Path(path).name in ("shut", "lost+found"):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path)

        return listed

    monkeypatch.setattr(os, "listdir", refused(listdir))
    monkeypatch.setattr(os, "scandir", refused(scandir))
    names = Names(folder, ".gif")
    for _ in range(2):
        with pytest.raises(NoSuchName, match=r"^the folder shut cannot be read: Permission denied$"):
            names.find("shut/cat.gif")
    with pytest.raises(NoSuchName, match=r"no such GIF in the folder in$"):
        names.find("dogg.gif")
    assert names.find("dog") == "dog.gif"
    with pytest.raises(PermissionError, match="shut"):
        files_below(folder)
    assert files_below(tmp_path / "gone") == []


def test_what_a_system_leaves_behind_is_known():
    left = ["._x.gif", ".DS_Store", "a/b/.ds_store", "Thumbs.db", "ehthumbs.db", "sub\\desktop.ini", "Desktop.ini"]
    left += [
        "__MACOSX/sub/x.gif",
        "$RECYCLE.BIN/x.gif",
        "~$qa.csv",
        ".~lock.qa.csv#",
        "@eaDir/x.gif",
        ".Trash-1000/x.gif",
        ".ipynb_checkpoints/x-checkpoint.gif",
        "a/lost+found/x.gif",
        "x.gif:Zone.Identifier",
        "Icon\r",
        "#recycle/x.gif",
        "RECYCLER/x.gif",
    ]
    assert [name for name in left if not is_leftover(name)] == []
    own = ["x.gif", "_x.gif", ".x.gif", "thumbs.gif", "my Thumbs.db.gif", "MACOSX/x.gif", "desktop.ini.gif", "a._b.gif"]
    assert [name for name in own if is_leftover(name)] == []


def test_files_that_do_not_belong_change_no_fingerprint_and_names_of_any_bytes_do_not_stop_it(tmp_path):
    put(tmp_path, "a.gif", "sub/b.gif")
    before = fingerprint(tmp_path)
    put(tmp_path, ".DS_Store", "sub/._b.gif", "__MACOSX/a.gif", "sub/Thumbs.db")
    assert fingerprint(tmp_path) == before
    put(tmp_path, "caf\udce9.gif")
    with_latin = fingerprint(tmp_path)
    assert with_latin != before
    os.rename(tmp_path / "caf\udce9.gif", tmp_path / "caf\udce8.gif")
    assert fingerprint(tmp_path) != with_latin


def test_a_linked_folders_content_decides_its_fingerprint(tmp_path):
    put(tmp_path, "far/a.gif", "in/b.gif")
    (tmp_path / "in" / "far").symlink_to("../far")
    before = fingerprint(tmp_path / "in")
    (tmp_path / "far" / "a.gif").write_bytes(b"other")
    assert fingerprint(tmp_path / "in") != before


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("green\u200b", "green"),
        ("\ufeffred\u2060 ", "red"),
        ("\u00a0dark\u00a0\u2003blue\u202f", "dark blue"),
        ("tur\u00adquoise", "turquoise"),
        ("\u202agreen\u202c", "green"),
        ("\u200e3\u200f", "3"),
        ("a\u200b b", "a b"),
        ("one\u2028two\u3000three\u3164\u2800", "one two three"),
        ("gre\u200den\u200c", "green"),
        (
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        ),  # Persian
        ("\U0001f468\u200d\U0001f467\u200d", "\U0001f468\u200d\U0001f467"),  # a family
        ("caf\u00e9 \u2013 na\u00efve", "caf\u00e9 \u2013 na\u00efve"),
        ("\u200b\u00a0\ufeff", ""),
    ],
)
def test_only_what_can_be_seen_is_kept(text, seen):
    assert visible(text) == seen


def test_bytes_that_are_not_utf_8_can_be_shown():
    assert shown(os.fsdecode(b"caf\xe9.gif")) == "caf\\xe9.gif"
    assert shown("caf\u00e9 \U0001f408") == "caf\u00e9 \U0001f408"
    assert unicodedata.normalize("NFC", shown("cafe\u0301")) == "caf\u00e9"
    assert sys.getfilesystemencoding() == "utf-8"
