"""finetune.py with mechanisms.signals and mechanisms.stopping at work, as finetune.py and SafeTrainer use them."""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from mechanisms import signals  # noqa: E402

signals.install()

import datetime  # noqa: E402

import torch  # noqa: E402

import finetune  # noqa: E402
from mechanisms.flags import prepare_command_line  # noqa: E402
from mechanisms.stopping import SaveOnRequest  # noqa: E402

# Where there is no GPU, transformers does not pass --ddp_timeout on.
if "--ddp_timeout" in sys.argv:
    seconds = int(sys.argv[sys.argv.index("--ddp_timeout") + 1])
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))


class Trainer(finetune.SafeTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(SaveOnRequest)


finetune.SafeTrainer = Trainer
finetune.main(prepare_command_line(os.path.join(ROOT, "finetune.py"), sys.argv[1:]))
