"""How a run ends: the exit codes, and the errors that lead to them."""

DONE, FAILED, REFUSED, PAUSED, INTERRUPTED = 0, 1, 2, 75, 130
EXIT_CODES = """exit codes:
  0    done: every stage asked for is complete
  1    a notebook failed; its name, cell and error are printed. A kernel that died (often: out of memory) counts too
  2    refused before the stage's kernel started: bad usage, parameter or profile; another run at work in the
       same workspace; a stage finished with other settings; an upstream stage missing; too little disk
  75   paused: a deadline passed, too few GPU-hours are left, or an upstream stage is only partly done; the command
       that goes on is printed
  130  interrupted by Ctrl-C; the same command goes on"""


class Failed(RuntimeError):
    """A notebook that did not finish its stage."""


class Paused(RuntimeError):
    """A notebook that stopped at the deadline; what it has done is kept."""
