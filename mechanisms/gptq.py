"""GPTQ models, by GPTQModel: everything that must be said to that library before it does what is wanted."""

import contextlib
import io
import logging
import os
import sys


@contextlib.contextmanager
def gptqmodel_hidden(hidden):
    """While peft wraps a model that is not GPTQ: it would import gptqmodel to see whether a layer is one of its own.

    That costs seconds, prints a banner and sets CUDA's environment. Can go when peft looks at sys.modules first.
    """
    if not hidden:
        yield
        return
    from peft.import_utils import is_gptqmodel_available

    imported = sys.modules.get("gptqmodel")
    sys.modules["gptqmodel"] = None  # as if it were not installed
    is_gptqmodel_available.cache_clear()
    try:
        yield
    finally:
        del sys.modules["gptqmodel"]
        if imported is not None:
            sys.modules["gptqmodel"] = imported
        is_gptqmodel_available.cache_clear()


def import_gptqmodel():
    """Import gptqmodel without its banner, and without a compiler for models on a CPU.

    There it would compile the unpacking of weights in every process, which takes longer than it saves, and ends with a
    traceback where g++ is missing. Can go when gptqmodel makes that optional.
    """
    import torch

    # It does not import on a machine with two cores unless it is told that they are enough.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    # It would compile its packing for minutes (with g++) to win one second per 16 million weights.
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    # It prints a page of settings through this logger, and its tokenizer library sends every INFO line of every library
    # to stderr, unless the root logger has a handler: this is the one that Python uses where there is none.
    logging.getLogger("logbar").disabled = True
    logging.getLogger("tokenicer").setLevel(logging.ERROR)
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.lastResort)

    with contextlib.redirect_stdout(io.StringIO()):
        import gptqmodel
        from gptqmodel.nn_modules.qlinear import torch as kernel
    if not torch.accelerator.is_available():
        kernel.torch_compile = lambda function, **_: function
    return gptqmodel
