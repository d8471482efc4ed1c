"""How a run ends: the exit codes, and the errors that lead to them."""

import builtins
import re
from pathlib import Path

from helpers.workspace.names import files_below

HELPERS = Path(__file__).resolve().parents[1]
DONE, FAILED, REFUSED, PAUSED, INTERRUPTED = 0, 1, 2, 75, 130
EXIT_CODES = """exit codes:
  0    done: every stage asked for is complete
  1    a notebook failed; its name, cell and error are printed. A kernel that died (often: out of memory) counts too
  2    refused before the stage's kernel started: bad usage, parameter or profile; another run at work in the
       same workspace; a stage finished with other settings; an upstream stage missing; too little disk
  75   paused: a deadline passed, too few GPU-hours are left, or an upstream stage is only partly done; the command
       that goes on is printed
  130  interrupted by Ctrl-C; the same command goes on"""


def is_sentence(name: str) -> bool:
    """Whether an error that a kernel tells by its class's name says all that is to be said, without the code's lines.

    That are the errors by which the operating system refuses something, which tell of the disk and not of the code,
    and the suite's own, wherever in helpers they are defined; the executed notebook keeps the place.
    """
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, OSError):
        return True
    defined = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
    files = (file for file in files_below(HELPERS) if file.suffix == ".py")
    return any(defined.search(file.read_text(encoding="utf-8")) for file in files)


def fault_of(error: OSError, place: Path | None = None) -> str:
    """Say an error of the operating system in one sentence, with the path that it is about.

    place: what was at work, where the error itself names no path, or only a name inside it. The suite's own errors of
    this kind are sentences already.
    """
    if error.errno is None:
        return str(error) or type(error).__name__
    named = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = " -> ".join(named) or str(place or "")
    if named and place and not Path(named[0]).is_absolute():
        where += f" in {place}"
    return f"{where}: {error.strerror}" if where else str(error.strerror)


class Failed(RuntimeError):
    """A notebook that did not finish its stage."""


class Paused(RuntimeError):
    """A notebook that stopped at the deadline; what it has done is kept."""
