"""Warnings of libraries that mean nothing to the user, silenced at their cause.

Everything here names its reason and when it can go.
"""

import logging
import os
import re
import sys
import warnings


def silence():
    """For programs, before they import anything heavy: some of it is read at import.

    Changes environment variables, loggers and warning filters of this process.
    """
    # torchao comes with gptqmodel and is imported by transformers; nothing here uses it. Its compiled parts do not load
    # without CUDA and it says so at every start, and its enums trip a deprecation warning of torch. Can go when
    # transformers imports torchao only where it is used.
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

    # DeepSpeed announces on every import that it has found no GPU, and Trainer imports it. Naming the
    # accelerator keeps it from looking.
    if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").addFilter(  # where there is one, and CUDA_VISIBLE_DEVICES hides it
        lambda record: "Setting accelerator to CPU" not in record.getMessage())

    # huggingface_hub says two lines for each of up to a dozen tries to reach a hub that is not there.
    logging.getLogger("huggingface_hub.utils._http").addFilter(_one_line_of_retries())

    # On CPUs with bfloat16 instructions bitsandbytes remarks that it has not found a package with other kernels.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

    # Bars that redraw themselves fill a log file with fragments.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    # peft asks the model under the name it had before transformers 5.23. Can go with the next peft.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

    # DeepSpeed calls collectives under their old names. Can go when it has moved on.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)

    # Trainer leaves gradient accumulation to DeepSpeed, and accelerate remarks on it in every run.
    logging.getLogger("accelerate.accelerator").addFilter(
        lambda record: "Gradient accumulation steps mismatch" not in record.getMessage())


def _one_line_of_retries():
    """A logging filter: of all tries to reach a hub the first one is told, by the first rank."""
    told = int(os.environ.get("RANK", 0)) > 0

    def passes(record):
        nonlocal told
        text = record.getMessage()
        if not ("thrown while requesting" in text or "Retrying in" in text):
            return True
        if told:
            return False
        told = True
        hub = re.search(r"https?://[^/\s]+|$", text)[0] or "the hub"
        record.msg, record.args = f"note: no answer from {hub}: trying again for a minute", ()
        return True

    return passes
