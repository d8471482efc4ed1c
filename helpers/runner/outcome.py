"""How a run ends: the exit codes, and the errors that lead to them."""

import builtins
from pathlib import Path

DONE, FAILED, REFUSED, PAUSED, INTERRUPTED = 0, 1, 2, 75, 130
EXIT_CODES = """exit codes:
  0    done: every stage asked for is complete
  1    a notebook failed; its name, cell and error are printed. A kernel that died (often: out of memory) counts too
  2    refused before the stage's kernel started: bad usage, parameter or profile; another run at work in the
       same workspace; a stage finished with other settings; an upstream stage missing; too little disk
  75   paused: a deadline passed, too few GPU-hours are left, or an upstream stage is only partly done; the command
       that goes on is printed
  130  interrupted by Ctrl-C; the same command goes on"""

SYSTEM_FAULTS = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, OSError)}
"""Names of the errors by which the operating system refuses something: they tell of the disk, not of the code."""


# the suite's own errors, by name as a kernel tells them: each is a sentence that says what to do, the place in the code
# adds nothing to it (the executed notebook keeps that)
SENTENCES = frozenset(
    [
        "AdemVLError",
        "AttachedError",
        "BundleError",
        "CheckpointError",
        "ConfigError",
        "CorpusError",
        "DiskFull",
        "FetchError",
        "GifRejected",
        "KnownBad",
        "ModelNotFound",
        "NetworkDown",
        "PromptTooLong",
        "ResultsError",
        "ScoreError",
        "StageConflict",
        "StageError",
        "StoreError",
        "TooLong",
        "TrainingError",
    ]
)


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
