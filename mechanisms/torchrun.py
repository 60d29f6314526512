"""Start a program on every GPU of this machine and watch over it, as torchrun does for a fixed number of machines.

The ranks find in their environment what torchrun puts there. Other than torchrun:
  - On one machine nothing listens beyond the loopback, and nothing that comes over a network is unpickled here.
  - SIGUSR1, SIGUSR2, SIGTERM and SIGINT go on to the ranks, which save (mechanisms/signals.py). After SIGTERM or SIGINT
    the ranks have --grace_period seconds to end by themselves; a second one ends them at once.
  - The ranks end with their launcher, whatever it dies of.
  - A failed run ends with one line, on every machine: what the rank said that failed first.
"""

import argparse
import collections
import contextlib
import ctypes
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

FORWARDED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit codes of ranks that a signal has asked to end
POLL = 0.2  # seconds between two looks
PATIENCE = 600  # seconds that machines wait for each other
LAST_WORDS = 10  # seconds in which ranks that have waited for one in vain end one after the other
IN_VAIN = re.compile(r"Timed out waiting \d+ms|collective operation timeout")  # as gloo and NCCL say it
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
ENVIRONMENT = dict(os.environ)  # of the ranks

# How a run ends: the launchers' exit code and, if it failed, their last line
End = collections.namedtuple("End", "code line", defaults=(None,))


def say(line):
    with contextlib.suppress(BrokenPipeError):  # Ctrl-C has also ended the `tee` that read it
        print(line, file=sys.stderr, flush=True)


def die(line):
    say(line)
    sys.exit(2)


def exit_code(code):
    """That of a shell for a process that a signal has ended."""
    return code if code >= 0 else 128 - code


