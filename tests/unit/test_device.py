"""What is done on GPUs, without one: torch's answers are planted, and kernels are replaced by slow ones for CPUs.

Everything between, ours and torch's Python, is what runs on a card.
"""

import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

import finetune
from finetune import TrainingArguments, parse_arguments
from mechanisms import attention, device, gptq, head_loss, strategies
from mechanisms.attention import WITHIN_SAMPLES, best_attention, has_flash_attention, within_samples
from mechanisms.errors import UserError

GPU = torch.device("cuda", 0)
ROOT = Path(finetune.__file__).parent


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(nvidia_smi): the machine's nvidia-smi is this shell script, and torch finds no GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(nvidia_smi, cuda="13.0"):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu130" if cuda else "2.13.0+cpu")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(device, "PROC", tmp_path / "none")

    return make


@pytest.mark.parametrize("driver, cuda, words", [
    ("550.54.14", "13.0", "is built for CUDA 13.0, which needs driver 580 or newer. Update the driver, or take the "
     "build for older ones: pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126. Or add "
     "--use_cpu to run on the CPU"),
    ("580.65.06", "13.0", "is built for CUDA 13.0, and finds none. See what nvidia-smi"),
    ("580.65.06", None, "is built without CUDA. pip install torch==2.13.0. Or")])
def test_a_gpu_that_torch_cannot_use_ends_the_start(machine, driver, cuda, words):
    machine(f"echo {driver}", cuda)
    with pytest.raises(UserError) as error:
        parse_arguments(["--data_path", "x.jsonl"])
    assert f"(driver {driver})" in str(error.value) and words in str(error.value)


def test_the_cpu_is_used_where_that_is_meant_or_there_is_nothing_else(machine, monkeypatch):
    machine("exit 9")
    assert TrainingArguments().use_cpu
    machine("echo 550.54.14")
    assert TrainingArguments(use_cpu=True).use_cpu
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert TrainingArguments().use_cpu
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert TrainingArguments().use_cpu


def test_the_driver_is_read_where_nvidia_smi_is_missing_too(machine, monkeypatch, tmp_path):
    machine("exit 9")
    assert device.driver_version() is None
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    monkeypatch.setattr(device, "PROC", file)
    assert device.driver_version() == "535.104.05"


@pytest.mark.slow
def test_every_process_of_a_launcher_refuses_and_one_speaks(machine, tmp_path):
    """The launchers count by nvidia-smi, which lists cards that torch cannot use."""
    machine("echo GPU 0: NVIDIA H100; echo 550.54.14")
    data = tmp_path / "data.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    run = subprocess.run(
        [sys.executable, "mechanisms/torchrun.py", "--nproc_per_node", "2", "finetune.py", "--data_path", data,
         "--output_dir", tmp_path / "out", "--model_name_or_path", tmp_path], capture_output=True, text=True,
        timeout=120)
    said = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert run.returncode == 2 and len(said) == 1 and "has an NVIDIA GPU (driver 550.54.14)" in said[0]
    assert "Traceback" not in run.stderr


def plant_card(monkeypatch, capability, compiled=("sm_75", "sm_80", "sm_90", "compute_120")):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(compiled))
    has_flash_attention.cache_clear()


@pytest.fixture(autouse=True)
def no_card_is_remembered():
    yield
    has_flash_attention.cache_clear()


def test_cards_older_than_torch_are_refused(monkeypatch):
    plant_card(monkeypatch, (7, 5))
    assert not device.runs_on_cpu("")
    plant_card(monkeypatch, (7, 0))
    with pytest.raises(UserError, match=r"a card \(compute capability 7.0\) is too old .* needs 7.5 or newer"):
        device.runs_on_cpu("")


@pytest.mark.parametrize("capability, dtype, flash", [
    ((8, 0), torch.bfloat16, True), ((9, 0), torch.float16, True), ((8, 6), torch.float32, False),
    ((7, 5), torch.float16, False)])
