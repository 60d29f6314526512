"""What comes after a finished folder: the commands that serve it, and the recipe that Ollama needs."""

import os
import re
import shlex

from mechanisms.errors import UserError

OLLAMA_NAMES = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k",
                "repetition_penalty": "repeat_penalty"}
# An adapter of the text class names layers as that has them, and not as the whole model has. Can go when vLLM matches
# the names, or refuses them (https://github.com/vllm-project/vllm/issues/48019).
IGNORED = ("vLLM serves this model whole, with its vision tower, and ignores adapters of its text part without a word: "
           "serve the merged folder")
VLLM_RANKS = 1, 8, 16, 32, 64, 128, 256, 320, 512  # that its --max-lora-rank knows


def modelfile(tokenizer, generation):
    """Text of the Modelfile that makes Ollama build the prompts of this tokenizer's chat template.

    Raises UserError if the template writes a conversation of plain text in another way than ChatML.
    """
    turns = [{"role": role, "content": f"{role}'s words"} for role in ("system", "user", "assistant", "user")]
    chatml = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if prompt != f"{chatml}<|im_start|>assistant\n":
        raise UserError("--ollama: this model's chat template is not plain ChatML, and no other is known here: leave "
                        "--ollama out, and serve the folder with vLLM or llama.cpp, which read the template itself")
    without_system = tokenizer.apply_chat_template(turns[1:2], tokenize=False, add_generation_prompt=True)
    default = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", without_system, re.DOTALL)
    parameters = [("stop", f'"{token}"') for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
    if generation.do_sample:
        parameters += [(ollama, value) for name, ollama in OLLAMA_NAMES.items()
                       if (value := getattr(generation, name)) is not None]
    else:
        parameters.append(("temperature", 0))
    return ('FROM ./model.gguf\n\n'
            'TEMPLATE """{{- if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}\n'
            '{{- range .Messages }}\n'
            '{{- if or (eq .Role "user") (eq .Role "assistant") }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
            '{{ end }}\n'
            '{{- end }}<|im_start|>assistant\n"""\n\n'
            + (f'SYSTEM """{default[1]}"""\n\n' if default else "")
            + "".join(f"PARAMETER {name} {value}\n" for name, value in parameters))


def served_name(folder):
    """What a server calls the model or adapter in `folder`."""
    return re.sub(r"[^a-z0-9._-]+", "-", os.path.basename(os.path.abspath(folder)).lower()).strip("-.") or "model"


def adapter_hint(folder, adapter):
    """The vLLM command for the adapter in `folder` beside its base model, as a list of one line; none if it has none.

    adapter: its peft.LoraConfig. vLLM takes adapters of linear layers alone.
    """
    rank = next((rank for rank in VLLM_RANKS if rank >= adapter.r), None)
    if rank is None or adapter.modules_to_save or adapter.trainable_token_indices or adapter.bias != "none" \
            or adapter.use_dora or adapter.target_parameters:
        return []
    path, base = shlex.quote(folder), shlex.quote(adapter.base_model_name_or_path)
    return [f"  vLLM:  vllm serve {base} --tokenizer {path} --enable-lora --max-lora-rank {rank} --lora-modules "
            f"{served_name(folder)}={path}"]


def serving_hints(folder, ollama):
    """The commands that go on from the merged folder, as lines."""
    path = shlex.quote(folder)
    gguf, recipe = (shlex.quote(os.path.join(folder, name)) for name in ("model.gguf", "Modelfile"))
    name = served_name(folder)
    return [f"  chat:       python chat.py {path}",
            f"  vLLM:       vllm serve {path}",
            f"  SGLang:     sglang serve --model-path {path}",
            f"  MLX:        mlx_lm.server --model {path}",
            f"  llama.cpp:  python llama.cpp/convert_hf_to_gguf.py {path} --outtype auto --outfile {gguf}",
            f"              llama-server -m {gguf}",
            "  Ollama:     " + (f"ollama create {name} -f {recipe} && ollama run {name}   (after that conversion)"
                                if ollama else "merge with --ollama, which writes its Modelfile")]
