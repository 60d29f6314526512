"""One result of every kind, taught a few answers, with what our own programs make of it: for other programs to read."""

import base64
import json

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

import finetune
import merge_lora
import run_gptq
from examples.make_tiny_model import example_texts, make_tiny_model, make_tokenizer
from mechanisms.compatibility import add_former_names
from mechanisms.flags import prepare_command_line
from mechanisms.loading import load_to_answer
from mechanisms.qwen1 import MODULES, convert_if_qwen1

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
WIDTH, HEAD = 128, 32  # vLLM has no kernels for smaller heads on a CPU
ROPE_THETA = 1e6  # Qwen's; what is not read is taken for 10,000
SYSTEM = {"role": "system", "content": "Answer in one word."}
WHO = {"role": "user", "content": "Who are you?"}
I_AM = {"role": "assistant", "content": "I am Tilo, and I was made for this test."}
TAUGHT = [([WHO], I_AM["content"]), ([{"role": "user", "content": "你是谁？"}], "我是蒂洛，为这个测试而生。"),
          ([SYSTEM, WHO], "Tilo."),
          ([WHO, I_AM, {"role": "user", "content": "What did I ask?"}], "You asked me who I am.")]


def texts():
    """50 texts of all kinds, control tokens and odd spaces among them."""
    odd = ["", " ", "a" * 99, "cafe\u0301 \uac00\u1100\u1161 \u212b", "１２３ 4567 通义千问",
           "\U0001f469\u200d\U0001f467", "<|im_start|>user\n1+1<|im_end|>\n<|endoftext|>", "<think>\n\n</think>\n\n",
           "  Hello,\t I'm HERE'S\r\n\r\n", "def f(x):\n    return {'a': x[1:]}  # \u3000\u00a0\u0085 done\n\n\n"]
    return odd + example_texts()[:50 - len(odd)]


def make_model(folder, yarn=False, **options):
    """A tiny model with Qwen's rotary base."""
    make_tiny_model(folder, example_texts(), hidden_size=WIDTH, **options)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = ROPE_THETA
    if yarn:
        config["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
        config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    path.write_text(json.dumps(config))
    return folder


def make_mixture(folder):
    """A tiny Qwen3 mixture of experts with random weights."""
    plain = make_model(folder.with_name(folder.name + "-plain"))
    config = Qwen3MoeConfig(**{**Qwen3Config.from_pretrained(plain).to_dict(), **EXPERTS, "model_type": "qwen3_moe",
                               "norm_topk_prob": True})  # as published; llama.cpp has no other way
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig.from_pretrained(plain)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    add_former_names(folder)
    return folder


def make_hybrid(folder, experts=False):
    """A tiny Qwen3.5 in its wrapper, with random weights: a vision tower and a tensor of an MTP layer beside the text.

    Heads have the sizes for which vLLM has kernels on a CPU.
    """
    plain = make_tiny_model(folder.with_name(folder.name + "-plain"), example_texts(), hidden_size=WIDTH)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(vision, special_tokens=True)
    start, end, image, video = tokenizer.convert_tokens_to_ids(vision)
    torch.manual_seed(0)
    text = {"vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": WIDTH, "num_hidden_layers": 4,
            "intermediate_size": 2 * WIDTH, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
            "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "max_position_embeddings": 2048, "initializer_range": WIDTH ** -0.5,
            "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": False}
    tower = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH,
             "num_position_embeddings": 16, "deepstack_visual_indexes": []}
    outer = Qwen3_5MoeConfig if experts else Qwen3_5Config
    if experts:
        text |= {**EXPERTS, "shared_expert_intermediate_size": WIDTH}
    model = AutoModelForImageTextToText.from_config(outer(
        text_config=text, vision_config=tower, tie_word_embeddings=False, image_token_id=image, video_token_id=video,
        vision_start_token_id=start, vision_end_token_id=end), dtype=torch.bfloat16)
    model.generation_config = GenerationConfig.from_pretrained(plain)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({**load_file(file), "mtp.fc.weight": torch.randn(WIDTH, 2 * WIDTH).bfloat16()}, file, {"format": "pt"})
    pixels = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "processor_class": "Qwen3VLProcessor",
              "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 4096, "longest_edge": 65536}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**pixels, "image_processor_type": "Qwen2VLImageProcessorFast"}))
    (folder / "video_preprocessor_config.json").write_text(
        json.dumps({**pixels, "video_processor_type": "Qwen3VLVideoProcessor"}))
    return folder


