"""Linear attention (gated delta nets) inside each of the samples that lie end to end in one row.

Such a layer reads a row from left to right: a convolution over the last few tokens, then a state that carries all that
was read. Run over a row of samples, both carry one sample into the next. Here the layer itself stays as it is, and is
run on each sample, so that the result is exact with every combination of installed kernels.
"""

import importlib.util
import types

import torch

from mechanisms.errors import UserError

CHUNK = 64  # tokens that the layer computes at a time
LINEAR = "linear_attention"  # in a config's layer_types
WASTE = 1.25  # largest ratio of computed chunks, those of padding included, to those that a group of samples has


def keep_within_samples(model):
    """Let all linear attention layers of `model` keep the samples of a row apart.

    Raises UserError where the config names such layers and the network has none that is known.
    """
    layers = [module for module in model.modules() if type(module).__name__.endswith("GatedDeltaNet")]
    named = (getattr(model.config, "layer_types", None) or []).count(LINEAR)
    if len(layers) != named:
        raise UserError(f"the config names {named} layers of linear attention and the network has {len(layers)} that "
                        "are known here: samples of a row would not be kept apart. Use the transformers of "
                        "requirements.txt")
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)


def _forward(self, hidden_states, *args, cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None,
             **kwargs):
    """The forward of a layer, `self`, inside each sample.

    Args:
        hidden_states: (1, tokens, hidden size).
        cu_seq_lens_q: int32 (samples + 1), where each sample starts, and the end of the last. Without it, as in
            generation, this is the layer's own forward.
    """
    def layer(samples):
        return type(self).forward(self, samples, *args, **kwargs)

    if cu_seq_lens_q is None or len(cu_seq_lens_q) == 2:
        return layer(hidden_states)
    bounds = cu_seq_lens_q.tolist()
    if hidden_states.device.type == "cpu":
        return torch.cat([layer(hidden_states[:, start:end]) for start, end in zip(bounds, bounds[1:])], dim=1)
    return in_groups(layer, hidden_states, bounds)


def in_groups(layer, hidden_states, bounds):
    """layer(each sample), (1, tokens, hidden size): samples of like length at a time, for a GPU has few launches then.

    They are padded on the right with their own last token, which a layer that reads from the left does not notice.
    """
    row = hidden_states[0]
    lengths = [end - start for start, end in zip(bounds, bounds[1:])]
    outputs, places = [], []
    for group in groups_of(lengths):
        starts, ends = (torch.tensor([bounds[index + after] for index in group], device=row.device)[:, None]
                        for after in (0, 1))
        index = starts + torch.arange(max(lengths[sample] for sample in group), device=row.device)
        outputs.append(layer(row[torch.minimum(index, ends - 1)])[index < ends])
        places.append(index[index < ends])
    outputs = torch.cat(outputs)
    return torch.empty_like(outputs).index_copy(0, torch.cat(places), outputs)[None]


def groups_of(lengths):
    """Samples with these lengths -> lists of their numbers; see WASTE."""
    chunks = [-(-length // CHUNK) for length in lengths]
    groups = []
    for sample in sorted(range(len(lengths)), key=lambda sample: -chunks[sample]):
        group = [*groups[-1], sample] if groups else [sample]
        if groups and len(group) * chunks[group[0]] <= WASTE * sum(chunks[member] for member in group):
            groups[-1] = group
        else:
            groups.append([sample])
    return groups


def kernel_note(config, device):
    """A line if the layers will run without their kernel, else ""."""
    if LINEAR not in (getattr(config, "layer_types", None) or []) or device.type != "cuda" \
            or importlib.util.find_spec("fla"):
        return ""
    return ("flash-linear-attention is not installed: linear attention runs without its kernel, about twice as slow. "
            "pip install -r requirements-gpu.txt")
