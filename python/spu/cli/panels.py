"""The groups in which the help of ``spu train`` and ``spu plan`` shows their options."""

from __future__ import annotations

__all__ = ["PANELS", "panel_of"]

# In the order in which they are shown; a command has those of its own options
PANELS = {
    "Model and data": "model data val_data seq batch tokens_per_step pack",
    "The run": "name out resume config save_every keep keep_best export export_dtype sample tensorboard picture",
    "How long": "steps tokens epochs minutes patience max_loss max_loss_steps",
    "Learning": (
        "lr lr_schedule warmup warmup_steps final_lr beta2 weight_decay max_grad_norm init_scale growth_interval seed"
    ),
    "Adapters": "lora lora_kind lora_alpha lora_dropout lora_targets frozen",
    "Devices and memory": (
        "devices budget speed plan precision recompute residency state grads activations retry same_order"
    ),
    "How a step is cut": "schedule microbatches accumulate virtual transfer replan graphs",
    "Validation": "evals eval_every eval_batches reference compare",
    "Several processes (torchrun)": "engine replicas grad_wire wait_s",
}


def panel_of(name: str) -> str:
    """Return the group of a field's option; "More" for one that is in none yet."""
    return next((panel for panel, names in PANELS.items() if name in names.split()), "More")
