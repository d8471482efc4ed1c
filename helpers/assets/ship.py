"""Copies what notebooks 03 and 05 of a run have trained to where it ships: `python -m helpers.assets.ship RUN_FOLDER`.

Trained tensors are rounded to half precision, in which the backbones beside them are kept too.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.workspace.disk import whole

TINY = Path(__file__).parent / "tiny"
TRAINED = ("03_adapter_training/bundle", "03_adapter_training/blind", "05_adem_scienceqa/adem_vl")


def ship(bundle: Path, target: Path) -> None:
    """Copy one bundle to `target`, at once or not at all; a bundle already there is replaced."""
    with whole(target) as staging:
        shutil.copytree(bundle, staging)
        for file in staging.glob("*.safetensors"):
            tensors = load_file(bundle / file.name)
            floats = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
            if lost := [name for name, t in floats.items() if not torch.isfinite(t).all()]:
                raise ValueError(f"{bundle / file.name}: {lost[0]} holds numbers beyond half precision")
            save_file(floats, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    for name in TRAINED:
        if (run / name).is_dir():
            ship(run / name, TINY / Path(name).name)
            print(f"{run / name} -> {TINY / Path(name).name}")


if __name__ == "__main__":
    main()
