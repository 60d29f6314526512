"""Read results with CTranslate2, which takes the ids from the tokenizer of transformers. See reading.py."""

import tempfile

import ctranslate2
import numpy as np
from ctranslate2.converters import TransformersConverter
from reading import read_all, same
from safetensors.numpy import load_file
from transformers import AutoTokenizer

LARGEST_DIFFERENCE = 1e-3  # of logits, in float32: its kernels are its own


def check(folder, result, expected):
    if result["base"] or (folder / "quantize_config.json").exists():
        return None  # it converts whole models of floating-point weights
    if result["scaling"] != 1 or result["hybrid"] or result["experts"]:
        return None  # it has no YaRN, no linear attention and no experts
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer.convert_ids_to_tokens(ids) for ids in result["prompt_ids"]]
    with tempfile.TemporaryDirectory() as converted:
        TransformersConverter(str(folder)).convert(converted, force=True)
        generator = ctranslate2.Generator(converted)
    said = generator.generate_batch(prompts, max_length=40, sampling_topk=1, include_prompt_in_result=False)
    logits, difference = load_file(f"{folder}.logits.safetensors"), 0
    for number, prompt in enumerate(prompts):
        found, wanted = np.array(generator.forward_batch([prompt]))[0], logits[str(number)]
        difference = max(difference, np.abs(found[:, :wanted.shape[1]] - wanted).max())
    return {"answers": same([tokenizer.decode(answer.sequences_ids[0], skip_special_tokens=True) for answer in said],
                            result["answers"]),
            "logits": bool(difference <= LARGEST_DIFFERENCE) or f"they differ by {difference:.1e}"}


read_all(ctranslate2.__version__, check)
