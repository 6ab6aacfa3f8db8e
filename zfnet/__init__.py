"""ZFNet: train, sweep, reproduce and explain (Zeiler & Fergus 2013).

In Python, without a command line:

    from zfnet import compose, fit
    run = fit(compose(["experiment=quickstart", "optimizer.lr=3e-3"]), "outputs/notebook/first")
    run.model, run.results
"""

from zfnet.jobs.train import compose, fit
from zfnet.model.zfnet import ZFNet
from zfnet.runs.weights import load_run

__all__ = ["ZFNet", "compose", "fit", "load_run"]
