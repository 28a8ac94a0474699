"""Rerun the claims of LLM-QAT, QLoRA and L4Q on your own model, with intervals."""

import logging
import warnings

# transformers imports torchao and bitsandbytes where they are, which report kernels that this machine cannot load.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are text, in notebooks too
