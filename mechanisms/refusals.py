"""Values of flags that would not do here what they say: refused by name, with the reason and what to do instead.

A table for each kind of refusal. flags.py reads them before anything is imported, and docs/flags.md shows them. What
only torch and transformers can tell, such as whether an optimizer works on this machine, is in trials.py.
"""

import operator
from typing import NamedTuple

OTHERS = ()  # every value but the default


class Refused(NamedTuple):
    """Values of some flags, and why they are refused."""

    flags: str
    values: tuple  # OTHERS, or the values that are refused
    why: str
    beside: tuple = ()  # only where one of these is given as well


REFUSED = (
    Refused("do_train", ("False",), "finetune.py always trains; chat.py answers, and --eval_data_path measures"),
    Refused("do_eval", ("False",), "evaluated is what --eval_data_path or --eval_ratio gives: leave these out",
            beside=("--eval_data_path", "--eval_ratio")),
    Refused("do_predict", OTHERS, "answers are not written here: use chat.py"),
    Refused("max_steps", ("0",), "leave it out to train --num_train_epochs"),
    # The network and its loss
    Refused("torch_compile torch_compile_backend torch_compile_mode", OTHERS,
            "the network is not tested compiled, with rows that differ in length from step to step: leave it out"),
    Refused("use_cache", OTHERS, "training keeps no keys and values of earlier tokens: leave it out"),
    Refused("liger_kernel_config", OTHERS,
            "--use_liger_kernel takes RMSNorm, SwiGLU and RoPE of Liger and not its loss: leave it out"),
    Refused("neftune_noise_alpha", OTHERS,
            "its noise shrinks with the length of a row, which here holds many samples: leave it out"),
    Refused("average_tokens_across_devices", OTHERS,
            "the loss is the mean over the tokens of all ranks, so that any number of them gives the same: leave it "
            "out"),
    Refused("logging_nan_inf_filter", OTHERS, "a loss that is NaN or infinite stops the run: leave it out"),
    Refused("parallelism_config", OTHERS, "tensor and context parallelism are not supported: use --deepspeed"),
    Refused("accelerator_config", OTHERS,
            "how samples come to ranks and batches is settled here: use --per_device_train_batch_size and "
            "--gradient_accumulation_steps"),
    # Optimizers
    Refused("optim", ("adamw_torch_xla", "adamw_torch_npu_fused"), "it is for TPUs or NPUs: use adamw_torch"),
    Refused("optim", ("adamw_anyprecision",), "its package, torchdistx, is no longer maintained: use adamw_8bit"),
    Refused("optim", ("adamw_torch_4bit", "adamw_torch_8bit"),
            "whether its state is finite cannot be checked, and without that no checkpoint is saved: use adamw_8bit"),
    Refused("optim", ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
                      "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw",
                      "apollo_adamw_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_radam",
                      "schedule_free_adamw", "schedule_free_sgd", "stable_adamw"),
            "its package is not in requirements.txt, and nothing here was tested with it: for less memory use "
            "adamw_8bit, adafactor or --use_lora"),
    Refused("optim_target_modules", OTHERS, "it is for GaLore and APOLLO, which are refused: leave it out"),
    # Data
    Refused("auto_find_batch_size", OTHERS,
            "a smaller batch would make more steps than the schedule has: give a smaller "
            "--per_device_train_batch_size with more --gradient_accumulation_steps"),
    Refused("remove_unused_columns", OTHERS, "samples have no unused columns: leave it out"),
    Refused("label_names", OTHERS, "the labels of a sample are made here: leave it out"),
    Refused("length_column_name", OTHERS, "the lengths of the samples are known: leave it out"),
    Refused("train_sampling_strategy", ("group_by_length", "batch_rebalance"),
            "nothing is padded here, so that batches of similar lengths gain nothing: leave it out"),
    Refused("dataloader_in_order", OTHERS, "a resumed run could not repeat the order of the batches: leave it out"),
    Refused("include_num_input_tokens_seen", OTHERS,
            "tokens are always counted, and there is no padding among them: leave it out"),
    # Evaluation
    Refused("prediction_loss_only eval_accumulation_steps batch_eval_metrics include_for_metrics "
            "eval_do_concat_batches eval_use_gather_object", OTHERS,
            "an evaluation gives the loss alone and keeps no predictions: leave it out"),
    Refused("bf16_full_eval fp16_full_eval", OTHERS,
            "the weights would be saved in that precision after the last evaluation: leave it out, the compute is in "
            "bf16 or fp16 anyway"),
    Refused("greater_is_better", ("True",), "the metric is the loss, and less is better: leave it out"),
    Refused("report_to", ("all",), "name the tracker that you want"),
    # Checkpoints and where they go
    Refused("enable_jit_checkpoint", OTHERS, "SIGTERM and the other signals already save a checkpoint: leave it out"),
    Refused("ignore_data_skip", OTHERS,
            "a resumed run would train the first records of the epoch again: leave it out"),
    Refused("restore_callback_states_from_checkpoint", OTHERS,
            "all that a resumed run needs is restored anyway, and a request to stop must not be: leave it out"),
    Refused("hub_token", OTHERS, "others could read it in the list of processes: hf auth login, or set HF_TOKEN"),
    Refused("hub_strategy hub_always_push hub_revision", OTHERS,
            "--push_to_hub uploads the finished result, once, and no checkpoint: leave it out"),
    Refused("debug", ("tpu_metrics_debug",), "it is for TPUs: leave it out"),
)

