"""GPTQ models, by GPTQModel: everything that must be said to that library before it does what is wanted.

Nothing else names its settings, kernels, loggers or files. Each workaround can go when gptqmodel no longer needs it.
"""

import contextlib
import functools
import io
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import torch

GROUP_SIZES = 16, 32, 64, 128, 256, 512, 1024  # that its kernels know, beside -1: one group for a whole row


def is_gptq(config):
    """Whether a model with this config has weights quantized with GPTQ."""
    return _settings(config).get("quant_method") == "gptq"


def _settings(config):
    settings = getattr(config, "quantization_config", None) or {}
    return settings if isinstance(settings, dict) else vars(settings)


@functools.cache
def import_gptqmodel():
    """The module gptqmodel, imported without what it does beside: to be called before a GPTQ model is loaded or made.

    It imports on two cores, prints no banner, leaves the root logger and Hugging Face's folders as they are, and
    compiles nothing on a CPU: its packing takes minutes of g++ to win one second per 16 million weights, its unpacking
    longer in every process than it saves, and both end with a traceback where g++ is missing.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    logging.getLogger("logbar").disabled = True  # a page of settings
    logging.getLogger("tokenicer").setLevel(logging.ERROR)
    # Loading its models, optimum asks the inner network for every attribute, one of which then wonders; and a map of a
    # single device is left on the model, which Trainer takes for several.
    for logger, words in (("transformers.modeling_utils", "`loss_type=None` was set"),
                          ("transformers.trainer", "The model is already on multiple devices")):
        logging.getLogger(logger).addFilter(lambda record, words=words: words not in record.getMessage())
    # Its tokenizer library sends every INFO line of every library to stderr if the root logger has no handler, and
    # moves the folders of Hugging Face below /tmp for whatever reads the environment later.
    root, environment = logging.getLogger(), set(os.environ)
    root.addHandler(logging.lastResort)  # the one that Python uses where there is none
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import gptqmodel
            from gptqmodel.nn_modules.qlinear import torch as kernel
    finally:
        root.removeHandler(logging.lastResort)
        for name in set(os.environ) - environment:
            if name.startswith(("HF_", "TRANSFORMERS_")):
                del os.environ[name]
    if not torch.accelerator.is_available():
        kernel.torch_compile = lambda function, **_: function
    return gptqmodel


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


# What stands as "backend" in the quantization config of a model that is trained. Left to itself, gptqmodel takes the
# fastest kernel, and gradients end there without a word: Marlin's on a GPU, on a CPU that for inference, for ever, as
# soon as the model is evaluated before it is trained. Its "auto_trainable" ends at this one too, after it has compiled
# two for inference, in every process, without a word.
TRAINABLE_BACKEND = "gptq_torch"


def name_backend(config):
    """Say in a GPTQ model's config which kernel answers on a GPU, if nothing does: that of Triton, where it can.

    Left to itself, gptqmodel compiles those that it would like better first, for minutes, without a word.
    """
    settings = config.quantization_config
    settings.setdefault("backend", "gptq_triton" if settings["bits"] in (2, 4, 8) else "gptq_torch")


def portable_backend(group_size):
    """What stands as "backend" in the config of a folder, or None: on a CPU gptqmodel takes a kernel that fails with
    group sizes other than these (published models have 128)."""
    return None if group_size in (32, 64, 128, 256) else "gptq_torch"


def packed_weights(model):
    """Number of weights in GPTQ layers: they are packed into buffers, which are no parameters."""
    layers = [module for module in model.modules() if "qweight" in dict(module.named_buffers(recurse=False))]
    return sum(layer.in_features * layer.out_features + (0 if layer.bias is None else layer.bias.numel())
               for layer in layers)


def packed_bytes(config, linear):
    """Bytes that the weight of a linear layer takes in a GPTQ model with this config.

    That is the weight itself, for each group a zero point of as many bits and a scale in fp16, and for each input the
    number of its group.
    """
    settings, (outputs, inputs) = _settings(config), linear.weight.shape
    groups = 1 if settings["group_size"] == -1 else inputs / settings["group_size"]
    return outputs * (inputs + groups) * settings["bits"] / 8 + 2 * outputs * groups + 4 * inputs


def quantize(path, folder, samples, layer_done, bits, group_size, desc_act):
    """Quantize the model at `path` and write weights and config into `folder`, and nothing that says where.

    Args:
        samples: what it is calibrated on, with their `input_ids`.
        layer_done: called with the number of layers that are finished, after each.
        bits, group_size, desc_act: see `run_gptq.QuantizeArguments`.
    """
    gptqmodel = import_gptqmodel()
    from gptqmodel.looper import loop_processor
    from gptqmodel.utils import logger

    logger._suppress_live_renderables = lambda: True  # a dozen nested bars
    scratch = os.path.join(folder, "scratch")  # beside the result: the system's folder may be small
    loop_processor._PROJECT_LOG_DIR = Path(scratch)  # else a folder `logs` wherever the user happens to be
    model = gptqmodel.GPTQModel.load(path, gptqmodel.QuantizeConfig(
        bits=bits, group_size=group_size, desc_act=desc_act, act_group_aware=not desc_act, sym=True,
        damp_percent=0.01, offload_to_disk_path=scratch))
    model.layer_callback = _LayerCallback(layer_done)
    model.quantize([{"input_ids": sample.input_ids, "attention_mask": [1] * len(sample.input_ids)}
                    for sample in samples], batch_size=1, calibration_data_min_length=1)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the config
        model.save(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    Path(folder, "quant_log.csv").unlink(missing_ok=True)
    for name in ("config.json", "quantize_config.json"):
        file = Path(folder, name)
        settings = json.loads(file.read_text(encoding="utf-8"))
        del settings.get("quantization_config", settings)["meta"]["offload_to_disk_path"]
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


class _LayerCallback:
    def __init__(self, layer_done):
        self.layer_done, self.finished = layer_done, 0

    def layer_complete(self, layer_idx, submodule_finalized):
        if layer_idx >= self.finished:  # each is reported twice: rounded, and packed
            self.finished = layer_idx + 1
            self.layer_done(self.finished)
