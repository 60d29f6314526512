"""What a run is, read off its flags: what a resumed run must share with its checkpoint, and what the model card says.

Every field of the four dataclasses counts, but for those named here. A new flag counts until somebody says that it does
not: forgotten, it is refused where it need not be, and never ignored where it must not be.
"""

import dataclasses
import hashlib
import json
import os

from mechanisms import checkpoints, strategies
from mechanisms.paths import source_name
from mechanisms.summary import items_per_step, step_count

# A resumed run may have other values of these: they change what is said, saved and measured, and not what is learned.
# (Flags that are refused, see refusals.py, always have the same.)
MAY_CHANGE = frozenset("""
    output_dir cache_dir resume_from_checkpoint lazy_preprocess skip_bad_rows
    do_train do_eval eval_data_path eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    load_best_model_at_end metric_for_best_model greater_is_better early_stopping sample_prompts
    logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica disable_tqdm
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics debug
    push_to_hub hub_model_id hub_private_repo
    save_dtype save_strategy save_steps save_total_limit save_only_model text_only save_on_each_node
    use_cpu local_rank ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_empty_cache_steps
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context loss_spike_factor trained_weights memory_limit verify_checkpoint
    trust_checkpoint dry_run join_batches
""".split())
# What these name counts, and not the name: a folder may have moved.
BY_CONTENT = frozenset({"model_name_or_path", "data_path", "lora_weight_path", "deepspeed"})
# These count together, as samples per step and steps of the whole run.
TOGETHER = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"})
# Of a DeepSpeed config: what it prints, and how a checkpoint is read.
DEEPSPEED_MAY_CHANGE = ("checkpoint", "steps_per_print", "wall_clock_breakdown", "dump_state", "flops_profiler",
                        "comms_logger", "tensorboard", "wandb", "comet", "csv_monitor")


def run_facts(arguments, dataset, config, tokenizer) -> dict:
    """{name: JSON value}, equal for runs that train the same thing in the same order.

    Args:
        arguments: the (model, data, training, lora) arguments.
        dataset: what is trained on, packed if --packing.
        config: the model's.
    """
    model_args, _, training_args, lora_args = arguments
    facts = {name: value for group in arguments for name, value in _plain_fields(group).items()
             if name not in MAY_CHANGE | BY_CONTENT | TOGETHER}
    return {
        "base model": _named(source_name(model_args.model_name_or_path), _content_of_model(model_args, config)),
        "tokenizer": _digest(tokenizer.backend_tokenizer.to_str()),
        "chat template": _digest(json.dumps(tokenizer.chat_template)),
        "data": _digest(dataset.digests.tobytes()),
        "samples": len(dataset.digests),
        "adapter to continue": _named(lora_args.lora_weight_path, _content_of_folder(lora_args.lora_weight_path)),
        "samples per step": items_per_step(training_args),
        checkpoints.MORE_STEPS: step_count(training_args, dataset),
        **{f"deepspeed {name}": value for name, value in _flat(_deepspeed_config(training_args.deepspeed)).items()
           if not name.startswith(DEEPSPEED_MAY_CHANGE)},
        **strategies.resume_facts(training_args), **facts}


def default_values(arguments) -> dict:
    """{field: JSON value of its default} of all arguments."""
    return {name: value for group in arguments for name, value in _plain(_defaults(group)).items()}


def settings(arguments) -> dict:
    """{flag: JSON value} for the model card: those that a resumed run must share, if this program declares them itself
    or they are not as they come. Those of adapters only where there are any."""
    training_args, lora_args = arguments[2:]
    shown = {}
    for group in arguments:
        if group is lora_args and not training_args.use_lora:
            continue
        own, defaults = type(group).__annotations__, _plain(_defaults(group))
        for name, value in _plain_fields(group).items():
            if name not in MAY_CHANGE | BY_CONTENT and (name in own or value != defaults.get(name)):
                shown[name] = value
    return shown


def _defaults(group):
    return {field.name: field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            for field in dataclasses.fields(group)}


def _plain_fields(group):
    return _plain({field.name: getattr(group, field.name) for field in dataclasses.fields(group)})


def _plain(values):
    """The values as JSON would give them back."""
    return json.loads(json.dumps(values, default=str))


def _flat(config, prefix=""):
    """{"a.b": value} of nested dicts."""
    flat = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _deepspeed_config(config):
    if not isinstance(config, str):
        return config or {}
    with open(config, encoding="utf-8") as file:
        return json.load(file)


def _named(name, content):
    """Something that is the same under another name."""
    return {"name": name, "content": content}


def _content_of_model(model_args, config):
    """The revision of a model of the Hub, or a digest of a folder."""
    revision = getattr(config, "_commit_hash", None)
    return f"revision {revision}" if revision else _content_of_folder(model_args.model_name_or_path)


def _content_of_folder(path):
    """Digest of the config and weight files of a model or adapter folder; "" if there is none.

    Of a weight file: its size, and sixteen pieces out of it, as reading all of a large model would take minutes. Files
    that training would write differ in each of them.
    """
    if not path or not os.path.isdir(path):
        return path
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(os.listdir(path)):
        weights = name.endswith((".safetensors", ".bin"))
        if weights or name in ("config.json", "adapter_config.json"):
            with open(os.path.join(path, name), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{name} {size}\n".encode())
                pieces, length = (16, 1 << 16) if weights and size > 1 << 24 else (1, size)
                for piece in range(pieces):
                    file.seek(piece * (size - length) // max(1, pieces - 1))
                    digest.update(file.read(length))
    return digest.hexdigest()


def _digest(content):
    return hashlib.blake2b(content if isinstance(content, bytes) else content.encode(), digest_size=8).hexdigest()