def test_flash_attention_is_for_ampere_and_16_bits(monkeypatch, capsys, capability, dtype, flash):
    plant_card(monkeypatch, capability)
    assert has_flash_attention(GPU, dtype) == flash
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = None
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    assert best_attention(GPU, dtype) == ("flash_attention_2" if flash else WITHIN_SAMPLES)
    assert ("note: flash-attn is installed and not used: it computes in 16 bits on Ampere" in capsys.readouterr().out) \
        != flash


def test_a_broken_flash_attn_is_not_used(monkeypatch, capsys):
    plant_card(monkeypatch, (9, 0))
    assert best_attention(GPU, torch.bfloat16) == WITHIN_SAMPLES and not capsys.readouterr().out  # none is installed
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))  # of version 4
    assert best_attention(GPU, torch.bfloat16) == WITHIN_SAMPLES
    assert "not used: cannot import name 'flash_attn_varlen_func'" in capsys.readouterr().out
    sys.modules["flash_attn"].flash_attn_varlen_func = None
    assert best_attention(GPU, torch.bfloat16) == WITHIN_SAMPLES
    assert "not used: transformers does not know its version" in capsys.readouterr().out
    assert best_attention(torch.device("cpu"), torch.bfloat16) == WITHIN_SAMPLES and not capsys.readouterr().out


def samples_of(query, key, value, bounds, scale, left):
    """Of each sample: (where it is, its weights (heads, queries, keys), its query, key, value in fp32, heads alike)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:]):
        here = slice(start, end)
        q, k, v = (tensor[here].float() for tensor in (query, key, value))
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if left is not None and left >= 0:
            seen = seen.triu(-left)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        yield here, scores.masked_fill(~seen, -torch.inf).softmax(-1), q, k, v


def flash_forward(query, key, value, bounds, bounds_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
                  scale=None, window_size_left=None, window_size_right=None, **others):
    """aten::_flash_attention_forward on a CPU, with what CUDA's asks for."""
    assert query.dtype == key.dtype == value.dtype and query.dtype.itemsize == 2
    assert bounds.dtype == torch.int32 and bounds.is_contiguous() and isinstance(max_q, int)
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1 and not dropout_p
    assert is_causal or window_size_right == 0
    assert not any(value is not None for value in others.values())
    output = torch.cat([torch.einsum("hqk,khd->qhd", weights, v) for _, weights, _, _, v in samples_of(
        query, key, value, bounds, scale, window_size_left)]).to(query.dtype)
    nothing = torch.empty(0)
    return output, query.new_zeros(query.shape[1], len(query), dtype=torch.float), nothing, nothing, nothing


def flash_backward(grad_out, query, key, value, out, lse, bounds, bounds_k, max_q, max_k, dropout_p, is_causal, rng,
                   unused, *, scale=None, window_size_left=None, window_size_right=None):
    grads, groups = [torch.zeros(query.shape) for _ in range(3)], query.shape[1] // key.shape[1]
    for here, weights, q, k, v in samples_of(query, key, value, bounds, scale, window_size_left):
        grad = grad_out[here].float()
        of_weights = torch.einsum("qhd,khd->hqk", grad, v)
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        grads[0][here] = torch.einsum("hqk,khd->qhd", of_scores, k)
        grads[1][here] = torch.einsum("hqk,qhd->khd", of_scores, q)
        grads[2][here] = torch.einsum("hqk,qhd->khd", weights, grad)
    grads[1:] = (grad.unflatten(1, (-1, groups)).sum(2) for grad in grads[1:])
    return tuple(grad.to(query.dtype) for grad in grads)


