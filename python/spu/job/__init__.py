"""The training job behind `spu train`: a run of the trainer on text, with its records.

`config` says what is trained, `options` what was asked for, `data` on which batches, `run` trains it through the
pipeline, `reference` the same in plain PyTorch, `report` writes down what happened, `console` shows it while it
happens, `sample` lets the model speak.
"""
