"""What a run leaves to look at: `log.csv` with one row a step, TensorBoard events, and `curve.png`."""

import csv
from itertools import accumulate
from pathlib import Path

from formery.errors import FormeryError
from formery.files import atomic_write
from formery.train.events import Events

COLUMNS = ["step", "loss", "learning_rate", "tokens_per_second", "seconds"]


class Log:
    """Appends one row a step to `log.csv`; opened at step `done`, it first drops every row after that step.

    TensorBoard events are written too where the extra `formery[tensorboard]` is installed.
    """

    def __init__(self, out: Path, done: int) -> None:
        self.path = out / "log.csv"
        # Row n is step n, so a row that a kill tore in half always lies beyond the last checkpoint.
        rows = self.rows()[:done] if done else []
        self.columns = list(rows[0]) if rows else list(COLUMNS)
        self._rewrite(rows)
        self.events = Events(out / "tensorboard", done)

    def append(self, row: dict[str, float]) -> None:
        """Writes a row; a column that is new, such as the first evaluation's, is added to the whole file."""
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            self._rewrite(self.rows())
        written = {name: f"{value:.8g}" for name, value in row.items()}
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(written)
        except OSError as error:
            raise FormeryError(f"cannot write {self.path}: {error.strerror}.") from error
        self.events.append(int(row["step"]), {name: row[name] for name in row if name != "step"})

    def rows(self) -> list[dict[str, str]]:
        """The rows as they stand in the file."""
        return read_rows(self.path)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with atomic_write(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a log, none where there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw_curve(rows: list[dict[str, str]], path: Path, title: str) -> None:
    """Draws the training loss of each step, its running mean, and the evaluated loss, as a PNG."""
    from matplotlib.figure import Figure

    steps = [int(row["step"]) for row in rows]
    losses = [float(row["loss"]) for row in rows]
    evaluated = [
        (int(row["step"]), float(row["evaluation/loss"])) for row in rows if row.get("evaluation/loss")
    ]
    figure = Figure(figsize=(7, 4.2), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9db8d9", linewidth=0.7, label="training, each step")
    axes.plot(steps, running_mean(losses), color="#1f4e8c", linewidth=1.6, label="training, running mean")
    if evaluated:
        steps, losses = map(list, zip(*evaluated, strict=True))
        axes.plot(steps, losses, "o-", color="#d1622b", markersize=4, linewidth=1.2, label="evaluation")
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def running_mean(values: list[float]) -> list[float]:
    """The mean over a window around each value, a fiftieth of them wide, and narrower at the ends."""
    reach = len(values) // 100
    sums = [0.0, *accumulate(values)]
    windows = ((max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]