def end_with(parent):
    """The kernel kills this process when its parent, whose id is given, dies."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had died before
        os._exit(1)


# -- the ranks of this machine ----------------------------------------------------------------------------------------

class Rank:
    """One process, with the environment that torchrun would give it."""

    def __init__(self, number, local_number, command, environment, folder):
        self.number = number
        self.error_file = os.path.join(folder, str(local_number), "error.json")  # see mechanisms/errors.py
        os.makedirs(os.path.dirname(self.error_file))
        launcher = os.getpid()

        def begin():  # in the child, before it becomes the program
            end_with(launcher)
            # These two wait until the program has something to do for them; without that they would kill it.
            signal.pthread_sigmask(signal.SIG_SETMASK, (signal.SIGUSR1, signal.SIGUSR2))

        self.process = subprocess.Popen(
            command, start_new_session=True, preexec_fn=begin,
            env={**ENVIRONMENT, **environment, "RANK": str(number), "LOCAL_RANK": str(local_number),
                 "TORCHELASTIC_ERROR_FILE": self.error_file})

    @property
    def code(self):
        """The exit code, negative for a signal; None while it runs."""
        return self.process.poll()

    @property
    def said(self):
        """(message, exit code) when it failed; None if it has not, or another rank of this machine was the first."""
        try:
            with open(self.error_file, encoding="utf-8") as file:
                said = json.load(file)["message"]
                return said["message"], said["extraInfo"]["code"]
        except (FileNotFoundError, json.JSONDecodeError):  # or it is being written
            return None

    @property
    def message(self):
        return self.said and self.said[0]

    @property
    def is_stopped(self):
        if self.code is not None:
            return False
        with open(f"/proc/{self.process.pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"


def kill(ranks):
    """With all that they have started."""
    running = [rank for rank in ranks if rank.code is None]
    for rank in running:
        os.killpg(rank.process.pid, signal.SIGKILL)
    for rank in running:
        try:
            rank.process.wait(30)
        except subprocess.TimeoutExpired:
            say(f"rank {rank.number}, process {rank.process.pid}, cannot be killed: the kernel holds it, as it does "
                "for a GPU or a network that hangs")


def first_failure(ranks):
    """The End by the rank that the others followed: a rank that was killed, else one that said why, else any."""
    found = []
    for rank in ranks:
        code, message = rank.code, rank.message
        if code is None and message:  # it has said why, but another rank was faster to exit
            code = rank.said[1]
        if code:
            followed = code > 0 or code == -signal.SIGABRT  # which NCCL sends itself when another rank has failed
            found.append((followed, message is None, rank.number, code, message))
    *_, number, code, message = min(found)
    if code < 0:
        message = f"killed by {signal.Signals(-code).name}"
        message += ", as the kernel does when memory runs out (dmesg)" if code == -signal.SIGKILL else ""
    line = (message or f"exit code {code}").split("\n")[0]  # the rank itself has said the rest
    return End(exit_code(code), f"rank {number} failed first: {line}")


def hung(ranks, line):
    """Those of `ranks` for which others waited in vain, if the `line` with which the run ends tells of that."""
    in_vain = IN_VAIN.search(line)
    if not in_vain and "SIGABRT" not in line:  # with which NCCL ends a rank that waits, or that has another trouble
        return []
    running = [rank for rank in ranks if rank.code is None]
    deadline = time.monotonic() + LAST_WORDS
    while not all(rank.is_stopped for rank in running) and time.monotonic() < deadline:
        time.sleep(POLL)
        before, running = running, [rank for rank in running if rank.code is None]
        if len(running) < len(before):
            deadline = time.monotonic() + LAST_WORDS
    return [rank for rank in running if in_vain or rank.is_stopped]


# -- where they meet --------------------------------------------------------------------------------------------------

def loopback_store(port=0):
    """A TCPStore for the processes of this machine, at a free port unless one is given.

    Left to itself a TCPStore listens on every interface.
    """
    from torch.distributed import TCPStore

    listener = socket.create_server(("127.0.0.1", port))
    return TCPStore("127.0.0.1", listener.getsockname()[1], is_master=True, wait_for_workers=False,
                    master_listen_fd=listener.detach())


def stay_on_the_loopback():
    """In a rank, before the ranks connect: if they are of one machine, only the loopback is listened on.

    For ranks that this launcher has not started: deepspeed's, or a single process that uses DeepSpeed.
    """
    global _store
    environment = os.environ
    if environment["MASTER_ADDR"] not in ("127.0.0.1", "localhost") or "TORCHELASTIC_RUN_ID" in environment:
        return
    if environment["RANK"] == "0":
        _store = loopback_store(int(environment["MASTER_PORT"]))
    environment.update(OneMachine.environment, TORCHELASTIC_USE_AGENT_STORE="True")


class OneMachine:
    """Nobody to meet: the ranks find each other through a store on the loopback, and talk to each other there."""

    environment = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}

    def meet(self, attempt, count):
        self.store = loopback_store()  # a new one for each attempt: it knows nothing of the ranks that have died
        return "127.0.0.1", self.store.port, 0, count

    def failed(self, attempt):
        return None

    def fail(self, attempt, end):
        return end

    def leave(self, patience):
        pass


class Machines:
    """The launchers of several machines meet before each attempt in a store that machine 0 has at `address`:`port`.

    It holds numbers and JSON. Whoever reaches it can disturb the run, so the network must be trusted; `name` keeps
    apart runs that meet at the same address by mistake.
    """

    environment = {}

    def __init__(self, count, number, address, port, name):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else its stack is shown when machine 0 has gone
        from torch.distributed import PrefixStore, TCPStore

        self.count, self.number, self.address = count, number, address
        if number:
            self.wait(lambda: self.answers(port), lambda: f"machine 0 does not answer at {address}:{port}: was the "
                      "command started there, is MASTER_ADDR its address, and may this machine reach that port?")
        try:
            self.store = PrefixStore(name, TCPStore(address, port, is_master=not number, wait_for_workers=False))
        except RuntimeError as error:
            die(f"MASTER_ADDR={address} MASTER_PORT={port}: {str(error).splitlines()[0]}")

    def wait(self, condition, problem):
        deadline = time.monotonic() + PATIENCE
        try:
            while not condition():
                if time.monotonic() > deadline:
                    die(f"waited {PATIENCE} s: {problem()}")
                time.sleep(POLL)
        except RuntimeError:
            die("machine 0 has gone")

    def answers(self, port):
        try:
            socket.create_connection((self.address, port), timeout=5).close()
        except OSError:
            return False
        return True

    def names(self, what, attempt):
        return [f"{attempt}/{what}/{number}" for number in range(self.count)]

    def missing(self, names):
        return ", ".join(str(number) for number, name in enumerate(names) if not self.store.check([name]))

    def meet(self, attempt, count):
        """Wait for all machines. `count` ranks here -> (address and port of the ranks' store, first rank here, all)"""
        from torch.distributed import TCPStore

        if not self.number:  # a new store for each attempt: it knows nothing of the ranks that have died
            self.ranks_store = TCPStore(self.address, 0, is_master=True, wait_for_workers=False)
            self.store.set(f"{attempt}/port", str(self.ranks_store.port))
        names = self.names("ranks", attempt)
        self.store.set(names[self.number], str(count))
        self.wait(lambda: self.store.check([*names, f"{attempt}/port"]),
                  lambda: f"machine {self.missing(names)} did not come (is RDZV_ID the same on all machines?)")
        *counts, port = map(int, self.store.multi_get([*names, f"{attempt}/port"]))
        return self.address, port, sum(counts[:self.number]), sum(counts)

    def failed(self, attempt):
        """The End that any machine has told of, or None."""
        try:
            if not self.store.check([f"{attempt}/failed"]):
                return None
            return End(*json.loads(self.store.get(f"{attempt}/failed")))
        except RuntimeError:
            return End(1, "machine 0 has gone")

    def fail(self, attempt, end):
        """Tell all machines. -> the End that was told first"""
        try:
            return End(*json.loads(self.store.compare_set(f"{attempt}/failed", "", json.dumps(end))))
        except RuntimeError:
            return end

    def leave(self, patience):
        """Machine 0 has the store, so it goes last, or after `patience` seconds."""
        deadline = time.monotonic() + patience
        names = self.names("left", "all")
        with contextlib.suppress(RuntimeError):  # machine 0 has gone already
            self.store.set(names[self.number], "")
            while not self.number and not self.store.check(names) and time.monotonic() < deadline:
                time.sleep(POLL)


# -- the launcher -----------------------------------------------------------------------------------------------------

class Launcher:
    def __init__(self, args):
        self.args, self.ranks = args, []
        self.stop = None  # SIGTERM or SIGINT, when it has come
        self.deadline = math.inf  # for ranks that end because a signal asked for it

    def run(self):
        """-> exit code"""
        for number in FORWARDED:
            signal.signal(number, self.on_signal)
        args = self.args
        self.machines = OneMachine() if args.nnodes == 1 else Machines(
            args.nnodes, args.node_rank, args.master_addr, args.master_port, args.rdzv_id)
        for attempt in range(args.max_restarts + 1):
            place = self.machines.meet(attempt, args.nproc_per_node)
            with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
                try:
                    self.start(folder, *place)
                    end = self.watch(attempt)
                    if end.line:
                        say(end.line)
                        for rank in hung(self.ranks, end.line):
                            stopped = ", stopped by a signal" if rank.is_stopped else ""
                            say(f"rank {rank.number} hung{stopped}: the others waited for it as --ddp_timeout says")
                finally:
                    kill(self.ranks)
            if not end.line or self.stop:
                break
            if attempt < args.max_restarts:
                say(f"starting again, {attempt + 1} of {args.max_restarts} times")
        self.machines.leave(10 if end.line else 300)
        return end.code

    def start(self, folder, address, port, first, count):
        environment = {
            **self.machines.environment, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(self.args.nproc_per_node),
            "MASTER_ADDR": address, "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # that store is there: rank 0 need not make one
            "TORCHELASTIC_RUN_ID": self.args.rdzv_id}
        command = [sys.executable, "-u", *self.args.command]
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # no rank misses one
        self.ranks = [Rank(first + number, number, command, environment, folder)
                      for number in range(self.args.nproc_per_node)]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)

    def watch(self, attempt):
        """Until the ranks have ended, or should. -> how the run ends, which is the same on all machines"""
        while True:
            time.sleep(POLL)
            codes = [rank.code for rank in self.ranks]
            stopped = [rank for rank, code in zip(self.ranks, codes) if code and exit_code(code) in STOPPED]
            code = max((exit_code(rank.code) for rank in stopped), default=0)
            if any(rank.message or rank.code < 0 for rank in stopped):  # before it trained: others may wait for it
                return self.machines.fail(attempt, End(code))
            if any(code and exit_code(code) not in STOPPED for code in codes):
                return self.machines.fail(attempt, first_failure(self.ranks))
            if None not in codes:
                return End(code)
            if stopped:  # another may still be writing
                self.deadline = min(self.deadline, time.monotonic() + self.args.grace_period)
            if time.monotonic() > self.deadline:
                say(f"the ranks did not end within --grace_period {self.args.grace_period} s: killed")
                return self.machines.fail(attempt, End(code or 128 + self.stop))
            end = self.machines.failed(attempt)
            if end:
                return end

    def on_signal(self, number, frame):
        running = [rank for rank in self.ranks if rank.code is None]
        stops = number in (signal.SIGTERM, signal.SIGINT)
        if running and not (stops and self.stop):
            for rank in running:
                os.kill(rank.process.pid, number)
        elif number != signal.SIGUSR1:
            say(f"ended by {signal.Signals(number).name}")
            sys.exit(128 + number if stops else 0)
        if stops and running:
            self.stop, self.deadline = number, time.monotonic() + self.args.grace_period
            say(f"{signal.Signals(number).name}: the ranks end; once more ends them at once")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("nnodes", 1), ("node_rank", 0), ("master_port", None), ("nproc_per_node", 1),
                          ("max_restarts", 0), ("grace_period", 300)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--master_addr")
    parser.add_argument("--rdzv_id", default="none", help="the same on all machines of a run, another for each run")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a Python program and its arguments")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(Launcher(parse_arguments()).run())
