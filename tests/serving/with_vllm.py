"""Read results with vLLM on a CPU. See reading.py."""

import gc

import torch
import vllm
from reading import read_all, same
from safetensors.torch import load_file
from vllm.lora.request import LoRARequest

LARGEST_DIFFERENCE = 1e-3  # of log-probabilities, in float32: vLLM's kernels are its own


def check(folder, result, expected):
    if result["base"] and result["experts"]:
        return None  # adapters beside experts need Triton's kernels, which a CPU has not
    options = {"enable_lora": True, "max_lora_rank": 64} if result["base"] else {}
    # vLLM reads those in 16 bits only
    rounded = result["hybrid"] or (folder / "quantize_config.json").exists()
    llm = vllm.LLM(model=result["base"] or str(folder), tokenizer=str(folder), max_model_len=256, enforce_eager=True,
                   gpu_memory_utilization=0.2, dtype="bfloat16" if rounded else "float32", **options)
    adapter = LoRARequest("adapter", 1, str(folder)) if result["base"] else None
    tokenizer = llm.get_tokenizer()
    found = {"ids": same([tokenizer(text)["input_ids"] for text in expected["texts"]], result["ids"])}
    said = llm.chat(expected["questions"], vllm.SamplingParams(temperature=0, max_tokens=40), lora_request=adapter)
    if found["ids"] is True:
        found["ids"] = same([answer.prompt_token_ids for answer in said], result["prompt_ids"])
    found["answers"] = same([answer.outputs[0].text for answer in said], result["answers"])
    if not rounded and not adapter:  # on a CPU, an adapter and prompt_logprobs together end in an error of einsum
        read = llm.generate([{"prompt_token_ids": ids} for ids in result["prompt_ids"]],
                            vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
        difference, logits = 0, load_file(f"{folder}.logits.safetensors")
        for number, (prompt, answer) in enumerate(zip(result["prompt_ids"], read)):
            wanted = torch.log_softmax(logits[str(number)], -1)
            for place, token in enumerate(prompt[1:], 1):
                got = answer.prompt_logprobs[place][token].logprob
                difference = max(difference, abs(got - wanted[place - 1, token].item()))
        found["logits"] = difference <= LARGEST_DIFFERENCE or f"log-probabilities differ by {difference:.1e}"
    del llm
    gc.collect()
    return found


if __name__ == "__main__":  # vLLM starts processes of its own, which import this file
    read_all(vllm.__version__, check)
