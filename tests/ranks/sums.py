"""Run by torchrun: what is left of small gradients that are added to a large one, under each DeepSpeed config.

    torchrun --nproc_per_node 2 tests/ranks/sums.py result.json CONFIG...

result.json, written by rank 0: {config: the sum of the gradients of one step that a weight was moved by}.
"""

import json
import os
import sys

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

BATCHES = 16

deepspeed.init_distributed("gloo")
results = {}
for name in sys.argv[2:]:
    with open(name, encoding="utf-8") as file:
        config = json.load(file)
    config |= {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": BATCHES,
               "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    for key in ("fp16", "train_batch_size"):
        del config[key]
    config["zero_optimization"] = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    model = torch.nn.Linear(256, 1, bias=False).bfloat16()
    torch.nn.init.zeros_(model.weight)
    engine, *_ = deepspeed.initialize(
        model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    for batch in range(BATCHES):
        # The gradient is the input: 256 once, then 0.5, which bf16 cannot add to 256.
        value = 256.0 if batch == 0 else 0.5
        engine.backward(engine(torch.full((1, 256), value, dtype=torch.bfloat16, device=engine.device)).sum())
        engine.step()
    results[name] = -safe_get_full_fp32_param(model.weight).mean().item() * BATCHES
if os.environ["RANK"] == "0":
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(results, file)
torch.distributed.destroy_process_group()