# (test, its words, limit, flags): what a number has to be.
LIMITS = (
    (operator.ge, "at least", 1,
     "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps model_max_length lora_r "
     "lora_alpha save_total_limit early_stopping torch_empty_cache_steps ddp_timeout ddp_bucket_cap_mb "
     "dataloader_prefetch_factor"),
    (operator.gt, "more than", 0, "num_train_epochs logging_steps save_steps eval_steps loss_spike_factor"),
    (operator.ge, "at least", 0,
     "learning_rate weight_decay warmup_steps max_grad_norm adam_epsilon adam_beta1 adam_beta2 label_smoothing_factor "
     "eval_delay dataloader_num_workers seed data_seed skip_bad_rows lora_dropout"),
    (operator.lt, "below", 1, "adam_beta1 adam_beta2 label_smoothing_factor lora_dropout"),
    (operator.lt, "below", 2**32, "seed data_seed"),
)

# flag: what has to be given as well, one of these; without a value: any but the default.
NEEDS = {
    "do_eval": ("--eval_data_path", "--eval_ratio"),
    "eval_on_start": ("--eval_data_path", "--eval_ratio"),
    "eval_steps": ("--eval_strategy steps",),
    "eval_delay": ("--eval_strategy",),
    "early_stopping": ("--eval_strategy",),
    "load_best_model_at_end": ("--eval_strategy",),
    "metric_for_best_model": ("--eval_strategy",),
    "hub_model_id": ("--push_to_hub",),
    "hub_private_repo": ("--push_to_hub",),
    "run_name": ("--report_to",),
    "project": ("--report_to",),
    "trackio_space_id": ("--report_to trackio",),
    "trackio_bucket_id": ("--report_to trackio",),
    "trackio_static_space_id": ("--report_to trackio",),
    "activation_checkpointing_kwargs": ("--gradient_checkpointing True",),
    "dataloader_persistent_workers": ("--dataloader_num_workers",),
    "dataloader_prefetch_factor": ("--dataloader_num_workers",),
    "dataloader_multiprocessing_context": ("--dataloader_num_workers",),
    "fsdp_config": ("--fsdp",),
}


def never_taken() -> set[str]:
    """The flags that take no value but their default."""
    return {name for row in REFUSED if row.values == OTHERS for name in row.flags.split()}
