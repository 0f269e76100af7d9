"""A run before it trains: its settings, its text and the plan that it keeps, and the checks that they fit together."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spu.data.corpus import Corpus, make_corpus
from spu.data.tokenizer import Tokenizer, make_tokenizer
from spu.plan import Plan
from spu.plan.plan import VERSION
from spu.train.config import TrainConfig
from spu.train.model import check_positions, has_weights, load_config
from spu.train.progress import View
from spu.train.resume import check_not_shorter
from spu.train.run_folder import RunFolder
from spu.train.tensorboard import TensorBoard

__all__ = ["Job"]


@dataclass
class Job:
    """One run: its settings, its folder, its text, and the view that shows its progress."""

    config: TrainConfig
    folder: RunFolder
    new: bool
    replaced: bool = False  # placed on other devices than before
    lengthened: bool = False  # given more steps than before
    saved_steps: int | None = None  # of a run that goes on
    sample: bool = True  # let the trained model write a few lines
    tensorboard: bool = False
    saved_corpus: dict[str, Any] | None = None
    given_plan: Plan | None = None  # of a file that the user named
    corpus: Corpus = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    view: View | None = None  # while training

    def say(self, text: str) -> None:
        """Show lines beside the progress."""
        (print if self.view is None else self.view.say)(text)

    def read(self) -> None:
        """Read the data and check that it and the model fit together.

        Raises:
            ValueError: bad settings, data or model; nothing was written.
        """
        if self.tensorboard:
            TensorBoard.check()
        model_config = load_config(self.config.model)
        vocabulary = model_config.get_text_config().vocab_size
        self.tokenizer = make_tokenizer(self.config.model, vocabulary, weights=has_weights(self.config.model))
        self._check_plan(model_config.get_text_config())
        planned = f"the plan was made for {self.given_plan.model}: " if self.given_plan is not None else ""
        check_positions(model_config, self.config.seq, planned)
        config = self.config
        self.corpus = make_corpus(
            config.data, self.tokenizer, config.seq, self.say, val_data=config.val_data, pack=config.pack
        )
        if self.corpus.top >= vocabulary:
            raise ValueError(
                f"--model {config.model}: its tokenizer gives token {self.corpus.top}, and vocab_size in its "
                f"config.json is {vocabulary}: give a tokenizer and a config that belong together"
            )
        saved = self.saved_corpus
        if saved is not None and saved["sha256"] != self.corpus.sha256:
            raise ValueError(
                f"--data {self.corpus.name} has changed since the run began: put it back, or start a new run"
            )
        self._settle_epochs()

    def _settle_epochs(self) -> None:
        """Turn ``epochs`` into a number of steps, which is the run's from then on."""
        config = self.config
        if config.epochs is None:
            return
        steps = max(1, round(config.epochs * self.corpus.steps_per_epoch(config.batch, config.seq)))
        if self.saved_steps is not None:
            check_not_shorter(self.saved_steps, steps, {"epochs": config.epochs})
            self.lengthened = steps != self.saved_steps
        self.config = dataclasses.replace(config, steps=steps, epochs=None)

    def _check_plan(self, model_config: Any) -> None:
        """Raise ValueError if the plan that the user named is another model's."""
        plan = self.given_plan
        if plan is None:
            return
        layers, here = plan.stages[-1].layers[1], model_config.num_hidden_layers + 2
        if layers != here:
            raise ValueError(
                f"--plan was made for {plan.model}, of {layers} layers with embedding and head; --model has {here}: "
                "give the model that it was made for, or plan again with spu plan --model"
            )

    @property
    def corpus_record(self) -> dict[str, Any]:
        return {"name": self.corpus.name, "sha256": self.corpus.sha256}

    @property
    def unit(self) -> str:
        return "byte" if self.tokenizer.name == "bytes" else "token"

    def plan(self) -> Plan | None:
        """Return the plan that the run began with, so that going on changes no bit.

        None for a new run, or one that goes on with other devices, or with another spu that reads no such plans.
        """
        if self.given_plan is not None:
            return self.given_plan
        file = self.folder / "plan.json"
        if self.new or self.replaced or not file.exists():
            return None
        if _is_older(file):
            self.say(f"{file} is of an earlier spu: planned again, so that losses may differ in their last bits")
            return None
        return Plan.load(file)

    def open_folder(self) -> None:
        """Make the folder of a new run; lock it."""
        if self.new:
            self.folder.create(self.config, self.corpus_record)
            self.new = False
        else:
            self.folder.lock()


def _is_older(plan: Path) -> bool:
    """Tell whether a plan file is of an earlier version than this spu reads."""
    try:
        version = json.loads(plan.read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, LookupError, TypeError):
        return False  # damaged: reading it says how
    return isinstance(version, int) and version < VERSION
