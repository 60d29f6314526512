"""Whether a run fits into the memory: decided before its weights are loaded; and what helps where it does not."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

from mechanisms import checkpoints, gptq, memory
from mechanisms.errors import UserError, first_line
from mechanisms.lora import empty_network, experts_of
from mechanisms.memory import Setup
from mechanisms.paths import checkpoints_in

MANY = 2, 4, 8, 16  # GPUs that are offered where one machine has too few
BREAK = "\n       "
FULL = 8192  # tokens of a row that keep a GPU busy
MORE_IN_EVALUATION = "more in evaluation"


class Plan(NamedTuple):
    """A run, as far as its memory goes.

    Args:
        setup: how the model is trained.
        checkpointing: --gradient_checkpointing; None: auto.
        items: samples (rows with --packing) of a batch.
        accumulation: batches of a step.
        longest: number of items -> tokens of the longest batch.
        certain: whether so long a batch will come; without lengths (--lazy_preprocess) it only may.
        limit: --memory_limit, in bytes; None: what is free.
        lora: gives peft's LoraConfig of --use_lora without other flags, for a run that trains all weights.
        frugal: `setup` with weights in bf16 (mechanisms/frugal.py), to be taken where the other does not fit; or None.
        evaluated, evaluation_items: as longest and items, of the evaluation data; None, if there are none.
        together: how many batches of a step may be computed in one pass (--join_batches); decided, how many are.
    """
    setup: Setup
    checkpointing: bool | None
    items: int
    accumulation: int
    longest: Callable[[int], int]
    certain: bool
    limit: float | None
    lora: Callable
    frugal: Setup | None = None
    evaluated: Callable[[int], int] | None = None
    evaluation_items: int = 1
    together: int = 1

    @property
    def available(self):
        return self.limit or memory.available_bytes(self.setup.device)


class Need(NamedTuple):
    """Bytes on one rank: of what it holds from step to step, and beside it while a row is computed, while the weights
    are updated, and in evaluation."""
    state: memory.State
    loss: float
    stored: float
    recomputed: float
    working: float = 0
    update: float = 0
    evaluation: float = 0

    @classmethod
    def of(cls, plan):
        tokens, state = plan.longest(plan.items), memory.training_state(plan.setup)
        working = memory.working_bytes(plan.setup, state)
        evaluation = memory.evaluation_bytes(
            plan.setup, plan.evaluated(plan.evaluation_items)) + working[0] if plan.evaluated else 0
        return cls(state, memory.row_loss_bytes(plan.setup, tokens),
                   *memory.activation_bytes(plan.setup, tokens), *working, evaluation)

    def parts(self, checkpointing):
        row = self.loss + (self.recomputed if checkpointing else self.stored) + self.working
        parts = {"weights": self.state.weights, "gradients": self.state.gradients, "optimizer": self.state.optimizer,
                 "activations": row}
        size, name = max((self.update, "more in the update"), (self.evaluation, MORE_IN_EVALUATION))
        return parts | ({name: size - row} if size > row else {})

    def total(self, checkpointing):
        return sum(self.parts(checkpointing).values())


def _gb(size):
    return f"{size / 1e9:,.1f}"


def choose(plan, need):
    """-> (whether to compute activations twice, whether the run fits then), for all ranks alike. need: of the plan."""
    available, totals = plan.available, [need.total(checkpointing) for checkpointing in (False, True)]
    least = min(totals) if plan.certain else sum(need.state[:3])
    shares = totals[0] / available, (least if plan.checkpointing is None else totals[plan.checkpointing]) / available
    if torch.distributed.is_initialized():
        shares = torch.tensor(shares, dtype=torch.float32, device=plan.setup.device)
        torch.distributed.all_reduce(shares, torch.distributed.ReduceOp.MAX)
        shares = shares.tolist()
    whole, smallest = shares
    return plan.checkpointing if plan.checkpointing is not None else whole > 1 - memory.RESERVE, smallest <= 1


def decide(plan):
    """Decide --gradient_checkpointing auto and --trained_weights auto, for all ranks alike.

    -> (the Plan with both decided, a line that says why). Raises UserError, on all ranks, if the run does not fit.
    """
    need, available = Need.of(plan), plan.available
    checkpointing, fits = choose(plan, need)
    totals = [need.total(checkpointing) for checkpointing in (False, True)]
    if not fits and plan.frugal:
        decided, line = decide(plan._replace(setup=plan.frugal, frugal=None))
        return decided, (f"trained weights are held in bf16, with stochastic rounding and 8-bit moments: in fp32 the "
                         f"run needs about {_gb(totals[1])} GB; {line}")
    if not fits:
        parts = ", ".join(f"{name} {_gb(size)}" for name, size in need.parts(checkpointing).items())
        raise UserError(f"this run does not fit into the memory: it needs about {_gb(totals[checkpointing])} GB "
                        f"on each {_rank(plan)}{' with gradient checkpointing' if checkpointing else ''} "
                        f"({parts}), and {_gb(available)} GB can be had"
                        + (" (--memory_limit)" if plan.limit else "") + what_fits(plan, checkpointing)
                        + f"{BREAK}--memory_limit GB says how much can be had, if that is more")
    plan = plan._replace(checkpointing=checkpointing)
    return plan._replace(together=_together(plan)), "; ".join([
        f"gradient checkpointing is {'on' if checkpointing else 'off'}: a row of {plan.longest(plan.items):,} tokens "
        f"needs about {_gb(totals[0])} GB without it, {_gb(totals[1])} GB with it, of {_gb(available)} GB",
        *need.state.notes])


def _together(plan):
    """How many batches of a step are computed in one pass: the largest divisor of their number that fits."""
    for number in range(plan.together, 0, -1):
        items = number * plan.items
        fits = number == 1 or (plan.accumulation % number == 0 and plan.longest(items) <= FULL
                               and Need.of(plan._replace(items=items)).total(plan.checkpointing)
                               <= (1 - memory.RESERVE) * plan.available)
        if torch.distributed.is_initialized():
            fits = torch.tensor(fits, dtype=torch.int32, device=plan.setup.device)
            torch.distributed.all_reduce(fits, torch.distributed.ReduceOp.MIN)
        if fits:
            return number


def _rank(plan):
    return "process" if plan.setup.device.type == "cpu" else "GPU"


def what_fits(plan, checkpointing):
    """Flags with which the run fits by estimate, the cheapest first, as lines of a message."""
    on_each, smaller = _smaller_batches(plan, checkpointing)
    ways = [(on_each, smaller)] if on_each else []
    lines, measured = [], {}
    for flags, other in (*ways, *_other_ways(smaller)):
        key = id(other.setup.adapter), other.setup.trained
        if key not in measured:
            measured[key] = Need.of(other)
        state = memory.training_state(other.setup)
        working, update = memory.working_bytes(other.setup, state)
        need = measured[key]._replace(state=state, working=working, update=update)
        in_ram = psutil.virtual_memory().available / max(1, torch.cuda.device_count())
        if need.total(True) <= (1 - memory.RESERVE) * plan.available and need.state.offloaded <= in_ram:
            lines.append(f"{flags}: about {_gb(need.total(True))} GB")
            if flags.startswith("on "):  # more GPUs fit all the more
                break
    if not lines:
        return f"{BREAK}Nothing that this program has makes it fit: take a smaller model or a larger GPU"
    return (f"{BREAK}What fits, the cheapest first{f', each with {on_each}' if on_each else ''}:{BREAK}  "
            + f"{BREAK}  ".join(lines))


def _smaller_batches(plan, checkpointing):
    """(flags for checkpointing and batches of one item with the same samples a step, the Plan with them)."""
    flags = [] if checkpointing else ["--gradient_checkpointing True"]
    if plan.items > 1:
        plan = plan._replace(items=1, accumulation=plan.items * plan.accumulation)
        flags.append(f"--per_device_train_batch_size 1 --gradient_accumulation_steps {plan.accumulation}")
    if plan.evaluation_items > 1 and MORE_IN_EVALUATION in Need.of(plan).parts(True):
        plan = plan._replace(evaluation_items=1)
        flags.append("--per_device_eval_batch_size 1")
    return " ".join(flags), plan._replace(checkpointing=True)


def _other_ways(plan):
    """(flags, Plan) of other strategies and methods, in the order of what they cost the user."""
    setup, on_gpu = plan.setup, plan.setup.device.type != "cpu"
    sharded = not setup.nf4 and not gptq.is_gptq(setup.config)  # weights in 4 bits cannot be

    def zero(stage, offload=False, ranks=setup.ranks):
        return plan._replace(setup=setup._replace(stage=stage, ranks=ranks, trained=setup.compute,
                                                  offload_optimizer=offload, offload_weights=offload and stage == 3))

    for stage, offload in ((2, False), (3, False), (2, True), (3, True)):
        better = (stage, offload) > (setup.stage or 0, setup.offload_optimizer)
        if better and on_gpu and (setup.ranks > 1 or offload) and (stage == 2 or sharded):
            yield f"--deepspeed ds_config_zero{stage}{'_offload' if offload else ''}.json", zero(stage, offload)
    lora = setup
    if not setup.adapter:
        lora = setup._replace(adapter=plan.lora(), trained=setup.compute if setup.stage else torch.float32)
        yield "--use_lora", plan._replace(setup=lora)
    if sharded and setup.stage != 3 and not experts_of(empty_network(setup.config)):
        yield "--q_lora", plan._replace(setup=lora._replace(nf4=True))
    if on_gpu and sharded:
        for ranks in (number for number in MANY if number > setup.ranks):
            yield f"on {ranks} GPUs, --deepspeed ds_config_zero3.json", zero(3, ranks=ranks)


@contextlib.contextmanager
def running_out_is_told(plan, output_dir):
    """While weights are loaded and trained: running out of memory is a UserError that says what takes less."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        saved = next(filter(checkpoints.is_whole, checkpoints_in(output_dir)), None)
        raise UserError(
            f"out of memory: {first_line(error)}" + what_fits(plan, plan.checkpointing)
            + (f"{BREAK}--join_batches False computes {plan.together} times fewer samples at once"
               if plan.together > 1 else "")
            + (f"{BREAK}{saved} is complete: the same command goes on from it, with the first two of these flags too, "
               "where they are named" if saved else "")) from error
