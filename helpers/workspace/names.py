"""Names of files as people have them: spelt by another system, linked to elsewhere, with another system's leftovers."""

from __future__ import annotations

import difflib
import os
import re
import stat
import unicodedata
from functools import cached_property
from pathlib import Path

LEFTOVERS = re.compile(
    r"\._.*|\.ds_store|\.appledouble|__macosx|icon\r|\.localized|\.apdisk|\.fseventsd|\.trashes|\.trash(-\d+)?"
    r"|\.spotlight-v100|\.temporaryitems|\.documentrevisions-v100|\.volumeicon\.icns|network trash folder"  # macOS
    r"|(eh)?thumbs(_vista)?\.db|desktop\.ini|\$recycle\.bin|recycler|found\.\d{3}|system volume information"  # Windows
    r"|.*:zone\.identifier|~\$.*"  # Windows and Office
    r"|\.directory|lost\+found|\.nfs[0-9a-f]+|\.fuse_hidden.*|\.~lock\..*#|\.thumbnails|\.goutputstream-.*"  # Linux
    r"|@eadir|#recycle|@recycle|\.@__thumb|#snapshot|\.snapshot"  # network disks
    r"|\.ipynb_checkpoints|\.dropbox(\.cache)?|\.stfolder|\.stversions",  # Jupyter, Dropbox, Syncthing
    re.IGNORECASE | re.DOTALL,
)
"""Names of files and folders that a system leaves behind in a person's folder."""

ZERO_WIDTH = "\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
BLANK = re.compile("[\\s\u115f\u1160\u180e\u2800\u3164\uffa0]+")
# a joiner between two letters of a script that has some, or inside an emoji, is part of the text
INVISIBLE = re.compile(f"[{ZERO_WIDTH}]|(?<![^\\x00-\\x7f\\s])[\u200c\u200d]+|[\u200c\u200d]+(?![^\\x00-\\x7f\\s])")
COMPARISONS = 200_000  # names looked at for near ones in one run: seconds, not hours


class NoSuchName(LookupError):
    """A written name that stands for no file, or for several; the message says which."""


def is_leftover(path: str | os.PathLike[str]) -> bool:
    """Whether a system left this relative path behind, or it lies in a folder that one left behind."""
    return any(LEFTOVERS.fullmatch(part) for part in os.fspath(path).replace("\\", "/").split("/"))


def shown(text: str) -> str:
    r"""The text as it can be printed and stored: bytes of a name that are not UTF-8 become \xe9 and the like."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if _raw(text) else text


def _raw(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def visible(text: str) -> str:
    """The text without characters of no width, and with one plain space for any run of spaces; none at its ends."""
    return BLANK.sub(" ", INVISIBLE.sub("", BLANK.sub(" ", text))).strip(" ")


def folded(text: str) -> str:
    """What names that differ by letter case, by composed or decomposed accents or by invisible characters share."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", visible(text)).casefold())


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder in sorted order, but for leftovers; linked folders too, each real folder once.

    Of several ways to a folder the first counts, where each folder's entries are gone through in sorted order. Raises
    the OSError of a folder that cannot be listed: its files would be missed in silence.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_leftover(name))
        found += [Path(parent, name) for name in files if not is_leftover(name)]
    return sorted(path for path in found if path.is_file())


