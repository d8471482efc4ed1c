"""The neural parts: the masked X-CLIP encoder, the connectors, the GIF question answering model, and ADEM-VL."""

import logging
import warnings

from huggingface_hub.utils import enable_progress_bars
from transformers.utils.logging import disable_progress_bar

# On import bitsandbytes looks for a CPU kernel on the hub and warns when the package `kernels` is absent. That kernel
# is lossy and not wanted.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
disable_progress_bar()  # "Loading weights" takes a moment, and its bar stands at 0 % in a notebook that was saved
enable_progress_bars()  # downloads take long: the call above switches their bars off too
# peft asks transformers about checkpointing by a name that is on its way out; nobody here can mend that.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
