"""Disturb runs at every kind of moment and give the same command again: is the end that of the run nothing disturbed?

  python bench/kill_matrix.py                     # everything, for an hour or two: the table in bench/RESULTS.md
  python bench/kill_matrix.py --cells "LoRA, one process" --cases 12

A cell is a method under a strategy. Its cases, spread evenly over the events of a run (a file or folder below its
output folder is opened, renamed, removed, made), in turn under rotation alone and with packing, lazy tokenizing,
workers and the best model loaded at the end:

  killed                 SIGKILL right before the event
  killed, half written   ... after the file that was written last lost its second half
  power loss             ... after everything that was not yet flushed is gone: contents, and names of new files
  disk full              the event fails with "No space left on device", and so does everything after it
  damaged                killed at the end; then a file of the newest checkpoint is cut, zeroed, missing or has a bit
                         flipped
  not finite             the gradient of one rank is nan at a step that is saved, at the last, at another
  signal                 SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 at the event, to one rank or to all
  launcher               of several ranks, started as users do: SIGTERM to the launcher, SIGKILL to it, SIGKILL to a
                         rank under --max_restarts, SIGUSR2 to every process
  branch                 resumed from an older checkpoint beside newer ones, and killed
  two at once            a second run starts in the folder

Then the same command again must end with 0, with the same weights and the same log of losses, gradient norms, learning
rates and evaluations, bit by bit. All processes but a launcher's are forks of this one, which has imported everything:
a case takes seconds. Prints a line for each case that does not end so, and the table. Exits with 1 if there is one.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from mechanisms.quiet import silence  # noqa: E402

silence()

import psutil  # noqa: E402
import torch  # noqa: E402

import finetune  # noqa: E402
from examples.make_tiny_model import EXAMPLES, example_texts, make_tiny_model  # noqa: E402
from mechanisms import signals  # noqa: E402
from mechanisms import trainer as trainer_module  # noqa: E402
from mechanisms.errors import user_errors_end_the_program  # noqa: E402
from mechanisms.paths import MANIFEST, checkpoints_in  # noqa: E402

STEPS, PATIENCE = 6, 300  # seconds after which a run counts as stuck
LORA = ["--lora_r", "4"]
METHODS = {"full": [], "LoRA": ["--use_lora", *LORA], "Q-LoRA": ["--q_lora", *LORA]}
STRATEGIES = {"one process": (1, []), "DDP 2": (2, []), "ZeRO-2": (2, ["--deepspeed", "ds_config_zero2.json"]),
              "ZeRO-3": (2, ["--deepspeed", "ds_config_zero3.json"])}
CELLS = [f"{method}, {strategy}" for method, strategy in itertools.product(METHODS, STRATEGIES)
         if (method, strategy) != ("Q-LoRA", "ZeRO-3")]  # which is refused
VARIANTS = {"rotation": [], "packing": ["--packing", "True", "--model_max_length", "128"],
            "lazy": ["--lazy_preprocess", "True"], "workers": ["--dataloader_num_workers", "1"],
            "best": ["--eval_ratio", "0.2", "--eval_strategy", "steps", "--eval_steps", "2",
                     "--load_best_model_at_end", "True", "--metric_for_best_model", "loss"]}
LONG_RUN = ["--max_steps", "80", "--save_steps", "20"]  # in whose middle a launcher gets its signal
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0, signal.SIGUSR2: 0}  # exit codes
DAMAGE = {"cut": lambda content: content[:len(content) // 2], "zeroed": lambda content: bytes(len(content)),
          "bit flipped": lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:], "missing": None}
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree"}

NEED_ROOM = {"open", "os.mkdir"}

# ---------------------------------------------------------------------------------------------------------------------
# Inside a disturbed run
# ---------------------------------------------------------------------------------------------------------------------

class Disturbance:
    """What happens to a rank at the event number `at` of its output folder; at=None: the events are counted only.

    kind: one of those above, or a signal, which goes `to_all` ranks or to this one.
    """

    def __init__(self, out, kind=None, at=None, to_all=False):
        self.out, self.kind, self.at, self.to_all, self.events, self.busy = str(out), kind, at, to_all, 0, False
        self.flushed, self.listed = {}, {}

    def arm(self):
        sys.addaudithook(self.hook)
        os.fsync, self.fsync = self.flush, os.fsync

    def hook(self, event, args):
        if event not in CHANGES or self.busy or not isinstance(args[0], str | os.PathLike):
            return
        if not f"{os.fspath(args[0])}/".startswith(f"{self.out}/") or event == "open" and not _writes(args):
            return
        self.events += 1
        if self.at is None or self.events < self.at:
            return
        if self.kind == "disk full":
            if event in NEED_ROOM:
                raise OSError(28, os.strerror(28), args[0])
            return
        self.busy = True
        if isinstance(self.kind, signal.Signals):
            os.killpg(0, self.kind) if self.to_all else os.kill(os.getpid(), self.kind)
            return
        if self.kind == "killed, half written":
            newest = max(self.files(), key=lambda path: path.stat().st_mtime_ns, default=None)
            if newest:
                os.truncate(newest, newest.stat().st_size // 2)
        elif self.kind == "power loss":
            self.lose_what_is_not_flushed()
        os.kill(os.getpid(), signal.SIGKILL)

    def files(self):
        return [path for path in Path(self.out).rglob("*") if path.is_file() and path.name != "run.lock"]

    def flush(self, descriptor):
        self.fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            self.listed[path] = set(os.listdir(path))
        else:
            self.flushed[os.fstat(descriptor).st_ino] = _state(path)

    def lose_what_is_not_flushed(self):
        for path in self.files():
            if self.flushed.get(path.stat().st_ino) != _state(path):
                os.truncate(path, 0)
        for parent, folders, names in os.walk(self.out, topdown=False):
            for name in {*folders, *names} - self.listed.get(parent, set()) - {"run.lock"}:
                path = os.path.join(parent, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def _writes(args):
    _, mode, flags = args
    return any(letter in mode for letter in "wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)


def _state(path):
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def lose_gradient_at(step):
    """The gradient of this rank is nan at that step."""
    plain = trainer_module.SafeTrainer.training_step

    def lost(self, model, inputs, *args):
        if self.state.global_step + 1 == step:
            hook = next(weight for weight in model.parameters() if weight.requires_grad).register_hook(
                lambda gradient: gradient * torch.nan)
            try:
                return plain(self, model, inputs, *args)
            finally:
                hook.remove()
        return plain(self, model, inputs, *args)

    trainer_module.SafeTrainer.training_step = lost


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------

class Runs:
    """Runs of one cell: forks of this process, what they print in a file."""

    def __init__(self, cell, folder):
        self.cell = cell
        method, strategy = cell.split(", ")
        self.ranks, flags = STRATEGIES[strategy]
        self.flags, self.folder, self.references = METHODS[method] + flags, folder, {}

    def argv(self, out, variant):
        words = ["--model_name_or_path", self.folder.parent / "model-instruct", "--data_path", EXAMPLES / "data",
                 "--output_dir", out, "--cache_dir", self.folder.parent / "cache", "--max_steps", STEPS,
                 "--save_steps", 2, "--save_total_limit", 2, "--logging_steps", 1, "--per_device_train_batch_size", 2,
                 "--learning_rate", "5e-3", "--warmup_steps", 2, *self.flags,
                 *(LONG_RUN if variant == "launcher" else VARIANTS[variant])]
        return [str(word) for word in words]

    def start(self, argv, log, prepare=None):
        """[process ids] of the ranks; prepare(rank) is called in each before it begins."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ids = []
        for rank in range(self.ranks):
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                self._be(rank, port, argv, log, prepare)
            ids.append(pid)
            os.setpgid(pid, ids[0])  # one process group, as a launcher's ranks are
        return ids

    def _be(self, rank, port, argv, log, prepare):
        code = 1
        try:
            signals.install()
            with open(log, "a") as file, open(os.devnull) as nothing:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                os.dup2(nothing.fileno(), 0)
            os.chdir(ROOT)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.ranks), MASTER_PORT=str(port),
                              LOCAL_WORLD_SIZE=str(self.ranks), MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
            errors = Path(f"{log}.{port}", str(rank), "error.json")  # as torchrun: the first to fail speaks
            errors.parent.mkdir(parents=True)
            os.environ["TORCHELASTIC_ERROR_FILE"] = str(errors)
            if self.ranks == 1:
                for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                    os.environ.pop(name)
            if prepare:
                prepare(rank)
            with user_errors_end_the_program():
                finetune.train(argv)
            code = 0
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
            os._exit(code)

    def end(self, ids):
        """Exit code of the first rank to end with another than 0 (-9: killed), else 0; None: stuck."""
        first, deadline = 0, time.monotonic() + PATIENCE
        left = set(ids)
        while left and time.monotonic() < deadline:
            for pid in list(left):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    left.remove(pid)
                    code = os.waitstatus_to_exitcode(status)
                    if code and not first:
                        first, deadline = code, time.monotonic() + 2  # as torchrun does, if more gently
            time.sleep(0.02)
        if left:
            os.killpg(ids[0], signal.SIGKILL)
        for pid in left:
            os.waitpid(pid, 0)
        return first if first or not left else None

    def run(self, out, variant, log, prepare=None, flags=()):
        return self.end(self.start([*self.argv(out, variant), *map(str, flags)], log, prepare))

    def launch(self, out, log, way):
        """Start it as users do and, in the middle, do to it what the number `way` says. Returns a complaint or None."""
        program = [sys.executable, "mechanisms/torchrun.py", "--nproc_per_node", str(self.ranks), "--max_restarts", "1"]
        with open(log, "a") as file:
            launcher = subprocess.Popen([*program, "finetune.py", *self.argv(out, "launcher")], cwd=ROOT, stdout=file,
                                        stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
                                        env={**os.environ, "DS_ACCELERATOR": "cpu"})
        while launcher.poll() is None and not (out / "checkpoint-20" / MANIFEST).exists():
            time.sleep(0.01)
        processes = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
        number, receivers, code = (
            (signal.SIGTERM, processes[:1], 143), (signal.SIGKILL, processes[:1], -9),
            (signal.SIGKILL, processes[2:3], 0), (signal.SIGUSR2, processes, 0))[way % 4]
        for process in receivers:
            process.send_signal(number)
        ended = launcher.wait(PATIENCE)
        left = psutil.wait_procs(processes, 10)[1]
        return None if ended == code and not left else f"the launcher ended with {ended}, {len(left)} processes left"

    def reference(self, variant):
        """(what a run that nothing disturbs ends with, number of its events)."""
        if variant not in self.references:
            out, log = self.folder / f"reference {variant}", self.folder / f"reference {variant}.log"
            count = self.folder / "events"

            def counting(rank):
                if rank == 0:
                    disturbance, leave = Disturbance(out), os._exit
                    disturbance.arm()
                    os._exit = lambda code: (count.write_text(str(disturbance.events)), leave(code))

            code = self.run(out, variant, log, counting)
            if code != 0:
                raise SystemExit(f"the undisturbed run ends with {code}:\n{log.read_text()[-3000:]}")
            self.references[variant] = end_of(out), int(count.read_text())
        return self.references[variant]


