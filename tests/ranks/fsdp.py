"""Run by torchrun: the loss and gradients of a model under FSDP, of each version, beside those of the whole model.

    torchrun --nproc_per_node 2 tests/ranks/fsdp.py MODEL results.json
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from mechanisms.quiet import silence

if __name__ == "__main__":  # before torch: some of it is read when that is imported
    silence()

# isort: split
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModelForCausalLM

from bench.worker import padded
from finetune import PaddingFreeCollator
from mechanisms.attention import WITHIN_SAMPLES
from mechanisms.head_loss import HeadLoss
from tests.unit.test_batches import make_samples


def load(attention):
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation=attention, dtype=torch.float32)


dist.init_process_group("gloo")
samples, results = make_samples([5, 9, 7, 3], seed=dist.get_rank()), {}
reference = load("eager")
expected = reference(**padded(samples)).loss
expected.backward()
gradients = {}
for name, parameter in reference.named_parameters():
    dist.all_reduce(parameter.grad)  # FSDP's gradients are the mean of all ranks
    gradients[name] = parameter.grad / dist.get_world_size()

for version in (1, 2):
    model, batch = load(WITHIN_SAMPLES), PaddingFreeCollator()(samples)
    whole = sum(parameter.numel() for parameter in model.parameters())
    head = HeadLoss(model)
    if version == 1:
        wrapped = FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy({type(model.model.layers[0])}),
                                           use_orig_params=True, device_id=torch.device("cpu"))
        here = sum(parameter.numel() for parameter in model.parameters())
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)
        here = sum(parameter.to_local().numel() for parameter in model.parameters())
    with head.computing(batch["shift_labels"]):
        loss = wrapped(**batch).loss
    loss.backward()
    if version == 1:
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            found = {name.replace("_fsdp_wrapped_module.", ""): parameter.grad.clone()
                     for name, parameter in model.named_parameters()}
    else:
        found = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    assert found.keys() == gradients.keys()
    results[version] = {
        "share of the weights here": here / whole, "loss": loss.item(), "expected": expected.item(),
        "furthest gradient": max(((found[name] - gradients[name]).norm() / gradients[name].norm()).item()
                                 for name in gradients)}
if dist.get_rank() == 0:
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(results, file)
dist.destroy_process_group()
# FSDP's objects keep connections of their own, which end with the interpreter, and that has aborted over it (once in
# some hundred runs): it does not wind down here.
os._exit(0)