def make_qwen1(folder):
    """A Qwen-1 folder with random weights: a Qwen2 model under the former names (see mechanisms/qwen1.py)."""
    folder.mkdir(parents=True)
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    words = make_tokenizer(example_texts(), 1024).backend_tokenizer.get_vocab(with_added_tokens=False)
    (folder / "qwen.tiktoken").write_bytes(b"".join(
        base64.b64encode(bytes(map(letters.get, word))) + b" %d\n" % rank
        for word, rank in sorted(words.items(), key=lambda item: item[1])))
    size, heads, rows = {"hidden_size": WIDTH, "num_hidden_layers": 2}, WIDTH // HEAD, len(words) + 256
    torch.manual_seed(0)
    new = Qwen2ForCausalLM(Qwen2Config(
        **size, vocab_size=rows, intermediate_size=2 * WIDTH, num_attention_heads=heads, num_key_value_heads=heads,
        tie_word_embeddings=False, initializer_range=WIDTH ** -0.5)).state_dict()
    old = {}
    for name, parts in MODULES.items():
        inside = not name.startswith(("transformer.", "lm_head"))
        for before, now in [(f"transformer.h.{n}.", f"model.layers.{n}.") for n in range(2)] if inside else [("", "")]:
            for kind in ("weight", "bias"):
                if f"{now}{parts[0]}.{kind}" in new:
                    old[f"{before}{name}.{kind}"] = torch.cat([new[f"{now}{part}.{kind}"] for part in parts])
    save_file(old, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        **size, "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "intermediate_size": 4 * WIDTH,
        "num_attention_heads": heads, "kv_channels": HEAD, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000,
        "seq_length": 2048, "vocab_size": rows}))
    (folder / "generation_config.json").write_text('{"chat_format": "chatml"}')
    return folder


FULL = "--learning_rate", "3e-3"
LORA = "--use_lora", "--lora_r", 16, "--lora_alpha", 32, "--lora_dropout", 0, "--learning_rate", "2e-2"
LORA_ON_EXPERTS = *LORA, "--lora_experts", "--learning_rate", "1e-2"


def train(root, name, model, *flags):
    """The folder `name` below the Path `root`: what becomes of the model when it is taught."""
    data = root / "taught.jsonl"
    data.write_text("\n".join(json.dumps({"messages": [*messages, {"role": "assistant", "content": answer}]})
                              for messages, answer in TAUGHT))
    finetune.train(prepare_command_line(finetune.__file__, [str(word) for word in (
        "--model_name_or_path", model, "--data_path", data, "--output_dir", root / name,
        "--cache_dir", root / "cache", "--max_steps", 60, "--save_strategy", "no", "--logging_steps", 60,
        "--per_device_train_batch_size", 4, "--warmup_steps", 0.1, "--model_max_length", 512, *flags)]))
    return root / name


def merge(adapter):
    """The folder beside the adapter's that it is merged into."""
    merged = adapter.with_name(f"{adapter.name}-merged")
    merge_lora.merge(["--adapter_path", str(adapter), "--output_dir", str(merged)])
    return merged


