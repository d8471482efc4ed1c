"""The command line behind run_all.sh: tells which command is meant and hands over to it."""

import math
import subprocess
import sys
from collections.abc import Sequence

from helpers.config import ConfigError
from helpers.runner.commands import make_shapes, run_tests, score_file, show_quota, write_readme
from helpers.runner.kaggle import commands as kaggle
from helpers.runner.outcome import FAILED, INTERRUPTED, REFUSED, Failed, fault_of
from helpers.runner.plan import make_plan, parse_deadline, run_parser
from helpers.runner.run import run
from helpers.stage.suite import StageError
from helpers.workspace.place import repo_root


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        match argv[:1]:
            case ["test"]:
                return run_tests(argv[1:])
            case ["bench"]:
                return subprocess.run([sys.executable, "-m", "tests.benchmarks", *argv[1:]], cwd=repo_root()).returncode
            case ["quota"]:
                return show_quota(argv[1:])
            case ["score"]:
                return score_file(argv[1:])
            case ["make-shapes"]:
                return make_shapes(argv[1:])
            case ["kaggle"]:
                return kaggle.main(argv[1:])
            case ["readme"]:
                return write_readme(argv[1:])
        args = run_parser().parse_args(argv)
        deadline = parse_deadline(args.deadline) if args.deadline else math.inf
        return run(make_plan(args, argv), deadline)
    except (ConfigError, StageError) as error:
        print(f"Refused: {error}", file=sys.stderr)
        return REFUSED
    except OSError as error:  # DiskFull too; what happens once a kernel has started is a Failed
        print(f"Refused: {fault_of(error)}", file=sys.stderr)
        return REFUSED
    except Failed as error:
        print(f"Failed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
