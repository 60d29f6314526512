"""Models published in a wrapper with a vision tower (Qwen3.5): the text part is trained, the result is the whole again.

Such a folder holds the tensors of its text part (`model.language_model.*`, `lm_head.weight`) among those of the vision
tower and of layers that guess further tokens (MTP), and a config with a part for each. transformers' text model reads
its part and saves it under the same names. Here that is completed from the folder it came from, so that what takes the
published folder takes the result.
"""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.utils import (
    CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    VIDEO_PROCESSOR_NAME,
)

from mechanisms.errors import UserError, first_line

TEXT = "model.language_model.", "lm_head."  # what the names of the text part's tensors begin with
FORMAT = {"format": "pt"}  # in the files' metadata: some programs refuse a file without it
HEAD = "lm_head.weight"  # not in the files where it is the embedding
# In a config, and not settings of the model.
OF_A_FOLDER = {"architectures", "model_type", "transformers_version", "_name_or_path"}


class Wrapper:
    """The published folder around a text part.

    Attributes:
        folder: where it is; for a name on the Hub, where its files were loaded to.
        config: the whole model's.
        text: names of the text part's tensors.
        others: {file: [names of the other tensors in it]}, of files that have some.
        size: bytes of these.

    Raises UserError if its files cannot be read.
    """

    def __init__(self, path, cache_dir=None):
        folder = path if os.path.isdir(path) else snapshot_download(
            path, cache_dir=cache_dir, allow_patterns=["*.json", "*.safetensors"])
        self.folder, self.config = folder, AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self.text, self.others, self.size = set(), {}, 0
        try:
            with reading(folder) as tensors:
                for name, tensor in tensors.items():
                    if name.startswith(TEXT):
                        self.text.add(name)
                    else:
                        self.others.setdefault(tensor.file, []).append(name)
                        self.size += tensor.read().nbytes
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"the weights in {folder} cannot be read: {first_line(error)}. They are needed as "
                            ".safetensors files: the vision tower in them goes into the result. Without it, the text "
                            "part alone: --text_only") from error

    def complete(self, folder):
        """Make the text part that was saved in `folder` the whole model.

        A kill leaves a folder that is no model: give it its name afterwards. Raises OSError, SafetensorError.
        """
        with reading(folder) as tensors:
            wrong = sorted((tensors.keys() ^ self.text) - {HEAD})
        if wrong:
            raise OSError(f"the trained tensors are not those of the text part in {self.folder}: {wrong[0]} is in one "
                          "of them alone. --text_only saves the text part as it is")
        written = weight_files(folder)
        for file in written:
            self._widen(os.path.join(folder, file))
        for number, (file, names) in enumerate(self.others.items()):
            written.append(f"other-{number}.safetensors")
            with safe_open(os.path.join(self.folder, file), "pt") as tensors:
                save_file({name: tensors.get_tensor(name) for name in names}, os.path.join(folder, written[-1]), FORMAT)
        index, size = {}, 0
        for number, file in enumerate(written, 1):
            path = os.path.join(folder, f"model-{number:05d}-of-{len(written):05d}.safetensors")
            os.replace(os.path.join(folder, file), path)
            with safe_open(path, "pt") as tensors:
                for name in tensors.keys():
                    index[name], size = os.path.basename(path), size + tensors.get_tensor(name).nbytes
        write_json(os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME),
                   {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))})
        self._complete_config(folder)
        for name in (IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, PROCESSOR_NAME):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(os.path.join(self.folder, name), os.path.join(folder, name))

    def _widen(self, path):
        """Some tensors are published in a wider type than the model's (A_log in fp32). They keep it, and their bytes
        if nothing but rounding has changed them."""
        usual, wide = self.config.get_text_config().dtype, {}
        with reading(self.folder) as published, safe_open(path, "pt") as tensors:
            saved = {name: tensors.get_tensor(name) for name in tensors.keys()}
            for name in saved.keys() & self.text:
                before, now = published[name].read(), saved[name]
                if usual and before.dtype.itemsize > max(usual.itemsize, now.dtype.itemsize):
                    wide[name] = before if torch.equal(before.to(now.dtype), now) else now.to(before.dtype)
            if wide:
                save_file({**saved, **wide}, f"{path}.wide", FORMAT)
                os.replace(f"{path}.wide", path)

    def _complete_config(self, folder):
        """The published config, with what is other in the config that was saved."""
        path, saved = os.path.join(folder, CONFIG_NAME), AutoConfig.from_pretrained(folder).to_dict()
        with open(os.path.join(self.folder, CONFIG_NAME), encoding="utf-8") as file:
            config = json.load(file)
        changed, of_all = ({name: saved[name] for name, value in part.to_dict().items()
                            if name not in OF_A_FOLDER and name in saved and saved[name] != value}
                           for part in (self.config.get_text_config(), self.config))
        config.update({name: value for name, value in of_all.items() if name in config})
        config["text_config"].update(changed)
        write_json(path, config)

    def differences(self, folder):
        """What in a completed folder, but for the text part, is not as it was published, as a list of names."""
        with reading(self.folder) as published, reading(folder) as tensors:
            return sorted(name for name in (published.keys() | tensors.keys()) - self.text - {HEAD}
                          if name not in published or name not in tensors
                          or not same_bytes(published[name].read(), tensors[name].read()))


def is_wrapped(path, cache_dir=None):
    """Whether the model at `path`, a folder or a name on the Hub, is the text part of a larger one."""
    config = AutoConfig.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=False)
    return config.get_text_config() is not config


def check_text_only(path, cache_dir=None):
    """Raises UserError for a model of which --text_only would leave out nothing."""
    if not is_wrapped(path, cache_dir):
        raise UserError(f"--text_only: {path} is a text model, there is nothing to leave out of it")


def weight_files(folder):
    """Names of the files that the weights in a folder are in. Raises OSError, ValueError."""
    index = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
    if not os.path.isfile(index):
        return [SAFE_WEIGHTS_NAME]
    with open(index, encoding="utf-8") as file:
        return sorted(set(json.load(file)["weight_map"].values()))


class Stored(NamedTuple):
    """A tensor in a file; `read` maps it into memory."""

    file: str
    read: Callable


@contextlib.contextmanager
def reading(folder):
    """{name: Stored} of the weights in a folder, as long as it is open. Raises OSError, ValueError, SafetensorError."""
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(os.path.join(folder, file), "pt"))
                  for file in weight_files(folder)}
        yield {name: Stored(file, functools.partial(tensors.get_tensor, name))
               for file, tensors in opened.items() for name in tensors.keys()}


def same_bytes(one, other):
    """Whether two tensors are the same to the bit, of one type and shape."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
