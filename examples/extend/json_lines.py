"""A logger of your own: it receives every metric and does not affect the training."""

import json
from collections.abc import Mapping

from zfnet.training.loggers import LoggedRun, Logger


class JSONLinesLogger(Logger):
    """Writes each set of metrics as a line of JSON to a file in the run directory. A resumed run appends to it."""

    def __init__(self, file_name: str = "metrics.jsonl") -> None:
        self.file_name = file_name

    def start(self, run: LoggedRun) -> None:
        self.file = open(run.folder / self.file_name, "a", encoding="utf-8")  # noqa: SIM115 (open until `close`)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        print(json.dumps({"step": step, **values}), file=self.file, flush=True)

    def finish(self, results: Mapping[str, float]) -> None:
        print(json.dumps(dict(results)), file=self.file)

    def close(self) -> None:
        if hasattr(self, "file"):
            self.file.close()
