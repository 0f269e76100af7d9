#!/usr/bin/env bash
# lightning 2.6.6 with torch 2.13.0: StochasticWeightAveraging leaves out the last epoch, and takes in the one before it begins.
#
# With swa_epoch_start=3 of 6 epochs one expects the mean of the weights after epochs 3, 4, 5 and 6. The callback takes the
# weights at the beginning of each of these epochs, so that it has those after 2, 3, 4 and 5. What epoch 6 trains is nowhere:
# the average replaces the weights when the training ends. Epoch 2 was still at the schedule's own rate. With swa_epoch_start=6
# the result is the model after epoch 5, not averaged with anything, and the epoch at the averaging rate was for nothing.
#
# Seen, a weight that is -2, -4, -6, -8, -10, -12 after its 6 epochs: swa_epoch_start=3 gives -7 (one expects -9), 5 gives -9
# (-11), 6 gives -10 (-12)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy lightning==2.6.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import lightning
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(2)


class Model(lightning.LightningModule):
    """Its weight falls by 1 in each step."""

    def __init__(self):
        super().__init__()
        self.weight, self.after = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, index):
        return (self.weight * batch[0]).mean()

    def on_train_epoch_end(self):
        self.after.append(self.weight.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


for start, seen in ((3, -7.0), (5, -9.0), (6, -10.0)):
    model = Model()
    average = StochasticWeightAveraging(swa_lrs=1.0, swa_epoch_start=start, annealing_epochs=1)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=6, callbacks=[average], **quiet)
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(2)), batch_size=1))
    expected, taken = model.after[start - 1 :], model.after[start - 2 : -1]
    wanted = sum(expected) / len(expected)
    print(f"start {start}: after the epochs {model.after}, averaged {model.weight.item()}, expected {wanted}")
    assert model.after == [-2.0, -4.0, -6.0, -8.0, -10.0, -12.0]
    assert model.weight.item() == seen == sum(taken) / len(taken)
PY
