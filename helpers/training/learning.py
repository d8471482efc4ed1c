"""Whether a run learns at all: steps that the gradient scaler skips are counted, an adapter that stands still is told.

In half precision a scaler multiplies the loss, and leaves a step out when a gradient overflows. Where all of them do,
the loss is finite, the steps are counted, and nothing is learnt: without a word, a night is lost.
"""

import math
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from helpers.training.collective import TrainingError

if TYPE_CHECKING:
    from helpers.training.engine import AdapterTrainer

# A scaler that starts at 65,536 and halves at each skip is down to 1 after 16 skips: more than half of this window is
# no search for a scale any longer.
WINDOW = 32


class LearningWatch(TrainerCallback):
    """Notes the scale of each step in the history, and raises TrainingError for a run that learns nothing.

    That is: more than half of the last `WINDOW` steps, all after the warm-up, were skipped; or at the end of training
    `adapter` (the optimizer's part; "": all parts) is what it was when this watch was made. It is called before
    anything is saved, so that such a run never has a last checkpoint, which would make it complete; and looks when the
    history was fetched from the device (`RunControl` does that before it), to spare a sync each step.
    """

    def __init__(self, trainer: "AdapterTrainer", warmup: float, adapter: str) -> None:
        self.trainer, self.recorder = trainer, trainer.recorder
        self.warm = math.ceil(warmup * len(trainer.plan))
        groups = trainer.optimizer.param_groups
        # a part without a learning rate was left as it is on purpose
        named = [g for g in groups if g["part"] == adapter and g["initial_lr"] > 0]
        self.what = f"of the part {adapter}" if named else "of the model"
        self.start = [(p, p.detach().cpu().clone()) for g in named or groups for p in g["params"]]
        self.one = torch.ones((), device=trainer.args.device)
        self.before = self.one

    def _scale(self) -> torch.Tensor:
        # get_scale() would wait for the device
        return self.trainer.accelerator.scaler.scale(self.one)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer.accelerator.scaler is not None:
            self.before = self._scale()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.accelerator.scaler is not None:
            self.recorder.add_scale(self.before, self._scale())

    def on_step_end(self, args, state, control, **kwargs):
        if not self.recorder.pending:
            self._require_steps()
        if state.global_step == len(self.trainer.plan):
            self._require_movement()

    def _require_steps(self) -> None:
        rows = self.recorder.rows[self.warm :][-WINDOW:]
        skipped = sum(row.get("skipped") == 1 for row in rows)
        if len(rows) == WINDOW and skipped > WINDOW / 2:
            raise TrainingError(
                f"{skipped} of the {WINDOW} steps up to step {rows[-1]['step']} were skipped: their gradients were not "
                f"finite in half precision; the loss scale is now {rows[-1]['scale']:g}. Nothing is learnt this way. "
                "Lower the learning rates, raise the warm-up, or take a GPU of compute capability 8.0 or more, which "
                f"computes in bfloat16; delete {self.trainer.folder / 'checkpoints'} to train anew."
            )

    def _require_movement(self) -> None:
        if any(not torch.equal(p.detach().cpu(), start) for p, start in self.start):
            return
        rows = self.recorder.rows
        rates = [value for row in rows for name, value in row.items() if name.startswith("lr_")]
        if not any(rate > 0 for rate in rates):  # a run so short that the warm-up's first rate, 0, was all of it
            return
        skipped = sum(row.get("skipped") == 1 for row in rows)
        raise TrainingError(
            f"after {len(rows)} steps no parameter {self.what} has moved from its start ({skipped} steps were skipped "
            "by the gradient scaler): nothing was learnt. Raise the learning rates or train for more steps; "
            f"delete {self.trainer.folder / 'checkpoints'} to train anew."
        )
