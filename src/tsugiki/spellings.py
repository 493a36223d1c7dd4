"""What people write for a setting, in the form that its field takes: one for flags and for YAML.

Also what other toolkits call a setting, and the plain type that a field's flag has. Raises
ValueError with what the field takes; whoever validates says which field it was.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, get_args, get_origin

# What people type for an optimiser (Hugging Face's and bitsandbytes' names among them).
OPTIMIZER_NAMES: dict[str, str] = {
    "adam": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw",
    "adamw8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "adamw_bitsandbytes": "adamw_8bit",
    "paged_adamw": "adamw", "paged_adamw_32bit": "adamw",  # full precision: little to page
    "paged_adamw8bit": "paged_adamw_8bit", "paged_adamw_bnb_8bit": "paged_adamw_8bit",
}  # fmt: skip
DTYPE_NAMES: dict[str, str] = {
    "fp16": "float16", "f16": "float16", "half": "float16", "bf16": "bfloat16",
    "fp32": "float32", "f32": "float32", "float": "float32",
}  # fmt: skip
# A setting → what PEFT, Hugging Face's TrainingArguments and TRL, Axolotl, LLaMA-Factory, Unsloth,
# mlx-lm and torchtune call it, and its short names. They are not accepted: their values often mean
# something else. They are what a message proposes the right name by.
_NAMES: dict[str, str] = {
    "model.name": "base base_model base_model_name_or_path checkpoint hf_path model_id model_name "
    "model_name_or_path model_path pretrained_model_name_or_path model.path model.model",
    "model.revision": "branch commit model_revision",
    "model.device": "device_map gpu",
    "model.dtype": "bf16 compute_dtype fp16 mixed_precision precision torch_dtype",
    "model.quantize": "4bit bits load_in_4bit load_in_8bit qlora quant quantization "
    "quantization_bit quantization_config",
    "data.path": "data_dir data_file data_files data_path dataset dataset_dir dataset_name "
    "dataset_path datasets file train_data train_data_path train_dataset train_file training_data",
    "data.eval_data": "eval_dataset eval_file test_datasets test_file val_data val_file valid_data "
    "valid_file validation_data validation_file",
    "data.eval_ratio": "eval_size eval_split split_dataset_ratio test_size val_ratio val_set_size "
    "val_size valid_ratio validation_ratio validation_split",
    "data.columns": "column_map dataset_text_field text_column text_field",
    "data.template": "chat_template",
    "data.train_on": "assistant_only_loss completion_only_loss mask_prompt train_on_input "
    "train_on_inputs train_on_prompt train_on_responses_only",
    "data.max_length": "block_size context_length cutoff cutoff_len max_len max_seq_len "
    "max_seq_length max_sequence_length model_max_length seq_len seq_length sequence_len "
    "sequence_length",
    "lora.r": "dim lora_dim lora_rank network_dim rank",
    "lora.alpha": "network_alpha scale",
    "lora.dropout": "lora_drop",
    "lora.targets": "keys lora_modules lora_target lora_target_linear lora_target_modules modules "
    "target target_modules",
    "lora.rslora": "rs_lora use_rslora",
    "train.method": "fine_tune_type finetuning_type peft_type train_type tuner_type",
    "train.epochs": "epoch max_epochs n_epochs num_epochs num_train_epochs",
    "train.max_steps": "iterations iters max_iters max_train_steps num_iters num_steps steps "
    "total_steps",
    "train.batch_size": "batch bs mbs micro_batch micro_batch_size per_device_batch_size "
    "per_device_train_batch_size per_gpu_train_batch_size train_batch_size",
    "train.gradient_accumulation_steps": "accumulation accumulation_steps ga grad_acc grad_accum "
    "grad_accum_steps grad_accumulation grad_accumulation_steps gradient_accumulation",
    "train.learning_rate": "lr max_lr peak_lr rate",
    "train.warmup_ratio": "lr_warmup_steps num_warmup_steps warmup warmup_steps",
    "train.weight_decay": "decay wd",
    "train.scheduler": "lr_schedule lr_scheduler lr_scheduler_type schedule scheduler_type",
    "train.max_grad_norm": "clip clip_grad clip_grad_norm grad_clip grad_norm gradient_clip_val "
    "gradient_clipping max_norm",
    "train.optimizer": "opt optim optimiser",
    "train.gradient_checkpointing": "activation_checkpointing checkpointing grad_checkpoint "
    "grad_checkpointing use_gradient_checkpointing",
    "train.seed": "random_seed random_state",
    "train.save_every": "save_interval save_steps",
    "train.log_every": "log_interval log_steps logging logging_steps steps_per_report",
    "train.eval_every": "eval_interval eval_steps steps_per_eval",
    "train.early_stopping": "early_stopping_patience patience",
    "train.sample_prompt": "prompt prompts sample_prompts",
    "output": "adapter_path o out out_dir output_dir output_path run_dir save_dir save_path",
    "preset": "recipe",
}
# The same for flags that are no setting, of `generate`, `chat` and others; where a verb has them.
FLAG_NAMES: dict[str, str] = {
    "base": "--base-only", "no_adapter": "--base-only",
    "adapter_path": "--adapter", "lora": "--adapter", "lora_path": "--adapter",
    "max_length": "--max-tokens", "max_new_tokens": "--max-tokens", "n_predict": "--max-tokens",
    "num_predict": "--max-tokens", "repeat_penalty": "--repetition-penalty",
    "rep_penalty": "--repetition-penalty", "system_prompt": "--system", "temp": "--temperature",
}  # fmt: skip
# What they mean by a value, where that is another word; names whose values mean something else.
USUAL_VALUES: dict[tuple[str, Any], Any] = {
    ("load_in_4bit", True): "nf4", ("4bit", True): "nf4", ("qlora", True): "nf4",
    ("bits", 4): "nf4", ("quantization_bit", 4): "nf4", ("load_in_8bit", True): "int8",
    ("bits", 8): "int8", ("quantization_bit", 8): "int8", ("load_in_4bit", False): "none",
    ("load_in_8bit", False): "none", ("lora_target_linear", True): "all-linear",
}  # fmt: skip
OTHERWISE = {"scale", "train_on_input", "train_on_inputs", "mask_prompt", "warmup_steps",
             "lr_warmup_steps", "num_warmup_steps"}  # fmt: skip
USUAL_NAMES = {name: place for place, names in _NAMES.items() for name in names.split()}
ROLES = ("prompt", "answer", "system", "text")  # of --columns


def optimizer(value: Any) -> Any:
    """An optimiser's name, however it is written."""
    if not isinstance(value, str):
        return value
    name = value.strip().lower().replace("-", "_")
    return OPTIMIZER_NAMES.get(name, name)