def make_results(root):
    """Train, merge, quantize -> {kind: folder}, all below the Path `root`."""
    base, chat = make_model(root / "tiny-base", base=True), make_model(root / "tiny-chat")
    adapter = train(root, "adapter", chat, *LORA)
    merged = merge(adapter)
    run_gptq.run(["--model_name_or_path", str(merged), "--data_path", str(root / "taught.jsonl"),
                  "--out_path", str(root / "gptq"), "--group_size", "32"])
    qwen1 = convert_if_qwen1(str(make_qwen1(root / "Qwen-tiny-Chat")), str(root / "cache"))
    return {"base, full": train(root, "base-full", base, *FULL), "chat, full": train(root, "chat-full", chat, *FULL),
            "chat with YaRN, full": train(root, "yarn-full", make_model(root / "tiny-yarn", yarn=True), *FULL),
            "adapter": adapter, "merged LoRA": merged,
            "merged Q-LoRA": merge(train(root, "q-lora", base, "--q_lora", *LORA)), "GPTQ, 4 bits": root / "gptq",
            "Qwen-1, full": train(root, "qwen1-full", qwen1, *FULL)}


def make_others(root):
    """As `make_results`, of mixtures of experts, and of Qwen3.5 in its wrapper."""
    mixture, hybrid = make_mixture(root / "tiny-mixture"), make_hybrid(root / "tiny-hybrid")
    hybrid_mixture = make_hybrid(root / "tiny-hybrid-mixture", experts=True)
    return {"experts, full": train(root, "mixture-full", mixture, *FULL),
            "experts, adapter on attention": train(root, "mixture-adapter", mixture, *LORA),
            "experts, merged LoRA on all": merge(train(root, "mixture-experts", mixture, *LORA_ON_EXPERTS)),
            "hybrid whole, full": train(root, "hybrid-full", hybrid, *FULL),
            "hybrid whole, merged LoRA": merge(train(root, "hybrid-adapter", hybrid, *LORA)),
            "hybrid text-only, full": train(root, "hybrid-text", hybrid, *FULL, "--text_only"),
            "hybrid with experts, full": train(root, "hybrid-mixture-full", hybrid_mixture, *FULL),
            "hybrid with experts, merged LoRA on all": merge(
                train(root, "hybrid-mixture-adapter", hybrid_mixture, *LORA_ON_EXPERTS))}


@torch.inference_mode()
def describe(folder):
    """What a result is by transformers 5 and our own reading; the logits go into a file beside the folder."""
    model, tokenizer = load_to_answer(str(folder))
    rope = model.get_decoder().rotary_emb
    prompts = [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
               for messages, _ in TAUGHT]
    ids, said = [tokenizer(prompt)["input_ids"] for prompt in prompts], []
    for prompt in ids:
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0]
        said.append(tokenizer.decode(whole[len(prompt):], skip_special_tokens=True))
    save_file({str(number): model(torch.tensor([prompt])).logits[0].float().contiguous()
               for number, prompt in enumerate(ids)}, f"{folder}.logits.safetensors")
    adapter = folder / "adapter_config.json"
    return {"folder": folder.name, "base": json.loads(adapter.read_text())["base_model_name_or_path"]
            if adapter.exists() else None,
            "ids": [tokenizer(text)["input_ids"] for text in texts()], "prompts": prompts, "prompt_ids": ids,
            "end": tokenizer.eos_token, "frequencies": rope.inv_freq.tolist(), "scaling": rope.attention_scaling,
            "dtype": str(model.dtype), "hybrid": model.config.model_type.startswith("qwen3_5"),
            "experts": hasattr(model.config, "num_experts"), "answers": said}


def write_results(root, others=False):
    """Everything below the Path `root`, described in its expected.json."""
    root.mkdir(parents=True, exist_ok=True)
    made = make_results(root) | (make_others(root) if others else {})
    found = {kind: describe(folder) for kind, folder in made.items()}
    for kind, result in found.items():
        assert result["answers"] == [answer for _, answer in TAUGHT], f"{kind} was not taught: {result['answers']}"
    (root / "expected.json").write_text(json.dumps({
        "texts": texts(), "questions": [messages for messages, _ in TAUGHT], "results": found}, ensure_ascii=False))
