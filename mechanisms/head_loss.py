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
    return 1 << 27 if device_type == "cpu" else 1 << 30


class SummedCrossEntropy(torch.autograd.Function):
    """cross_entropy(hidden @ weight.T + bias, targets, reduction="sum", label_smoothing=smoothing).

    Shapes: hidden (n, hidden size), weight (vocabulary, hidden size), bias (vocabulary) or None, targets (n) int64,
    rows (k) int64 or None and values (k, hidden size): rows of the weight and what stands there instead. The result is
    a scalar in fp32. Matrices are multiplied in the precision of autocast, or else of `hidden`; sums are kept in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, values, targets, smoothing):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        needs_hidden, needs_weight, needs_bias, _, needs_values = ctx.needs_input_grad[:5]
        loss = torch.zeros((), device=hidden.device)
        grads = [torch.empty_like(hidden) if needs_hidden else None,
                 torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None,
                 torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None, None,
                 torch.zeros_like(values, dtype=torch.float32) if needs_values else None, None, None]
        grad_hidden, grad_weight, grad_bias, _, grad_values, *_ = grads
        with torch.autocast(device, enabled=False):
            weight, values = weight.to(dtype), None if values is None else values.to(dtype)
            step = max(1, chunk_bytes(device) // (4 * len(weight)))
            for start in range(0, len(hidden), step):
                states, wanted = hidden[start:start + step].to(dtype), targets[start:start + step, None]
                logits = states @ weight.T
                if values is not None:
                    logits[:, rows] = states @ values.T
                logits = logits.float()
                if bias is not None:
                    logits += bias
                normalizer = logits.logsumexp(-1, keepdim=True)
                loss += (normalizer - (1 - smoothing) * logits.gather(1, wanted)).sum()
                if smoothing:
                    loss -= smoothing * logits.mean(-1).sum()
                if not any(ctx.needs_input_grad):
                    continue
                error = logits.sub_(normalizer).exp_()  # the gradient of the logits: probabilities ...
                error.scatter_add_(1, wanted, torch.full_like(normalizer, smoothing - 1))  # ... less what was wanted
                if smoothing:
                    error -= smoothing / len(weight)
                if needs_bias:
                    grad_bias += error.sum(0)
                error = error.to(dtype)
                if values is not None:
                    of_rows = error[:, rows]
                    error[:, rows] = 0
                    if needs_values:
                        grad_values += (of_rows.T @ states).float()
                if needs_hidden:
                    grad_hidden[start:start + step] = error @ weight
                    if values is not None:
                        grad_hidden[start:start + step] += of_rows @ values
                if needs_weight:
                    if dtype == torch.float32:
                        grad_weight.addmm_(error.T, states)
                    else:
                        grad_weight += error.T @ states
        ctx.grads = grads
        return loss

    @staticmethod
    def backward(ctx, scale):
        # fp16: the gradients above are those of the unscaled sum, well inside its range; the scale comes only here.
        return tuple(None if grad is None else grad * scale for grad in ctx.grads)


def output_linear(model):
    """(the module whose forward is the output layer, the module with its weight), or None if it is no plain Linear."""
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft: an output layer that is trained
        head = head.modules_to_save[head.active_adapters[0]]
    elif hasattr(head, "token_adapter"):  # peft: of which some rows are trained
        return head.token_adapter, head.token_adapter.base_layer
    return (head, head) if type(head) is torch.nn.Linear else None


class HeadLoss:
    """Takes over the output layer of `model` while `computing` a loss; does nothing the rest of the time.

    The model must be given `logits_to_keep`, the labelled positions, and `shift_labels`, the target of each: what
    `finetune.EndToEnd` makes of a batch.

    """

    def __init__(self, model, label_smoothing=0.0):
        head, self.linear = output_linear(model)
        self.tokens = None if head is self.linear else head
        self.smoothing, self.targets = label_smoothing, None
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
                                        self.targets.flatten(), self.smoothing)

    @contextlib.contextmanager
    def computing(self, targets):
        """While the model is called once on the batch that has these targets, int64 (1, n)."""
        self.targets, self.model.loss_function = targets, mean
        try:
            yield
        finally:
            self.targets = None
            del self.model._loss_function


def mean(logits, labels, shift_labels, num_items_in_batch=None, **_):
    """In place of transformers' loss function: `logits` are the summed loss already."""
    return logits / (max(1, shift_labels.numel()) if num_items_in_batch is None else num_items_in_batch)
