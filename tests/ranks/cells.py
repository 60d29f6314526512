"""Run by torchrun: several fine-tunings one after the other in the same processes, so that the imports are paid once.

    torchrun --nproc_per_node 2 tests/ranks/cells.py cells.json results.json

cells.json: {name: {"argv": arguments of finetune.py, "remove": folders to delete first}}. results.json, written
by rank 0: {name: {"log": Trainer's log history} or {"error": message}}.
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
from mechanisms import strategies  # noqa: E402
from mechanisms.errors import UserError  # noqa: E402
from mechanisms.flags import prepare_command_line  # noqa: E402

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
        results[name] = {"log": trainer.state.log_history, "wrapped": type(trainer.model_wrapped).__name__}
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
