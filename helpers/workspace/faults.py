"""Sets of packages and hardware that are known to fail, refused before they do."""

import os

from helpers.workspace.machine import package_versions


class KnownBad(RuntimeError):
    """A set of packages and hardware that is known to fail; the message names each fault with its remedy."""


def known_faults(versions: dict[str, str], capability: tuple[int, int] | None, architectures: list[str]) -> list[str]:
    """Return the faults that this set is known to fail with, each with its remedy.

    versions: of peft and torchao, "absent" where not installed. capability: the GPU's, None without one. architectures:
    what torch was built for, as `torch.cuda.get_arch_list` tells.
    """
    from packaging.version import Version  # not of the standard library

    faults = []
    peft, torchao = versions["peft"], versions["torchao"]
    if "absent" not in (peft, torchao) and Version(peft) >= Version("0.19") and Version(torchao) < Version("0.16"):
        faults.append(
            f"torchao {torchao} with peft {peft}: LoRA on any layer that is not 4-bit stops with an ImportError. "
            "Nothing here uses torchao: `pip uninstall -y torchao` before a notebook is started."
        )
    if capability is None:
        return faults
    major, minor = capability
    # sm_75 runs on 7.5 and on later minor versions of 7; compute_75 is compiled for any later GPU when it starts
    built = [(name.partition("_")[0], int(name.partition("_")[2].rstrip("af"))) for name in architectures]
    runs = any(arch <= 10 * major + minor and (kind == "compute" or arch // 10 == major) for kind, arch in built)
    if not runs:
        faults.append(
            f"This GPU has compute capability {major}.{minor} (a P100 has 6.0), and this torch has no code for it "
            f"({', '.join(architectures)}): the first operation would fail. Choose the accelerator GPU T4 x2."
        )
    if capability < (8, 0) and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        faults.append(
            f"ACCELERATE_MIXED_PRECISION=bf16 on compute capability {major}.{minor}: a T4 only emulates bfloat16, "
            "though torch calls it supported. Unset it: the suite uses float16 there."
        )
    return faults


def refuse_known_bad() -> str:
    """Raise KnownBad if this machine is known to fail, else return a sentence; a GPU must multiply two matrices."""
    import torch

    capability = torch.cuda.get_device_capability(0) if torch.cuda.is_available() else None
    faults = known_faults(package_versions(("peft", "torchao")), capability, torch.cuda.get_arch_list())
    if faults:
        raise KnownBad("\n".join(faults))
    if capability is None:
        return "No known fault; there is no GPU."
    identity = torch.eye(16, device="cuda")
    if not torch.equal(identity @ identity, identity):
        raise KnownBad("The GPU multiplied two matrices wrongly: end this session and take another machine.")
    return "No known fault; the GPU multiplies."
