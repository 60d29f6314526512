"""Programs in the background, and machines to run them on."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds for what has no deadline of its own: the machine may be busy


class Run:
    """A program in the background, what it prints in a file."""

    def __init__(self, command, log, environment):
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, cwd=log.parent, start_new_session=True,
                env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
                     "TMPDIR": str(log.parent), "PYTHONFAULTHANDLER": "1", **environment},
                # A shell's background jobs ignore Ctrl-C, and so would what they start.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    @property
    def steps(self):
        """The steps of its log lines so far."""
        return [int(step) for step in re.findall(r"^step (\d+)/", self.output, re.MULTILINE)]

    def wait_until(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output[-3000:]}"
            assert time.monotonic() < deadline, self.output[-3000:]
            time.sleep(0.02)

    def ends(self, code, seconds=PATIENCE):
        """Assert that it does, in time, and return its output."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.send_signal(signal.SIGABRT)  # faulthandler says where each of its threads is
            time.sleep(5)
            pytest.fail(f"still there after {seconds} s:\n{self.output[-10_000:]}")
        assert self.process.returncode == code, self.output[-3000:]
        return self.output


def processes_of(folder):
    """Every process that has the folder, or one in it, on its command line."""
    return [process for process in psutil.process_iter(["cmdline"])
            if any(str(folder) in word for word in process.info["cmdline"] or [])]


def workers_of(launcher):
    """{rank: process}"""
    workers = {}
    for process in psutil.Process(launcher.process.pid).children():
        environment = process.environ()
        if "RANK" in environment:
            workers[int(environment["RANK"])] = process
    return workers


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def two_machines():
    """Two network namespaces joined by a cable: their names. Their addresses on it are 10.213.0.1 and 10.213.0.2.

    Raises OSError or CalledProcessError where one may not make them or has no iproute2 (`ip`).
    """
    names = [f"finetune-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("netns", "exec", name, "true")
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.213.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            if os.path.exists(f"/run/netns/{name}"):
                for pid in map(int, ip("netns", "pids", name).split()):
                    os.kill(pid, signal.SIGKILL)
                ip("netns", "delete", name)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
