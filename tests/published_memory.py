"""Memory of training that the original program's documentation publishes, in GB, and how it was trained there.

https://github.com/QwenLM/Qwen#profiling-of-memory-and-speed: A100 of 80 GB, one sample a batch, 8 batches a step,
gradient checkpointing, LoRA of rank 64; a row for every model and method, by tokens of the sample.
"""

from peft import LoraConfig
from transformers import Qwen2Config

TOKENS = 256, 512, 1024, 2048, 4096, 8192

# size: (hidden size, size of the MLP, layers, heads, vocabulary)
SHAPES = {"1.8B": (2048, 5504, 24, 16, 151936), "7B": (4096, 11008, 32, 32, 151936),
          "14B": (5120, 13696, 40, 40, 152064), "72B": (8192, 24576, 80, 64, 152064)}

# (size, method, GPUs): GB of all of them together, for each number of TOKENS
PUBLISHED = {
    ("1.8B", "LoRA", 1): (6.7, 7.4, 8.4, 11.0, 16.2, 21.8),
    ("1.8B", "LoRA (emb)", 1): (13.7, 14.0, 14.0, 15.1, 19.7, 27.7),
    ("1.8B", "Q-LoRA", 1): (5.8, 6.0, 6.6, 7.8, 10.2, 15.8),
    ("1.8B", "full", 1): (43.5, 43.5, 43.5, 43.5, 47.1, 48.3),
    ("7B", "LoRA", 1): (20.1, 20.4, 21.5, 23.8, 29.7, 36.6),
    ("7B", "LoRA (emb)", 1): (33.7, 34.1, 35.2, 35.1, 39.2, 48.5),
    ("7B", "Q-LoRA", 1): (11.5, 11.5, 12.3, 13.9, 16.9, 23.5),
    ("7B", "full", 2): (139.2, 148.0, 162.0),
    ("14B", "LoRA", 1): (34.6, 35.1, 35.3, 37.4, 42.5, 55.2),
    ("14B", "LoRA (emb)", 1): (51.2, 51.1, 51.5, 54.1, 56.8, 67.7),
    ("14B", "Q-LoRA", 1): (18.7, 18.4, 18.9, 19.9, 23.0, 27.9),
    ("72B", "LoRA", 4): (215.4, 217.7, 222.6, 228.8, 249.0, 289.2),
    ("72B", "Q-LoRA", 1): (61.4, 61.4, 62.9, 64.1, 68.0, 75.6),
}


def config(size, four_bits=False):
    """Qwen-1 under the names of Qwen2; four_bits: its published GPTQ Int4."""
    hidden, mlp, layers, heads, vocabulary = SHAPES[size]
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False,
                                         "sym": True}} if four_bits else {}
    return Qwen2Config(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=False, **quantized)


def adapter(embeddings=False):
    return LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, lora_dropout=0.05, target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
        modules_to_save=["embed_tokens", "lm_head"] if embeddings else None)