class Names:
    """The files in a folder, found by their names as a person, a spreadsheet or another system wrote them.

    A name counts by how it is written: links may lead anywhere, as those of the Hugging Face cache do, but neither
    ".." nor an absolute name leads out of the folder.
    """

    def __init__(self, folder: Path, *endings: str) -> None:
        self._folder, self._endings, self._left = folder, endings, COMPARISONS
        self._entries: dict[str, dict[str, list[str]]] = {}

    def find(self, written: str) -> str:
        """Return the path inside the folder, in the disk's spelling, of the file that is meant.

        The exact name comes first, then the same with one of the endings, then names that differ by letter case, by the
        form of their accents or by invisible characters. Raises NoSuchName if there is none, or several, or it leads
        out.
        """
        if not visible(written):
            raise NoSuchName("no GIF is named")
        texts = dict.fromkeys((written, written.strip(), visible(written)))
        parts = [part for part in map(self._parts, filter(None, texts)) if part]
        ended = [[[*part[:-1], part[-1] + ending] for ending in self._endings] for part in parts]
        for exact in (True, False):
            for spellings in [*([part] for part in parts), *ended]:
                paths = [path for spelling in spellings for path in self._matches("", spelling, exact)]
                found = [path for path in paths if self._is_file(path)]
                if len(found) > 1:
                    raise NoSuchName(f"several files could be meant, write the name of one: {_listed(found)}")
                if found:
                    return found[0]
        raise NoSuchName(self._missing(written))

    def _parts(self, written: str) -> list[str]:
        text, folder = written.replace("\\", "/"), Path(os.path.abspath(self._folder)).as_posix()
        text = text.removeprefix(f"{folder}/")
        parts: list[str] = []
        for part in text.split("/"):
            if part == ".." and parts:
                parts.pop()
            elif part == ".." or text.startswith("/") or re.match("[A-Za-z]:/", text):
                raise NoSuchName(f"the GIF's path leads out of the folder {shown(self._folder.name)}")
            elif part not in ("", "."):
                parts.append(part)
        return parts

    def _matches(self, parent: str, parts: list[str], exact: bool) -> list[str]:
        names = self._listing(parent).get(folded(parts[0]), [])
        names = [name for name in names if not exact or name == parts[0]]
        paths = [f"{parent}/{name}" if parent else name for name in names]
        return [found for path in paths for found in self._matches(path, parts[1:], exact)] if parts[1:] else paths

    def _is_file(self, path: str) -> bool:
        try:
            return stat.S_ISREG(os.stat(self._folder / path).st_mode)
        except FileNotFoundError:  # a link that leads nowhere
            return False
        except OSError as error:
            raise NoSuchName(f"{shown(path)} cannot be read: {error.strerror}") from error

    def _listing(self, parent: str) -> dict[str, list[str]]:
        """The names in one folder by their folded form; a listing tells their spelling where a file system does not."""
        if parent not in self._entries:
            place, listed = self._folder / parent, {}
            try:
                names = sorted(os.listdir(place)) if place.is_dir() else []
            except OSError as error:
                raise NoSuchName(f"the folder {shown(place.name)} cannot be read: {error.strerror}") from error
            for name in names:
                if not is_leftover(name):
                    listed.setdefault(folded(name), []).append(name)
            self._entries[parent] = listed
        return self._entries[parent]

    @cached_property
    def _all(self) -> list[str]:
        try:
            paths = [path.relative_to(self._folder).as_posix() for path in files_below(self._folder)]
        except OSError:  # a name is not found for want of a hint
            paths = []
        return [path for path in paths if path.lower().endswith(self._endings or "")]

    @cached_property
    def _by_base(self) -> dict[str, list[str]]:
        """Every path by the stem of its last part."""
        found: dict[str, list[str]] = {}
        for path in self._all:
            found.setdefault(self._stem(path.rpartition("/")[2]), []).append(path)
        return found

    def _missing(self, written: str) -> str:
        if is_leftover(written):
            return "no GIF, but a file that an operating system left behind"
        near = self._near(visible(written).replace("\\", "/"))
        hint = f"; did you mean {_listed(near)}?" if near else ""
        return f"there is no such GIF in the folder {shown(self._folder.name)}{hint}"

    def _near(self, written: str) -> list[str]:
        """Names like the one that is missing: the same one in another folder, else the three most similar."""
        same = self._by_base.get(self._stem(written.rpartition("/")[2]), [])
        if same or self._left < len(self._all):
            return same[:3]
        self._left -= len(self._all)
        by_stem = {self._stem(path): path for path in self._all}
        return [by_stem[stem] for stem in difflib.get_close_matches(self._stem(written), by_stem, n=3, cutoff=0.7)]

    def _stem(self, path: str) -> str:
        """A path for comparing: folded, without an ending that many share; other bytes than UTF-8 as Latin-1."""
        text = folded(re.sub("[\udc80-\udcff]", lambda raw: chr(ord(raw[0]) - 0xDC00), path))
        return next((text.removesuffix(ending) for ending in self._endings if text.endswith(ending)), text)


def _listed(names: list[str]) -> str:
    return ", ".join(map(shown, names))
