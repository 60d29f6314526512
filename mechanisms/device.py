"""Whether this machine has a GPU that torch can use. One that it cannot must not go unseen: a CPU takes weeks."""

import os
import re
import subprocess
from pathlib import Path

import torch

from mechanisms.errors import UserError

PROC = Path("/proc/driver/nvidia/version")
# The oldest driver for each generation of CUDA: https://docs.nvidia.com/deploy/cuda-compatibility
OLDEST_DRIVER = {"12": 525, "13": 580}
FOR_OLDER_DRIVERS = "https://download.pytorch.org/whl/cu126"


def runs_on_cpu(instead):
    """Whether there is nothing but the CPU to run on.

    Args:
        instead: what the user can write to run on the CPU all the same, for the message.

    Raises UserError where the machine has an NVIDIA GPU that torch cannot use, unless CUDA_VISIBLE_DEVICES hides it.
    """
    if torch.cuda.is_available():
        _check_generation()
    if torch.accelerator.is_available():
        return False
    hidden = not re.match(r"\s*(\d|GPU-|MIG-)", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    driver = driver_version()
    if driver and not hidden:
        raise UserError(f"this machine has an NVIDIA GPU (driver {driver}) that torch {torch.__version__} cannot use: "
                        f"{_why(driver)}. Or {instead} to run on the CPU")
    return True


def driver_version():
    """That of NVIDIA's driver, such as "580.65.06"; "of unknown version" if it does not answer; None: no GPU here."""
    try:
        asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                               capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    else:
        answer = asked.stdout if asked.returncode == 0 else ""
    if not answer and PROC.is_file():
        answer = PROC.read_text(encoding="utf-8")
    if found := re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", answer):
        return found[0]
    return "of unknown version" if os.path.exists("/dev/nvidiactl") else None


def _why(driver):
    """Why torch cannot use the GPU of a machine with this driver, and what to do."""
    cuda = torch.version.cuda
    if not cuda:
        return f"it is built without CUDA. pip install torch=={torch.__version__.partition('+')[0]}"
    oldest = OLDEST_DRIVER.get(cuda.partition(".")[0])
    if oldest and driver[:1].isdigit() and int(driver.partition(".")[0]) < oldest:
        return (f"it is built for CUDA {cuda}, which needs driver {oldest} or newer. Update the driver, or take the "
                f"build for older ones: pip install torch=={torch.__version__.partition('+')[0]} --index-url "
                f"{FOR_OLDER_DRIVERS}")
    return f"it is built for CUDA {cuda}, and finds none. See what nvidia-smi and python -m torch.utils.collect_env say"


def _check_generation():
    """Raises UserError if torch has no code for this GPU: it would fail with the first operation."""
    major, minor = torch.cuda.get_device_capability()
    compiled = [int(match[1]) for name in torch.cuda.get_arch_list() if (match := re.search(r"_(\d+)", name))]
    if compiled and 10 * major + minor < min(compiled):
        raise UserError(f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}) is too old for torch "
                        f"{torch.__version__}, which needs {min(compiled) / 10:.1f} or newer: T4, RTX 20xx, A100 and "
                        "later. V100 and older cards are not supported")
