"""A training run, as ``spu train`` does it.

In the order in which a run meets them:

    options.py, config.py   what a user names on the command line and in a YAML file; the settings of a run
    defaults.py             how a step is cut where the user does not say
    run_folder.py           runs/NAME: where it is, its lock and its config.json
    model.py, adapter.py    the model, its adapters; what it is trained on comes from ``spu.data``
    weights.py              where its weights are until its layers have their places
    job.py                  a run before it trains: all of the above, checked against each other
    lr.py, evaluate.py      the learning rate of a step; where the run is validated, and the mean over targets
    loop.py, batches.py     prepare, the loop over steps, finish; the next batch, made while a card works
    ranks.py                the same in several processes, which rank 0 leads
    guard.py, signals.py    what ends a run early: a loss that is not finite or gets no lower; Ctrl-C and SIGTERM
    keep.py, resume.py      the checkpoints that are kept; what may differ where a run goes on
    metrics.py, progress.py metrics.jsonl; what the terminal shows
    tensorboard.py          the same numbers for TensorBoard
    export.py, sample.py    the trained model in full precision; a few lines that it writes
    chat.py                 a conversation with a trained model
    results.py, report.py   summary.json and pictures; how they are drawn and printed
    plain.py                the same training in plain PyTorch, to compare with
"""
