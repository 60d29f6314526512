"""Read results with the transformers that is imported here. See reading.py."""

import torch
import transformers
from reading import read_all, same
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

LARGEST_DIFFERENCE = 1e-5  # of logits, in float32


@torch.inference_mode()
def check(folder, result, expected):
    if result["hybrid"]:
        return None  # 4.57 does not know Qwen3.5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
               for messages in expected["questions"]]
    found = {"ids": same([*prompts, tokenizer.eos_token, *[tokenizer(text)["input_ids"] for text in expected["texts"]]],
                         [*result["prompts"], result["end"], *result["ids"]])}
    config = AutoConfig.from_pretrained(result["base"] or folder)
    rope = AutoModelForCausalLM.from_config(config).get_decoder().rotary_emb
    found["rope"] = same([rope.attention_scaling, *rope.inv_freq.tolist()],
                         [result["scaling"], *result["frequencies"]])
    if getattr(config, "quantization_config", None):
        return found  # other packages read those weights
    model = AutoModelForCausalLM.from_pretrained(result["base"] or folder, torch_dtype="auto")
    if result["base"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    model.eval()
    said, difference, logits = [], 0, load_file(f"{folder}.logits.safetensors")
    for number, prompt in enumerate(result["prompt_ids"]):
        ids = torch.tensor([prompt])
        difference = max(difference, (model(ids).logits[0].float() - logits[str(number)]).abs().max().item())
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)[0]
        said.append(tokenizer.decode(whole[len(prompt):], skip_special_tokens=True))
    return {**found, "answers": same(said, result["answers"]),
            "logits": difference <= LARGEST_DIFFERENCE or f"they differ by {difference:.1e}"}


read_all(transformers.__version__, check)