@pytest.fixture
def flash_on_cpu(monkeypatch):
    monkeypatch.setattr(attention, "has_flash_attention", lambda device, dtype: dtype.itemsize == 2)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash_forward, "CPU")
        library.impl("_flash_attention_backward", flash_backward, "CPU")
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("torch_2_11", [True, False])
def test_varlen_attention_is_that_of_the_loop(monkeypatch, flash_on_cpu, dtype, heads, window, autocast, torch_2_11):
    from torch.nn.attention import varlen

    if torch_2_11:  # which has no enable_gqa, and wants as many heads of each
        plain = varlen.varlen_attn

        def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
            assert query.shape == key.shape == value.shape
            return plain(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

        monkeypatch.setattr(varlen, "varlen_attn", older)
    torch.manual_seed(0)
    bounds = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    shapes = [(1, number, 15, 8) for number in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    results = []
    for flash in (True, False):
        if not flash:
            monkeypatch.setattr(attention, "has_flash_attention", lambda device, dtype: False)
        held = torch.float32 if autocast or not flash else dtype
        leaves = [tensor.clone().to(held).requires_grad_() for tensor in inputs]
        with torch.autocast("cpu", dtype, enabled=autocast and flash):
            output, _ = within_samples(None, *leaves, None, scaling=0.3, cu_seq_lens_q=bounds, max_length_q=9,
                                       sliding_window=window)
        assert output.shape == (1, 15, heads[0], 8) and (not flash or output.dtype == dtype)
        output.float().square().sum().backward()
        results.append([output.float(), *(leaf.grad.float() for leaf in leaves)])
    for found, wanted in zip(*results):
        assert (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("bits, backend", [(4, "gptq_triton"), (8, "gptq_triton"), (3, "gptq_torch")])
def test_a_gptq_model_answers_by_a_kernel_that_is_named(bits, backend):
    """Left to itself, gptqmodel compiles kernels on the way to one."""
    from gptqmodel.utils.backend import BACKEND

    config = types.SimpleNamespace(quantization_config={"bits": bits})
    gptq.name_backend(config)
    assert BACKEND(config.quantization_config["backend"]) and config.quantization_config["backend"] == backend
    config = types.SimpleNamespace(quantization_config={"bits": bits, "backend": "gptq_torch"})
    gptq.name_backend(config)
    assert config.quantization_config["backend"] == "gptq_torch"


# -- the loss of the output layer -------------------------------------------------------------------------------------

class Moved(TorchDispatchMode):
    """The bytes that operations read and write, without views and the few that gather and scatter choose."""

    NOT_COUNTED = torch.ops.aten.gather, torch.ops.aten.scatter_, torch.ops.aten.empty, torch.ops.aten.empty_like

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        if not function.is_view and function.overloadpacket not in self.NOT_COUNTED:
            read = [each for each in arguments if torch.is_tensor(each)]
            self.bytes += sum(each.nbytes for each in (*read, result) if torch.is_tensor(each))
        return result


@pytest.fixture
def fp32_sums(monkeypatch):
    """torch's products of 16-bit matrices with sums in fp32, which there are on GPUs only; one operation each."""
    plain = {"mm": torch.mm, "addmm": torch.addmm}

    def product(name, *matrices, out_dtype=None, out):
        if out_dtype is None:
            return plain[name](*matrices, out=out)
        assert out_dtype == out.dtype == torch.float32 and {each.dtype.itemsize for each in matrices[-2:]} == {2}
        modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Moved)]
        with _disable_current_modes():
            for mode in modes:
                mode.bytes += sum(each.nbytes for each in (*matrices, out))
            return out.copy_(plain[name](*(each.float() for each in matrices)))

    monkeypatch.setattr(head_loss, "has_fp32_sums", lambda device_type: True)
    for name in plain:
        monkeypatch.setattr(torch, name, functools.partial(product, name))


def summed_loss(hidden, weight, targets, dtype, trained=True, smoothing=0.0):
    """(loss, gradients of hidden and, if it is trained, of weight), of the same rounded numbers in any dtype."""
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(torch.float32 if trained else dtype)
    weight.requires_grad_(trained)
    loss = head_loss.SummedCrossEntropy.apply(hidden, weight, None, None, None, targets, smoothing)
    return loss.item(), *torch.autograd.grad(loss, [hidden, weight] if trained else [hidden])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_in_16_bits_is_that_in_32(fp32_sums, dtype, smoothing, monkeypatch):
    """Of the same numbers: logits and sums are not rounded, only their gradient is, once; in several chunks."""
    monkeypatch.setattr(head_loss, "chunk_bytes", lambda device_type: 4 * 100 * 50)
    torch.manual_seed(0)
    hidden, weight = torch.randn(333, 64).to(dtype).float(), torch.randn(100, 64).to(dtype).float()
    targets = torch.randint(100, (333,))
    wanted = summed_loss(hidden, weight, targets, torch.float32, smoothing=smoothing)
    found = summed_loss(hidden, weight, targets, dtype, smoothing=smoothing)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    for gradient, exact in zip(found[1:], wanted[1:]):
        assert (gradient.float() - exact).norm() < 4e-3 * exact.norm()


def test_sums_in_fp16_do_not_overflow(request):
    """A token that is wanted 200 times after states of 600: the sum is more than 65,504 before any loss scale."""
    hidden, targets = torch.full((200, 8), 600.0), torch.zeros(200, dtype=torch.long)
    weight = torch.zeros(10, 8)
    assert summed_loss(hidden, weight, targets, torch.float16)[2].isinf().any()
    request.getfixturevalue("fp32_sums")
    gradient = summed_loss(hidden, weight, targets, torch.float16)[2]
    assert torch.allclose(gradient, summed_loss(hidden, weight, targets, torch.float32)[2], rtol=2e-3)


@pytest.mark.parametrize("trained, most", [(True, 22), (False, 20)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_that_the_loss_moves_for_each_logit(fp32_sums, dtype, trained, most):
    """4 for the product, 8 for log_softmax in place, 6 for the gradient, 2 for each product with that."""
    tokens, vocabulary, size = 512, 8192, 4
    hidden, targets = torch.randn(tokens, size), torch.randint(vocabulary, (tokens,))
    with Moved() as moved:
        summed_loss(hidden, torch.randn(vocabulary, size), targets, dtype, trained)
    assert most <= moved.bytes / (tokens * vocabulary) < most + 1


# -- loading ----------------------------------------------------------------------------------------------------------

PEAK = """
import json, re, sys
import torch, finetune
from mechanisms import loading, strategies
plain, asked = loading.AutoModelForCausalLM.from_pretrained, []
def load(path, device_map, **options):
    asked.append(str(device_map))
    return plain(path, device_map=device_map and {"": "meta"}, **options)
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
def peak(rank):
    finetune.TrainingArguments.device = torch.device("cuda", rank)
    before = kilobytes("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
    model = finetune.load_model(arguments[0], arguments[2], arguments[3], config, tokenizer)
    return (kilobytes("VmHWM") - before) * 1024 / sum(weight.nbytes for weight in model.parameters())
words = "--data_path x --use_cpu --bf16 --use_lora --model_name_or_path".split()
arguments = finetune.parse_arguments([*words, sys.argv[1]])
config, tokenizer = loading.load_config(sys.argv[1]), finetune.load_tokenizer(sys.argv[1])
loading.AutoModelForCausalLM.from_pretrained = load
peaks = [peak(0), peak(1)]
strategies.device_map = lambda training_args: None
print(json.dumps([asked, *peaks, peak(0)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_each_rank_loads_to_its_own_device(make_model):
    """Two ranks with a GPU each, planted ones that take no memory here: nor does the machine's, for a model that takes
    all of its size where it is loaded into that first."""
    model = make_model(hidden_size=1024, num_layers=4)
    run = subprocess.run([sys.executable, "-c", PEAK, str(model)], cwd=ROOT, capture_output=True, text=True,
                         timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    asked, *on_their_own, in_memory = json.loads(run.stdout.splitlines()[-1])
    assert asked == [*(f"{{'': device(type='cuda', index={rank})}}" for rank in (0, 1)), "None"]
    assert max(on_their_own) < 0.2 and in_memory > 1


@pytest.mark.parametrize("settings, loads_to_device", [
    ({}, True), ({"stage": 2}, True), ({"stage": 3}, False), ({"fsdp": "full_shard"}, False)])
def test_what_is_divided_while_it_is_loaded_has_no_device(settings, loads_to_device):
    stage = settings.get("stage")
    deepspeed = {"hf_deepspeed_config": types.SimpleNamespace(is_zero3=lambda: stage == 3)} if stage else {}
    arguments = types.SimpleNamespace(device=GPU, fsdp=settings.get("fsdp"), **deepspeed)
    assert strategies.device_map(arguments) == ({"": GPU} if loads_to_device else None)
