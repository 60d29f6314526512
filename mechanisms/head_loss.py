"""The loss of a language model without its logits.

With Qwen's vocabulary of 151,936 words, the logits of 8,192 tokens take 5 GB in fp32 and their gradient as much again.
Here the output layer itself computes the loss, of the labelled positions only and a chunk of them at a time, and the
gradients along with it, so that a chunk's logits are gone before the next one's are there and nothing is computed
twice. It must happen inside the layer's own forward: only there are its weights whole under ZeRO-3 and FSDP.
"""

import contextlib
import types

import torch


def chunk_bytes(device_type):
    """Of fp32 logits that are held at a time: enough rows for a matrix product at full speed, and few for the cache."""
    return 1 << 28 if device_type == "cpu" else 1 << 30


class SummedCrossEntropy(torch.autograd.Function):
    """cross_entropy(hidden @ weight.T + bias, targets, reduction="sum", label_smoothing=smoothing).

    Shapes: hidden (n, hidden size), weight (vocabulary, hidden size), bias (vocabulary) or None, targets (n) int64,
    rows (k) int64 or None and values (k, hidden size): rows of the weight and what stands there instead. The result is
    a scalar in fp32. Matrices are multiplied in the precision of autocast, or else of `hidden`; sums are kept in fp32.
    each, (n) in fp32 or None, is filled with the cross entropy of each target, without smoothing.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, values, targets, smoothing, each=None):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        empty = torch.empty_like if len(hidden) else torch.zeros_like
        grad_hidden, grad_weight, grad_bias, _, grad_values = ctx.grads = [
            empty(tensor, dtype=torch.float32) if needed else None
            for tensor, needed in zip((hidden, weight, bias, rows, values), ctx.needs_input_grad)]
        loss = torch.zeros((), device=hidden.device)
        with torch.autocast(device, enabled=False):
            weight, values = weight.to(dtype), None if values is None else values.to(dtype)
            chunks = -(-len(hidden) * len(weight) * 4 // chunk_bytes(device))
            step = max(1, -(-len(hidden) // max(1, chunks)))
            buffer = torch.empty(step, len(weight), device=hidden.device)
            trains = any(ctx.needs_input_grad)
            errors = torch.empty_like(buffer, dtype=dtype) if trains and dtype != torch.float32 else buffer
            for start in range(0, len(hidden), step):
                chunk = slice(start, start + step)
                states, wanted = hidden[chunk].to(dtype), targets[chunk, None]
                logits = _product(states, weight.T, buffer[:len(states)])
                if values is not None:
                    logits[:, rows] = _product(states, values.T, logits.new_empty(len(states), len(values)))
                if bias is not None:
                    logits += bias
                log_probs = torch.log_softmax(logits, -1, out=logits)
                of_wanted = log_probs.gather(1, wanted)
                loss -= (1 - smoothing) * of_wanted.sum()
                if smoothing:
                    loss -= smoothing * log_probs.mean(-1).sum()
                if each is not None:
                    each[chunk] = -of_wanted[:, 0]
                if not trains:
                    continue
                # The gradient of the logits: probabilities less what was wanted, and each is rounded once.
                if smoothing:
                    error = errors[:len(states)].copy_(log_probs.exp_().sub_(smoothing / len(weight)))
                else:
                    error = torch.exp(log_probs, out=errors[:len(states)])
                share = 1 - smoothing + smoothing / len(weight)
                error.scatter_(1, wanted, (of_wanted.exp() - share).to(dtype))
                first = start == 0
                if grad_bias is not None:
                    of_bias = error.sum(0, dtype=torch.float32)
                    grad_bias.copy_(of_bias) if first else grad_bias.add_(of_bias)
                if values is not None:
                    of_rows = error[:, rows]
                    error[:, rows] = 0
                    if grad_values is not None:
                        _product(of_rows.T, states, grad_values, add=not first)
                if grad_hidden is not None:
                    _product(error, weight, grad_hidden[chunk])
                    if values is not None:
                        _product(of_rows, values, grad_hidden[chunk], add=True)
                if grad_weight is not None:
                    _product(error.T, states, grad_weight, add=not first)
        return loss

    @staticmethod
    def backward(ctx, scale):
        # fp16: the gradients are those of the unscaled sum, well inside its range; the scale comes only here.
        grads, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.mul_(scale) for grad in grads), None, None, None


def _product(left, right, out, add=False):
    """out (fp32) = left @ right, or out += left @ right; multiplied in their own precision. -> out"""
    if left.dtype == torch.float32:
        return torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
    if has_fp32_sums(left.device.type):
        exact = {"out_dtype": torch.float32, "out": out}
        return torch.addmm(out, left, right, **exact) if add else torch.mm(left, right, **exact)
    return out.add_(left @ right) if add else out.copy_(left @ right)


def has_fp32_sums(device_type):
    """Whether torch has matrix products of 16-bit numbers whose sums stay in fp32: on NVIDIA's GPUs.

    Nothing is rounded then and no copy made; in fp16, sums above 65,504 are no overflow.
    """
    return device_type == "cuda" and torch.version.hip is None


def output_linear(model):
    """(the module whose forward is the output layer, the module with its weight), or None if it is no plain Linear."""
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft: an output layer that is trained
        head = head.modules_to_save[head.active_adapters[0]]
    elif hasattr(head, "token_adapter"):  # peft: of which some rows are trained
        return head.token_adapter, head.token_adapter.base_layer
    return (head, head) if type(head) is torch.nn.Linear else None


def loss_bytes(model, tokens, compute, device_type):
    """The most that the loss of `tokens` labelled tokens takes beside the model and its output.

    Args:
        model: whose weights need no content.
        compute: dtype that matrices are multiplied in.
    """
    found = output_linear(model)
    if not found:  # logits, probabilities and gradient, all of them at once
        return 3 * 4 * tokens * model.config.vocab_size
    weight = found[1].weight
    # A chunk of logits; in 16 bits their gradients stand beside it, and products that are copied.
    rounded = 0 if compute == torch.float32 or has_fp32_sums(device_type) else compute.itemsize
    beside = rounded + (0 if compute == torch.float32 else compute.itemsize)
    total = min(4 * tokens * len(weight), chunk_bytes(device_type)) * (1 + beside / 4)
    total += 4 * tokens * weight.shape[1]  # gradient of the output
    if weight.requires_grad:  # its gradient, and a chunk's product that is added to it
        total += weight.numel() * (4 + rounded)
    return total + (0 if weight.dtype == compute else weight.numel() * compute.itemsize)


class HeadLoss:
    """Takes over the output layer of `model` while `computing` a loss; does nothing the rest of the time.

    The model must be given `logits_to_keep`, the labelled positions, and `shift_labels`, the target of each: what
    `finetune.PaddingFreeCollator` makes of a batch.

    """

    def __init__(self, model, label_smoothing=0.0):
        head, self.linear = output_linear(model)
        self.tokens = None if head is self.linear else head
        self.smoothing, self.targets, self.each = label_smoothing, None, None
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        plain = head.forward

        def forward(_, hidden):
            return plain(hidden) if self.targets is None else self.summed(hidden)

        head.forward = types.MethodType(forward, head)

    def summed(self, hidden):
        """hidden (1, n, hidden size) -> loss summed over the n targets."""
        rows = values = None
        if self.tokens is not None:
            name = self.tokens.active_adapters[0]
            rows = torch.tensor(self.tokens.token_indices[name], device=hidden.device)
            values = self.tokens.trainable_tokens_delta[name]
        return SummedCrossEntropy.apply(hidden.flatten(0, 1), self.linear.weight, self.linear.bias, rows, values,
                                        self.targets.flatten(), self.smoothing, self.each)

    @contextlib.contextmanager
    def computing(self, targets, each=None):
        """While the model is called once on the batch that has these targets, int64 (1, n).

        each: (n) in fp32, filled with their losses, or None.
        """
        self.targets, self.each, self.model.loss_function = targets, each, mean
        try:
            yield
        finally:
            self.targets = self.each = None
            del self.model._loss_function


def mean(logits, labels, vocab_size, *, shift_labels, num_items_in_batch=None, **_):
    """In place of transformers' loss function: `logits` are the summed loss already."""
    return logits / (max(1, shift_labels.numel()) if num_items_in_batch is None else num_items_in_batch)


def smoothed(smoothing, logits, labels, vocab_size, *, shift_labels, num_items_in_batch=None, **_):
    """In place of transformers' loss function where there is no `HeadLoss`: logits (1, n, vocabulary) -> the same loss.

    Trainer's own label smoother would shift the logits once more.
    """
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), shift_labels.flatten(), reduction="sum",
                                             label_smoothing=smoothing)
    return mean(loss, labels, vocab_size, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch)