def dtype(value: Any) -> Any:
    """A compute type's name, however it is written: fp16, bf16 …"""
    if not isinstance(value, str):
        return value
    name = value.strip().lower().removeprefix("torch.")
    return DTYPE_NAMES.get(name, name)


def columns(value: Any) -> Any:
    """'prompt=question,answer=choice[label]' → {'prompt': 'question', 'answer': 'choice[label]'}.

    Raises:
        ValueError: a part without '=', or a role that is not one of these.
    """
    if isinstance(value, str):
        parts = [part.partition("=") for part in value.split(",")]
        value = {role.strip(): column.strip() for role, _, column in parts}
    if not isinstance(value, dict) or any(
        role not in ROLES or not column or not isinstance(column, str)
        for role, column in value.items()
    ):
        raise ValueError(
            "takes a list of role=column, such as prompt=question,answer=answer; roles: "
            + ", ".join(ROLES)
        )
    return value


def names(value: Any) -> Any:
    """'q_proj,v_proj' → ('q_proj', 'v_proj'); a single word stays one."""
    if isinstance(value, str) and "," in value:
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def texts(value: Any) -> Any:
    """A single text → a list of one."""
    return (value,) if isinstance(value, str) else value


def day(value: Any) -> Any:
    """'2026-11-30' → that day.

    Raises:
        ValueError: anything else.
    """
    if value is None or type(value) is datetime.date:
        return value
    try:
        return datetime.date.fromisoformat(value.strip())
    except (AttributeError, ValueError):
        raise ValueError("takes a day such as 2026-11-30") from None


def plain_type(annotation: Any) -> tuple[Any, bool]:
    """(type without None, whether a flag of this type repeats); for generating flags."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return plain_type(get_args(annotation)[0])
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if origin is Literal:
        return str if all(isinstance(a, str) for a in arguments) else int, False
    if origin is tuple:
        return arguments[0], True
    if origin is dict:
        return str, False
    if arguments and origin is not None:
        if str in arguments and len(arguments) > 1:
            return str, False
        return plain_type(arguments[0])
    return (str if annotation is datetime.date else annotation), False
