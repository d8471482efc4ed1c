"""The neural parts: the masked X-CLIP encoder, the connectors, and the GIF question answering model."""

import logging

# On import bitsandbytes looks for a CPU kernel on the hub and warns when the package `kernels` is absent. That kernel
# is lossy and not wanted.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
