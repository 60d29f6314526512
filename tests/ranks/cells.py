"""Run by torchrun: several fine-tunings one after the other in the same processes, so that the imports are paid once.

    torchrun --nproc_per_node 2 tests/ranks/cells.py cells.json results.json

cells.json: {name: {"argv": arguments of finetune.py, "remove": folders to delete first}}. results.json, written
by rank 0: {name: {"log": Trainer's log history, "wrapped": class of the wrapped model, "held" and "counted": bytes of
weights and optimizer as they are, and as `mechanisms.memory` counts them, "together": batches of a pass} or
{"error": message}}.
"""

import gc
import json
import os
import shutil
import sys
import traceback

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import finetune  # noqa: E402
from mechanisms import memory, strategies  # noqa: E402
from mechanisms.errors import UserError  # noqa: E402
from mechanisms.flags import prepare_command_line  # noqa: E402


def held_bytes(trainer):
    """Of (weights, optimizer) on this rank. DeepSpeed's optimizer has flat copies of what is trained."""
    weights = [getattr(each, "ds_tensor", each) for each in trainer.model.parameters()]
    weights += [part.absmax for each in weights if hasattr(each, "quant_state")
                for part in (each.quant_state, each.quant_state.state2)]
    optimizer = trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else trainer.optimizer.optimizer
    copies = getattr(optimizer, "fp32_partitioned_groups_flat", []) or getattr(
        optimizer, "single_partition_of_fp32_groups", [])
    states = (optimizer.optimizer if trainer.is_deepspeed_enabled else optimizer).state.values()
    optimizer = [*copies, *(copy.grad for copy in copies), *(part for state in states for part in state.values())]
    return [sum(each.nbytes for each in tensors if torch.is_tensor(each)) for tensors in (weights, optimizer)]


def counted_bytes(trainer):
    adapters = getattr(trainer.model, "peft_config", {})
    quantized = getattr(trainer.model, "is_loaded_in_4bit", False)
    setup = strategies.memory_setup(trainer.model.config, adapters.get("default"), quantized, trainer.args)
    state = memory.training_state(setup)
    return [state.weights, state.optimizer]


with open(sys.argv[1], encoding="utf-8") as file:
    cells = json.load(file)
results = {}
for name, cell in cells.items():
    for folder in cell.get("remove", []):
        shutil.rmtree(folder, ignore_errors=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    try:
        trainer = finetune.train(prepare_command_line(finetune.__file__, cell["argv"]))
        results[name] = {"log": trainer.state.log_history, "wrapped": type(trainer.model_wrapped).__name__,
                         "held": held_bytes(trainer), "counted": counted_bytes(trainer),
                         "together": trainer.together}
        del trainer
    except UserError as error:
        results[name] = {"error": str(error)}
    except Exception:
        results[name] = {"error": traceback.format_exc()}
    gc.collect()
    if os.environ.get("RANK", "0") == "0":
        with open(sys.argv[2], "w", encoding="utf-8") as file:
            json.dump(results, file)
strategies.leave_ranks()
