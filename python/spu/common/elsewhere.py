"""Options as other libraries name them, and values as people write them: for messages that say what was meant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

__all__ = ["meant_by", "rewritten"]

# ours -> what it, or what stands in its place, is called in transformers, Lightning, DeepSpeed, nanoGPT, axolotl
_NAMES = {
    "accumulate": "gradient_accumulation_steps grad_accumulation_steps gradient_accumulation grad_accum "
    "accumulate_grad_batches accumulation_steps",
    "batch": "batch_size train_batch_size per_device_train_batch_size global_batch_size micro_batch_size bs",
    "beta2": "betas adam_beta2",
    "budget": "memory max_memory memory_limit gpu_memory",
    "data": "dataset datasets dataset_name data_path train_file train_data dataset_path",
    "devices": "device gpu gpus num_gpus n_gpu device_map accelerator cuda",
    "eval_batches": "eval_iters limit_val_batches",
    "eval_every": "eval_steps eval_interval val_check_interval",
    "epochs": "num_train_epochs num_epochs max_epochs n_epochs",
    "export_dtype": "save_dtype",
    "final_lr": "min_lr min_lr_ratio",
    "keep": "save_total_limit save_top_k",
    "keep_best": "load_best_model_at_end save_best",
    "lora": "lora_r lora_rank r rank",
    "lora_targets": "target_modules lora_target_modules",
    "lr": "learning_rate max_lr peak_lr",
    "lr_schedule": "lr_scheduler_type lr_scheduler scheduler",
    "max_grad_norm": "grad_clip gradient_clip_val clip_grad_norm gradient_clipping max_norm clip",
    "microbatches": "micro_batches num_microbatches n_microbatches chunks",
    "model": "model_name model_name_or_path base_model pretrained_model",
    "name": "run_name run_id",
    "out": "output_dir out_dir default_root_dir save_dir",
    "pack": "packing sample_packing",
    "patience": "early_stopping_patience early_stopping",
    "precision": "fp16 bf16 fp32 half amp dtype torch_dtype mixed_precision autocast",
    "recompute": "gradient_checkpointing activation_checkpointing activation_checkpoint checkpointing",
    "replicas": "data_parallel data_parallel_size dp ddp",
    "residency": "offload cpu_offload offload_optimizer offload_param",
    "resume": "resume_from_checkpoint ckpt_path resume_from",
    "save_every": "save_steps save_interval checkpoint_every every_n_train_steps",
    "seq": "seq_len seq_length sequence_length sequence_len max_length max_seq_length max_seq_len block_size "
    "cutoff_len context_length",
    "steps": "max_steps num_steps total_steps train_steps max_iters iters iterations",
    "val_data": "validation_file val_file eval_data eval_file val_dataset eval_dataset",
    "warmup": "warmup_ratio warmup_pct",
    "weight_decay": "wd l2",
}
_OURS = {theirs: ours for ours, names in _NAMES.items() for theirs in names.split()}
_SCALED = re.compile(r"([\d.]+(?:e\+?\d+)?)([kmgb]?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 3, "m": 6, "g": 9, "b": 9}


def meant_by(name: str, known: Iterable[str]) -> str | None:
    """Return which of the known options another library calls so; None if that is not known."""
    ours = _OURS.get(name.strip("-").replace("-", "_").lower())
    return ours if ours is not None and ours in known else None


def rewritten(value: Any, kind: str) -> str:
    """Return how a value would have been taken, for a message; "" where that cannot be told.

    Args:
        value: that was refused.
        kind: "INTEGER" or "TEXT", as help texts have it: "1e6", "1M" and 8.0 for a whole number, or a list of texts.
    """
    if kind == "TEXT":
        several = isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value)
        return ",".join(value) if several else ""
    if isinstance(value, bool) or not kind.startswith("INTEGER"):
        return ""
    found = _SCALED.fullmatch(str(value).replace("_", "").replace(",", "").strip())
    try:
        number = float(found[1]) * 10 ** _POWERS[found[2].lower()] if found else 0.5
    except ValueError:
        return ""
    return str(int(number)) if number.is_integer() and number < 2**63 else ""
