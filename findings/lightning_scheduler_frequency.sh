#!/usr/bin/env bash
# lightning 2.6.6 with torch 2.13.0: a scheduler's "frequency" counts batches of the epoch, and may never come, or come every
# step.
#
# {"scheduler": s, "interval": "step", "frequency": n} is to step a scheduler once in n optimizer steps. The Trainer steps it
# where the batch's number in its epoch is a multiple of n and the optimizer has stepped. With epochs of 3 batches a frequency
# of 4 never comes, and the rate stays at its start; a frequency of 2 comes once in 3 steps. With accumulate_grad_batches=4 a
# frequency of 2 comes at every optimizer step, for all whose batch's number is even; with 3 it is right. A frequency of 1 is
# right.
#
# Seen, a rate halved by each of the scheduler's steps, rates of the optimizer's steps: 4 epochs of 3 batches, frequency 4: 1
# throughout; frequency 2: 1 1 .5 .5 .5 .25 .25 .25 .125; 16 batches accumulated by 4, frequency 2: 1 .5 .25 .125; by 2,
# frequency 2: the same; 12 batches by 3, frequency 2: 1 1 .5 .5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy lightning==2.6.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(2)


class Model(lightning.LightningModule):
    def __init__(self, frequency):
        super().__init__()
        self.weight, self.frequency, self.rates = torch.nn.Parameter(torch.zeros(1)), frequency, []

    def training_step(self, batch, index):
        return (self.weight * batch[0]).mean()

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        halved = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return [optimizer], [{"scheduler": halved, "interval": "step", "frequency": self.frequency}]


def rates(frequency, batches, epochs=1, accumulate=1):
    model = Model(frequency)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, accumulate_grad_batches=accumulate, **quiet
    )
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(batches)), batch_size=1))
    print(f"frequency {frequency}, {epochs} epochs of {batches} batches, accumulated by {accumulate}: {model.rates}")
    return model.rates


assert rates(4, 3, epochs=4) == [1.0] * 12
assert rates(2, 3, epochs=3) == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
assert rates(2, 16, accumulate=4) == [1.0, 0.5, 0.25, 0.125] == rates(2, 8, accumulate=2)
assert rates(2, 12, accumulate=3) == [1.0, 1.0, 0.5, 0.5]
assert rates(1, 16, accumulate=4) == [1.0, 0.5, 0.25, 0.125]
PY
