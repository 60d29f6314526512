"""Read results with llama.cpp, converted to GGUF by its own converter. See reading.py."""

import subprocess
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from reading import read_all, same
from safetensors.numpy import load_file

SOURCE = Path(llama_cpp.__file__).parents[1] / "llama.cpp"
LARGEST_DIFFERENCE = 1e-2  # of logits, in float32: its kernels are its own
# The converter knows tokenizers by the ids that they give to one text. Ours has Qwen's way of cutting text into words,
# and words of its own.
CONVERT = f"""
import sys
sys.path[:0] = [{str(SOURCE)!r}, {str(SOURCE / "gguf-py")!r}]
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda *_: "qwen2"
convert_hf_to_gguf.main()
"""


def check(folder, result, expected):
    if result["hybrid"] or result["base"] or (folder / "quantize_config.json").exists():
        return None  # its converter takes whole models of floating-point weights; of hybrids this is untried
    with tempfile.TemporaryDirectory() as converted:
        gguf = f"{converted}/model.gguf"
        subprocess.run([sys.executable, "-c", CONVERT, folder, "--outtype", "f32", "--outfile", gguf], check=True)
        model = llama_cpp.Llama(gguf, n_ctx=256, n_batch=256, logits_all=True, verbose=False)
    ids = [model.tokenize(prompt.encode(), add_bos=False, special=True) for prompt in result["prompts"]]
    found, said = {"ids": same(ids, result["prompt_ids"])}, []
    for messages in expected["questions"]:
        answer = model.create_chat_completion(messages, temperature=0, max_tokens=40)
        said.append(answer["choices"][0]["message"]["content"])
    difference, logits = 0, load_file(f"{folder}.logits.safetensors")
    for number, prompt in enumerate(result["prompt_ids"]):
        model.reset()
        model.eval(prompt)
        difference = max(difference, np.abs(model.scores[:len(prompt)] - logits[str(number)]).max())
    return {**found, "answers": same(said, result["answers"]),
            "logits": bool(difference <= LARGEST_DIFFERENCE) or f"they differ by {difference:.1e}"}


read_all(llama_cpp.__version__, check)
