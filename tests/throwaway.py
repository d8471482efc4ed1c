"""A suite of throwaway notebooks in a temporary folder, run by the real runner."""

import textwrap
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from helpers import stage as stages
from helpers.suite import main

COMMON = "profile = ''  # p\nrun = ''  # r\noverrides = {}  # o\n"


class Throwaway:
    """A suite under construction: `notebook` adds a stage, `run` runs the command line in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.entries = folder, folder / "runs", []

    def notebook(self, name: str, *cells: str, parameters: str = "", **entry) -> None:
        """Add (or replace) notebook `name`: parameters, then Stage(...) as `stage`, then the given cells."""
        names = [line.split(" =")[0] for line in parameters.splitlines()]
        own = "{" + ", ".join(f"'{n}': {n}" for n in names) + "}"
        start = (
            "from helpers.stage import Stage\n"
            f"stage = Stage('{name}', profile=profile, run=run, overrides=overrides, parameters={own})"
        )
        sources = [COMMON + parameters, start, *(textwrap.dedent(cell) for cell in cells)]
        book = new_notebook(cells=[new_code_cell(source) for source in sources])
        book.cells[0].metadata["tags"] = ["parameters"]
        book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, self.folder / f"{name}.ipynb")
        texts = dict.fromkeys(("title", "about", "needs", "makes"), name)
        sizes = {"minutes": {"tiny": 1}, "gigabytes": {"tiny": 0.01}}
        self.entries = [e for e in self.entries if e["name"] != name]
        self.entries.append({"name": name, **texts, **sizes, "contract": 1, **entry})
        (self.folder / "suite.yaml").write_text(yaml.safe_dump({"repository": None, "stages": self.entries}))
        stages.load_suite.cache_clear()

    def run(self, *argv: str) -> int:
        """Run the command line on this suite and return the exit code."""
        return main(["--profile", "tiny", *argv])

    def manifest(self, name: str, run: str = "tiny") -> dict | None:
        """The stage's manifest, if it was written."""
        return stages.read_manifest(self.runs / run / name)
