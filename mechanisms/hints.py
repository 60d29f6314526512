"""Names that flags have in other programs (LLaMA-Factory, Axolotl, TRL, ms-swift, ...), and what to write here."""

import re
from collections.abc import Set

# What to write here: the names it has elsewhere. A row counts for a script that has all the flags it names, and the
# first one that counts is given.
FLAGS = {
    "--model_name_or_path": """model model_path model_name model_id model_id_or_path base_model model_name_or_id
        pretrained_model_name_or_path pretrained_model pretrained m""",
    "--adapter_path": """model model_name_or_path adapter adapters adapter_name_or_path lora_path lora_model_dir
        lora_weight_path ckpt_dir""",
    "--data_path FILE": """data dataset datasets dataset_path dataset_name dataset_dir data_dir data_file data_files
        train_file train_files train_data train_dataset train_path training_data custom_dataset_path
        custom_train_dataset_path d""",
    "--columns, as in --columns prompt=question response=answer": """prompt_column response_column field_messages
        column_mapping input_column output_column messages_field field_instruction field_output""",
    "--eval_data_path FILE": """eval_dataset eval_data eval_file eval_path val_data val_dataset val_file validation_data
        validation_file test_file custom_val_dataset_path""",
    "--eval_ratio": """val_size val_set_size val_ratio validation_split validation_split_percentage
        split_dataset_ratio dataset_test_ratio test_size""",
    "--model_max_length": """cutoff_len max_seq_length max_seq_len max_length max_len max_source_length sequence_len
        seq_length seq_len sequence_length block_size max_tokens""",
    "--max_len": "cutoff_len max_seq_length max_seq_len max_length model_max_length sequence_len seq_len seqlen",
    "--max_new_tokens": "max_length max_len max_tokens max_gen_len max_new_token",
    "--out_path": "output output_dir output_path out out_dir save_dir save_path export_dir o",
    "--output_dir": "output output_path out out_path out_dir output_folder save_dir save_path export_dir o",
    "--bits": "wbits w_bit nbits quant_bits quantization_bit",
    "--max_samples": "nsamples n_samples num_samples num_calibration_samples",
    "--group_size": "groupsize q_group_size quant_group_size",
    "--learning_rate": "lr base_lr max_lr",
    "--num_train_epochs": "epochs epoch num_epochs n_epochs max_epochs train_epochs nepochs",
    "--max_steps": """max_iters max_iter num_steps train_iters total_steps num_train_steps num_training_steps
        max_train_steps""",
    "--per_device_train_batch_size": """batch_size train_batch_size micro_batch_size per_gpu_train_batch_size
        per_device_batch_size train_micro_batch_size_per_gpu bs mbs""",
    "--per_device_eval_batch_size": "eval_batch_size val_batch_size per_gpu_eval_batch_size micro_eval_batch_size",
    "--gradient_accumulation_steps": """grad_accum gradient_accumulation grad_accumulation_steps accumulation_steps
        grad_acc_steps accumulate_grad_batches""",
    "--lr_scheduler_type": "lr_scheduler scheduler scheduler_type lr_schedule lr_decay_style",
    "--warmup_steps": "warmup num_warmup_steps lr_warmup_steps warmup_iters lr_warmup_fraction warmup_proportion",
    "--optim": "optimizer optimizer_type optimizer_name",
    "--optim adafactor": "adafactor",
    "--max_grad_norm": "grad_clip clip_grad gradient_clipping gradient_clip_val max_norm",
    "--gradient_checkpointing": "use_gradient_checkpointing enable_gradient_checkpointing grad_checkpointing",
    "--gradient_checkpointing False": "disable_gradient_checkpointing",
    "--dtype": "torch_dtype precision model_dtype",
    "--bf16 or --fp16": """dtype torch_dtype precision mixed_precision compute_dtype bnb_4bit_compute_dtype
        pure_bf16 half""",
    "--use_cpu": "no_cuda cpu",
    "--seed": "random_seed",
    "--use_lora": "lora use_peft enable_lora peft",
    "--use_lora, --q_lora, or none of them to train all parameters": """finetuning_type train_type tuner_type sft_type
        training_type adapter tuner_backend peft_method full_finetuning""",
    "--q_lora, which holds the base model in 4 bits": """load_in_4bit load_in_8bit use_4bit use_qlora qlora bits
        quantization_bit quantization_type quantization_method quant_bits quant_method quant_type double_quant
        bnb_4bit_quant_type bnb_4bit_use_double_quant""",
    "--lora_r": "lora_rank r rank lora_dim",
    "--lora_alpha": "alpha lora_scaling",
    "--lora_dropout": "lora_dropout_p lora_dropout_rate lora_drop dropout",
    "--lora_target_modules": "lora_target lora_targets lora_modules target_modules lora_target_linear",
    "--lora_experts": "lora_target_parameters target_parameters",
    "--use_rslora": "rslora",
    "--use_dora": "dora",
    "--lora_bias": "bias lora_bias_trainable",
    "--lora_embeddings": "additional_target modules_to_save lora_modules_to_save",
    "--lora_weight_path": """adapter_name_or_path adapter_path adapters lora_model_dir lora_path lora_weights
        lora_checkpoint peft_path""",
    "--loss_on": """train_on_inputs train_on_input train_on_prompt mask_inputs mask_history assistant_only_loss
        completion_only_loss train_on_completions_only train_on_responses_only roles_to_train loss_scale""",
    "--overlong": "truncation_strategy excess_length_strategy truncation_mode",
    "--packing": "sample_packing neat_packing efficient_packing",
    "--lazy_preprocess": "lazy_tokenize streaming lazy",
    "--deepspeed": "deepspeed_config ds_config zero_stage",
    "--use_liger_kernel": "enable_liger_kernel use_liger liger_kernel",
    "--cache_dir": "dataset_prepared_path tokenized_path",
    "--report_to": "use_wandb wandb use_swanlab use_tensorboard use_trackio",
    "--early_stopping": """early_stopping_patience early_stopping_steps early_stop_interval early_stop patience
        early_stopping_rounds""",
    "--sample_prompts FILE": "eval_prompts sample_questions validation_prompts generate_samples",
    "--run_name": "wandb_name wandb_run_name",
    "--save_steps, a share of all steps where it is below 1": "saves_per_epoch save_interval save_freq",
    "--eval_steps, a share of all steps where it is below 1": "evals_per_epoch eval_interval eval_freq",
    "--resume_from_checkpoint, or nothing: the same command resumes": """resume resume_from resume_training
        auto_resume_from_checkpoints load_checkpoint""",
}
# Names of training programs for what this one has no flag for.
NO_FLAG = {
    "give the file alone: finetune.py run.yaml": "config config_file cfg c yaml",
    "leave it out, the model's own chat template is used": """template template_type chat_template chat_template_path
        prompt_template prompt_type conv_template conversation_template conversation""",
    "leave it out, code in a model's folder is never run": "trust_remote_code",
    "leave it out, the fastest attention that is installed is used": """use_flash_attn flash_attn flash_attention
        use_flash_attention use_flash_attention_2 attn_implementation attn_impl xformers_attention sdp_attention""",
    "leave it out, the model's folder says it": """model_type tokenizer tokenizer_name tokenizer_name_or_path
        tokenizer_type use_fast_tokenizer base_model_config config_name rope_scaling""",
    "leave it out, nothing is padded here": """padding padding_side padding_free pad_to_max_length pad_to_sequence_len
        group_by_length""",
    "leave it out, nothing is overwritten: the same command resumes": "overwrite_output_dir",
    "leave it out, all cores are used": "preprocessing_num_workers dataset_num_proc num_proc dataset_processes",
    "leave it out, the tokens are made again when the data change": "overwrite_cache load_from_cache_file",
    "leave it out, the shape of each record is recognised": """dataset_text_field dataset_format data_format
        dataset_type formatting""",
    "leave it out, this program does supervised fine-tuning only": "stage task task_type rlhf_type rl",
    "leave it out, the result is always written as safetensors": "save_safetensors safe_serialization",
    "leave it out, report.html in the output folder shows the losses": "plot_loss",
    "leave it out, adapters have one learning rate": "loraplus_lr_ratio",
    "leave it out, no noise is added to embeddings here": "neftune_alpha noise_alpha noisy_embedding_alpha",
    "leave it out, the vocabulary stays that of the model": "resize_vocab new_special_tokens special_tokens",
    "give a file with fewer records": "max_samples max_train_samples train_dataset_sample num_samples",
    "give it to torchrun, before finetune.py": """nproc_per_node nnodes node_rank master_addr master_port num_gpus gpus
        num_processes""",
    "set the environment variable WANDB_PROJECT": "wandb_project",
    "set the environment variable TENSORBOARD_LOGGING_DIR": "logging_dir",
}


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"--(\w+)", text))


def what_to_write(name: str, known: Set[str], trains: bool) -> str | None:
    """What to write instead of --`name`, a flag that the script does not have. None: no other program is known for it.

    known: names of the script's flags; trains: whether it is a program for training.
    """
    for text, names in FLAGS.items():
        if name in names.split() and flags_in(text) <= known:
            return f"write {text}"
    return next((text for text, names in NO_FLAG.items() if trains and name in names.split()), None)