def end_of(out):
    """(bytes of the result's weights, its log without times)."""
    weights = [path.read_bytes() for path in sorted(out.glob("*.safetensors"))]
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return weights, [{name: value for name, value in entry.items() if name in ("step", "loss", "grad_norm", "eval_loss",
                                                                               "learning_rate")} for entry in log]


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------

def cases(wanted):
    """[(kind, number among its kind)], about `wanted` of them, every kind at least once."""
    shares = {"killed": 9, "killed, half written": 5, "power loss": 7, "disk full": 5, "damaged": 8, "not finite": 3,
              "signal": 4, "launcher": 1, "branch": 1, "two at once": 1}
    total = sum(shares.values())
    return {kind: max(1, round(share * wanted / total)) for kind, share in shares.items()}


def disturb(runs, kind, number, count, variant, out, log):
    """Disturb a run. Returns a complaint about how it ended, or None."""
    share = (number + 0.5) / count
    events = runs.reference(variant)[1]
    disturbed_rank = number % runs.ranks if kind.startswith("killed") or kind == "not finite" else 0

    def on_its_rank(action):
        return lambda rank: action() if rank == disturbed_rank else None

    if kind in ("killed", "killed, half written", "power loss", "disk full"):
        at = 1 + int(share * events * (1 if disturbed_rank == 0 else 0.1))  # other ranks write few files
        code = runs.run(out, variant, log, on_its_rank(Disturbance(out, kind, at).arm))
        clean = code == -signal.SIGKILL or code in (0, 2) and "Traceback" not in log.read_text()
        return None if clean else f"ended with {code}"
    if kind == "not finite":
        step = (4, STEPS, 3)[number % 3]
        code = runs.run(out, variant, log, on_its_rank(lambda: lose_gradient_at(step)))
        said = log.read_text()
        right = code == 3 and f"at step {step}" in said and "Records of that step" in said and "Traceback" not in said
        return None if right and not list(out.glob("*.safetensors")) else f"ended with {code}"
    if kind == "signal":
        number_sent, allowed = list(SIGNALS.items())[number % len(SIGNALS)]
        at = int((0.3 + 0.7 * share) * events)  # steps have begun
        code = runs.run(out, variant, log, lambda rank: rank or Disturbance(out, number_sent, at, number % 2).arm())
        return None if code == allowed and "Traceback" not in log.read_text() else f"ended with {code}"
    if kind == "launcher":
        return runs.launch(out, log, CELLS.index(runs.cell) + number)
    if kind == "two at once":
        first = runs.start(runs.argv(out, variant), log)
        while not (out / "run.lock").exists():
            time.sleep(0.01)
        second = runs.run(out, variant, log.with_suffix(".second"))
        code = runs.end(first)
        return None if (second, code) == (2, 0) and "is in use by" in log.with_suffix(".second").read_text() else \
            f"the first ended with {code}, the second with {second}"
    at = int(0.95 * events)
    runs.run(out, variant, log, on_its_rank(Disturbance(out, "killed", at).arm))
    whole = [path for path in checkpoints_in(out) if os.path.exists(os.path.join(path, MANIFEST))]
    if kind == "branch":
        code = runs.run(out, variant, log, on_its_rank(Disturbance(out, "killed", events // 2).arm),
                        ["--resume_from_checkpoint", whole[-1]])
        return None if code in (0, -9) and "is moved to" in log.read_text() else f"the branch ended with {code}"
    files = sorted(path for path in Path(whole[0]).rglob("*") if path.is_file())
    path, change = files[number * 7 % len(files)], list(DAMAGE.values())[number % len(DAMAGE)]
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    return None


def verdict(runs, kind, number, count, variant, out, log):
    complaint = disturb(runs, kind, number, count, variant, out, log)
    if complaint:
        return f"wrong line or code: {complaint}"
    code = runs.run(out, variant, log)
    if code is None:
        return "stuck"
    if code:
        return f"lost: the same command ends with {code}"
    return "equal" if end_of(out) == runs.reference(variant)[0] else "differing"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS, metavar="CELL")
    parser.add_argument("--cases", type=int, default=44, help="of each cell, about")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill_matrix."))
    make_tiny_model(folder / "model-instruct", example_texts(), num_layers=2, hidden_size=64)
    table, bad, start = {}, 0, time.time()
    for cell in args.cells:
        (folder / cell).mkdir()
        runs, found = Runs(cell, folder / cell), collections.Counter()
        variants = itertools.cycle(VARIANTS)
        for kind, count in cases(args.cases).items():
            for number in range(count if kind != "launcher" or runs.ranks > 1 else 0):
                variant = next(variants) if kind != "launcher" else kind
                out, log = folder / cell / f"{kind} {number}", folder / cell / f"{kind} {number}.log"
                said = verdict(runs, kind, number, count, variant, out, log)
                found[said.split(":")[0]] += 1
                if said != "equal":
                    bad += 1
                    print(f"{cell}, {kind} {number}, {variant}: {said}\n  see {log}", flush=True)
                else:
                    shutil.rmtree(out)
        table[cell] = found
        print(f"{cell}: {dict(found)}, {time.time() - start:.0f} s", flush=True)
    print("\n| cell | cases | equal | not |\n|---|---|---|---|")
    for cell, found in table.items():
        print(f"| {cell} | {found.total()} | {found['equal']} | {found.total() - found['equal']} |")
    if not bad:
        shutil.rmtree(folder)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
