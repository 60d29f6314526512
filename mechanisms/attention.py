"""Attention inside each of the samples that lie end to end in one row, without a mask.

transformers can do the same with a block-diagonal mask; that one is as large as the row is long, squared, and so is the
work. Here the work is that of the samples alone.
"""

import functools
import importlib.util
import inspect

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from mechanisms.console import say
from mechanisms.errors import first_line

WITHIN_SAMPLES = "within_samples"
VARLEN = "varlen"  # what that does on a GPU, for tensors without content, which are on no device


def within_samples(module, query, key, value, attention_mask, scaling=None, dropout=0.0, cu_seq_lens_q=None,
                   max_length_q=None, sliding_window=None, **kwargs):
    """Causal attention of a row of samples, as transformers calls it.

    Args:
        query: (1, heads, tokens, head size); key and value may have fewer heads (grouped-query attention).
        cu_seq_lens_q: int32 (samples + 1), where each sample starts, and the end of the last. Without it the row is one
            sequence, or several padded ones with a mask, as in generation: transformers' own attention is used.
        max_length_q: tokens of the longest sample.
        sliding_window: how many tokens back a token sees itself included; None is all.

    Returns ((1, tokens, heads, head size), None).
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      **kwargs)
    if sliding_window is not None and sliding_window >= max_length_q:
        sliding_window = None
    if has_flash_attention(query.device, _dtype(query)) and not dropout:
        return _varlen(query, key, value, scaling, cu_seq_lens_q, max_length_q, sliding_window), None
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    bounds, outputs = cu_seq_lens_q.tolist(), []
    for start, end in zip(bounds, bounds[1:]):
        band = None
        if sliding_window is not None:
            ones = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device)
            band = ones.tril().triu(1 - sliding_window)
        outputs.append(scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], attn_mask=band, dropout_p=dropout,
            is_causal=band is None, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _varlen(query, key, value, scaling, bounds, longest, sliding_window):
    """The same by the flash attention that comes with torch, for 16-bit numbers on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor[0].transpose(0, 1).to(_dtype(query)) for tensor in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    grouped = {"enable_gqa": True}
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11
        key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
        grouped = {}
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=window,
                       **grouped)[None]


def _dtype(tensor):
    """In which a tensor is computed with: autocast's, where that is on."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


@functools.cache
def has_flash_attention(device, dtype):
    """Whether flash attention runs on a torch.device in this dtype: in 16 bits, on NVIDIA's Ampere and later."""
    return device.type == "cuda" and dtype.itemsize == 2 and torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen_anywhere(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None,
                     sliding_window=None, **kwargs):
    return _varlen(query, key, value, scaling, cu_seq_lens_q, max_length_q, sliding_window), None


def _mask(*, attention_mask=None, q_length, kv_length, local_size=None, **kwargs):
    """None where `within_samples` needs none: a row without padding. Else, as in generation, what sdpa has."""
    if attention_mask is None and q_length == kv_length and local_size is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, q_length=q_length, kv_length=kv_length, local_size=local_size,
                     **kwargs)


AttentionInterface.register(WITHIN_SAMPLES, within_samples)
AttentionMaskInterface.register(WITHIN_SAMPLES, _mask)
AttentionInterface.register(VARLEN, _varlen_anywhere)
AttentionMaskInterface.register(VARLEN, _mask)


def best_attention(device, dtype):
    """The attn_implementation to train with on a torch.device: flash-attn's where it is installed and works there.

    dtype: that of the computation.
    """
    if device.type != "cuda" or not importlib.util.find_spec("flash_attn"):
        return WITHIN_SAMPLES
    if not has_flash_attention(device, dtype):
        reason = f"it computes in 16 bits on Ampere and later, not in {dtype} on {torch.cuda.get_device_name(device)}"
    else:
        reason = _why_not_importable()
    if reason:
        say(f"note: flash-attn is installed and not used: {reason}. torch's own attention is used")
        return WITHIN_SAMPLES
    return "flash_attention_2"


def _why_not_importable():
    """Such as for another torch than is here, or flash-attn 4, which has other functions. None: it is importable."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except (ImportError, OSError) as error:  # an undefined symbol is an ImportError, a missing library an OSError
        return first_line(error)
    if not is_flash_attn_2_available():
        return "transformers does not know its version"
    return None
