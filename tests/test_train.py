"""Training: the schedule, the objectives, and that a stopped run goes on as if it had never stopped."""

import csv
import errno
import importlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import formery.train
from formery.errors import FormeryError
from formery.methods import discover
from formery.models import Decoder, EncoderDecoder, load, save
from formery.models.compose import language_model, translator
from formery.train import Plan, load_weights, mean_loss, next_token, run_recipe, train, translate
from formery.train.checkpoint import weights
from formery.train.objective import target_count

VOCABULARY = 23
STOP_AT = 17  # the step in which the runs below are stopped; the last checkpoint is then that of step 14


class Tiny(nn.Module):
    """A causal model with dropout, tied weights, a persistent and a passing buffer."""

    seen: Tensor

    def __init__(self, width: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("passing", torch.zeros(3), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.training:
            self.seen += 1
        hidden, _ = self.mix(self.embed(tokens))
        return self.head(self.dropout(self.norm(hidden)))


class Counting:
    """Sequences that count upwards; calls `at[index]()` when that batch is asked for."""

    def __init__(self, size: int = 4, at: dict[int, Any] | None = None) -> None:
        self.size, self.at = size, at or {}

    def batch(self, index: int) -> dict[str, Tensor]:
        if index in self.at:
            self.at[index]()
        generator = torch.Generator().manual_seed(index)
        first = torch.randint(0, VOCABULARY, (self.size, 1), generator=generator)
        return {"tokens": (first + torch.arange(9)) % VOCABULARY}


PLAN = Plan(steps=30, learning_rate=1e-2, warmup=5, evaluate_every=10, checkpoint_every=7, label="counting")
EVALUATE = mean_loss(next_token, [Counting().batch(1000 + index) for index in range(2)])


def trained(out: Path, plan: Plan = PLAN, at: dict[int, Any] | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    model = Tiny()
    settings: dict[str, Any] = {"evaluate": EVALUATE, "progress": False} | options
    train(model, next_token, Counting(at=at), plan, out, **settings)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(other).values(), strict=True))


def logged_steps(out: Path) -> list[int]:
    return [int(row["step"]) for row in csv.DictReader((out / "log.csv").open())]


def event_steps(out: Path, name: str) -> list[int]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    return trained(out), out


# the plan


def test_schedule_has_the_values_of_the_formula() -> None:
    plan = Plan(steps=100, learning_rate=2.0, warmup=20, final_learning_rate_ratio=0.1)
    for step, rate in (
        (1, 0.1),
        (10, 1.0),
        (20, 2.0),
        (60, 1.1),
        (100, 0.2),
        (40, 0.2 + 0.9 * (1 + 0.5**0.5)),
    ):
        assert plan.learning_rate_at(step) == pytest.approx(rate)


@given(steps=st.integers(1, 500), data=st.data())
def test_schedule_rises_to_the_peak_then_falls_to_the_final_rate(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps))
    plan = Plan(steps=steps, learning_rate=0.5, warmup=warmup)
    rates = [plan.learning_rate_at(step) for step in range(1, steps + 1)]
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[-1] == pytest.approx(0.5 if warmup == steps else 0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"warmup": 31},
        {"learning_rate": math.nan},
        {"accumulate": 0},
        {"clip": 0.0},
        {"precision": "float16"},
        {"evaluate_every": 0},
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_the_name_of_its_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(FormeryError, match=next(iter(wrong))):
        Plan(**({"steps": 30, "learning_rate": 1e-2} | wrong))


# the objectives


class Given(nn.Module):
    """Answers with the logits it was made with, and remembers what it was asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        self.inputs, self.named = inputs, named
        return self.logits


def test_next_token_is_the_mean_over_real_targets_in_float32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, VOCABULARY).bfloat16()
    tokens = torch.randint(0, VOCABULARY, (2, 5))
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]])
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    model = Given(logits)
    loss = next_token(
        model, batch := {"tokens": tokens, "positions": positions, "segments": segments}
    ).detach()
    counted = [
        (0, 0),
        (0, 2),
        (0, 3),
        (1, 0),
        (1, 1),
    ]  # row 0 has a border after its second token, row 1 padding
    wanted = -sum(logits.double().log_softmax(-1)[r, t, tokens[r, t + 1]] for r, t in counted) / len(counted)
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(wanted), rel=1e-5)
    assert torch.equal(model.inputs[0], tokens[:, :-1]) and torch.equal(
        model.named["segments"], segments[:, :-1]
    )
    assert target_count(batch) == len(counted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_translate_mixes_the_target_with_the_uniform_distribution(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 3, VOCABULARY), torch.randint(0, VOCABULARY, (2, 4))
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, -1, -1]])
    source, source_positions = torch.randint(0, VOCABULARY, (2, 6)), torch.arange(6).expand(2, 6)
    model = Given(logits)
    batch = {"source": source, "source_positions": source_positions, "tokens": tokens, "positions": positions}
    log_probabilities = logits.double().log_softmax(-1)
    wanted = torch.zeros((), dtype=torch.float64)
    for r, t in ((0, 0), (0, 1), (0, 2), (1, 0)):
        uniform = log_probabilities[r, t].mean()
        wanted -= (1 - smoothing) * log_probabilities[r, t, tokens[r, t + 1]] / 4 + smoothing * uniform / 4
    assert float(translate(smoothing)(model, batch).detach()) == pytest.approx(float(wanted), rel=1e-5)
    assert torch.equal(model.inputs[1], tokens[:, :-1])
    assert torch.equal(model.named["positions"], positions[:, :-1])
    assert torch.equal(model.named["source_positions"], source_positions)


# the loop


def test_training_learns_and_keeps_the_best_weights(whole: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, result_model = Tiny(), Tiny()
    plan = Plan(steps=60, learning_rate=2e-2, evaluate_every=20)
    scores = iter([1.0, 3.0, 2.0])
    kept = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        kept.append({name: tensor.clone() for name, tensor in weights(model).items()})
        return EVALUATE(model) | {"bleu": next(scores)}

    before = EVALUATE(model)["loss"]
    result = train(
        model, next_token, Counting(), plan, tmp_path, evaluate, better="higher bleu", progress=False
    )
    assert EVALUATE(model.eval())["loss"] < 0.7 * before
    assert (result.step, result.best_step, result.best_scores["bleu"]) == (60, 40, 3.0)
    assert result.best_weights is not None
    load_weights(result_model, result.best_weights)
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in weights(result_model).items())
    assert not same(result_model, model)


class Ragged:
    """Eight padded sequences of unequal lengths, in `pieces` batches."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces

    def batch(self, index: int) -> dict[str, Tensor]:
        step, piece = divmod(index, self.pieces)
        tokens = Counting(size=8).batch(step)["tokens"]
        positions = torch.arange(9).expand(8, 9).clone()
        for row in range(8):
            positions[row, 9 - row :] = -1
        rows = slice(piece * 8 // self.pieces, (piece + 1) * 8 // self.pieces)
        return {"tokens": tokens[rows], "positions": positions[rows]}


def test_many_small_batches_equal_one_big_batch(tmp_path: Path) -> None:
    models = []
    for pieces in (1, 4):
        torch.manual_seed(1)
        models.append(model := Tiny(dropout=0.0))
        plan = Plan(steps=5, learning_rate=1e-2, accumulate=pieces, clip=0.5)
        train(model, next_token, Ragged(pieces), plan, tmp_path / str(pieces), progress=False)
    big, small = (
        {name: tensor for name, tensor in weights(model).items() if "seen" not in name} for model in models
    )
    for name in big:
        torch.testing.assert_close(big[name], small[name], rtol=1e-4, atol=1e-5)


def test_weight_decay_spares_biases_and_scales(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Tiny()
    before = {name: tensor.clone() for name, tensor in weights(model).items()}

    def nothing(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return 0.0 * torch.stack([parameter.sum() for parameter in model.parameters()]).sum()

    plan = Plan(steps=1, learning_rate=0.5, weight_decay=0.2)
    train(model, nothing, Counting(), plan, tmp_path, progress=False)
    rate = plan.learning_rate_at(1)
    for name, parameter in model.named_parameters():
        kept = 1 - rate * 0.2 if parameter.dim() >= 2 else 1.0
        torch.testing.assert_close(parameter.data, before[f"model/{name}"] * kept)


def test_gradients_are_clipped_to_the_norm_of_the_plan(tmp_path: Path) -> None:
    norms = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any) -> Any:
        gradients = [
            p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        norms.append(float(torch.cat(gradients).norm()))
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        trained(tmp_path / "clipped", Plan(steps=2, learning_rate=1e-2, clip=0.01))
        trained(tmp_path / "free", Plan(steps=2, learning_rate=1e-2, clip=None))
    assert norms[:2] == pytest.approx([0.01, 0.01], rel=1e-3) and min(norms[2:]) > 0.1


def test_bfloat16_computes_in_bfloat16_and_learns_in_float32(tmp_path: Path) -> None:
    model, computed = Tiny(dropout=0.0), set()
    model.head.register_forward_hook(
        lambda module, inputs, output: computed.add((module.training, output.dtype))
    )
    before = EVALUATE(model)["loss"]
    computed.clear()
    train(
        model,
        next_token,
        Counting(),
        Plan(steps=40, learning_rate=2e-2, precision="bfloat16"),
        tmp_path,
        EVALUATE,
        progress=False,
    )
    assert computed == {(True, torch.bfloat16), (False, torch.float32)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert EVALUATE(model.eval())["loss"] < 0.8 * before


def test_evaluation_leaves_the_random_draws_of_training_alone(
    whole: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    assert same(trained(tmp_path, evaluate=lambda model: {"loss": float(torch.rand(5).sum())}), whole[0])


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_weights(tmp_path: Path) -> None:
    calls = []

    def diverging(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        return next_token(model, batch) * (math.nan if len(calls) == STOP_AT else 1.0)

    torch.manual_seed(1)
    model = Tiny()
    with pytest.raises(FormeryError, match=f"loss of 'counting' is nan at step {STOP_AT}") as caught:
        train(model, diverging, Counting(), PLAN, tmp_path, progress=False)
    assert str(caught.value).count(". ") == 0
    assert all(torch.isfinite(tensor).all() for tensor in weights(model).values())
    assert checkpoint_step(tmp_path) == 14 and logged_steps(tmp_path) == list(range(1, STOP_AT))


# stopping and resuming


def checkpoint_step(out: Path) -> int:
    with safe_open(out / "last.safetensors", framework="pt") as file:
        return int(json.loads(file.metadata()["formery"])["step"])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_killed_at_a_step(out: str) -> None:
    torch.set_num_threads(1)
    trained(Path(out), at={STOP_AT - 1: kill})


def run_killed_while_it_writes(out: str) -> None:
    """Dies when the second checkpoint, of step 14, is written but not yet in its place."""
    torch.set_num_threads(1)
    replace, replaced = os.replace, []

    def kill_at_the_second(source: Any, target: Any) -> None:
        replaced.append(Path(target).name)
        if replaced.count("last.safetensors") == 2:
            kill()
        replace(source, target)

    pytest.MonkeyPatch().setattr(os, "replace", kill_at_the_second)
    trained(Path(out))


@pytest.mark.parametrize(
    ("death", "kept"), [(run_killed_at_a_step, 14), (run_killed_while_it_writes, 7)], ids=["step", "write"]
)
def test_a_killed_run_resumes_to_the_very_weights(
    whole: tuple[nn.Module, Path], tmp_path: Path, death: Any, kept: int
) -> None:
    source = Path(formery.train.__file__).parents[2]
    search = os.pathsep.join([str(Path(__file__).parent), str(source)])
    code = f"import test_train; test_train.{death.__name__}({str(tmp_path)!r})"
    died = subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | {"PYTHONPATH": search})
    assert died.returncode == -signal.SIGKILL
    assert checkpoint_step(tmp_path) == kept and logged_steps(tmp_path)[-1] > kept - 1
    assert same(trained(tmp_path, resume=True), whole[0])
    assert logged_steps(tmp_path) == list(range(1, 31))
    assert event_steps(tmp_path, "loss") == list(range(1, 31))
    assert not list(tmp_path.glob(".*"))
    with (
        safe_open(tmp_path / "last.safetensors", "pt") as one,
        safe_open(whole[1] / "last.safetensors", "pt") as other,
    ):
        assert sorted(one.keys()) == sorted(other.keys())
        names = one.keys()
        assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in names)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_its_step_says_how_to_go_on_and_does(
    whole: tuple[nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, at={STOP_AT - 1: lambda: signal.raise_signal(number)})
    said = capsys.readouterr().err
    assert f"step {STOP_AT} of 30" in said and "--resume" in said and said.count("\n") == 1
    assert checkpoint_step(tmp_path) == STOP_AT and signal.getsignal(number) == handler
    assert same(trained(tmp_path, resume=True), whole[0])
    assert logged_steps(tmp_path) == list(range(1, 31))


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, at={STOP_AT - 1: twice})
    assert checkpoint_step(tmp_path) == 14


def refuse_replace(patch: pytest.MonkeyPatch) -> None:
    def replace(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(os, "replace", replace)


def no_room_for_weights(patch: pytest.MonkeyPatch) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def no_room_for_the_log(patch: pytest.MonkeyPatch) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("fill", [refuse_replace, no_room_for_weights, no_room_for_the_log])
def test_a_full_disk_leaves_the_previous_checkpoint_good(
    whole: tuple[nn.Module, Path], tmp_path: Path, fill: Any
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        try:
            with pytest.raises(FormeryError, match="cannot write"):
                trained(tmp_path, at={STOP_AT - 1: lambda: fill(patch)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint_step(tmp_path) == 14
    assert same(trained(tmp_path, resume=True), whole[0])
    assert logged_steps(tmp_path) == list(range(1, 31))


def test_a_short_run_is_a_prefix_of_the_whole(whole: tuple[nn.Module, Path], tmp_path: Path) -> None:
    trained(tmp_path, stop_after=12)
    assert checkpoint_step(tmp_path) == 12
    trained(tmp_path, stop_after=12, resume=True)
    assert checkpoint_step(tmp_path) == 12
    assert same(trained(tmp_path, resume=True), whole[0])
    logs = [
        [(row["step"], row["loss"], row["learning_rate"]) for row in csv.DictReader((out / "log.csv").open())]
        for out in (tmp_path, whole[1])
    ]
    assert logs[0] == logs[1]


def test_a_finished_run_resumes_to_itself(whole: tuple[nn.Module, Path]) -> None:
    before = (whole[1] / "log.csv").read_bytes()
    assert same(trained(whole[1], resume=True), whole[0])
    assert (whole[1] / "log.csv").read_bytes() == before


def test_a_run_is_never_overwritten_unasked(whole: tuple[nn.Module, Path]) -> None:
    before = (whole[1] / "last.safetensors").read_bytes()
    with pytest.raises(FormeryError, match="already holds a training run"):
        trained(whole[1])
    assert (whole[1] / "last.safetensors").read_bytes() == before


def test_resuming_with_another_plan_names_what_differs(whole: tuple[nn.Module, Path]) -> None:
    with pytest.raises(
        FormeryError, match=r"learning_rate was 0\.01 and is now 0\.02, seed was 0 and is now 3;"
    ):
        trained(whole[1], Plan(**(vars(PLAN) | {"learning_rate": 2e-2, "seed": 3})), resume=True)
    with pytest.raises(FormeryError, match=r"steps was 30 and is now 20.*stop_after"):
        trained(whole[1], Plan(**(vars(PLAN) | {"steps": 20})), resume=True)


def test_resuming_with_another_model_names_the_tensor(whole: tuple[nn.Module, Path]) -> None:
    with pytest.raises(FormeryError, match=r"embed\.weight is \(23, 16\) there and \(23, 8\) in this model"):
        train(Tiny(width=8), next_token, Counting(), PLAN, whole[1], resume=True, progress=False)


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    trained(tmp_path, stop_after=7)
    whole_file = (tmp_path / "last.safetensors").read_bytes()
    for damaged in (whole_file[:-100], b"", b"\x80\x04."):
        (tmp_path / "last.safetensors").write_bytes(damaged)
        with pytest.raises(FormeryError, match="no whole checkpoint"):
            trained(tmp_path, resume=True)


def test_the_best_survives_a_resume(tmp_path: Path) -> None:
    scores = iter([0.5, 1.0, 2.0])

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"loss": next(scores)}

    trained(tmp_path, stop_after=10, evaluate=evaluate)
    best = (tmp_path / "best.safetensors").read_bytes()
    torch.manual_seed(1)
    result = train(Tiny(), next_token, Counting(), PLAN, tmp_path, evaluate, resume=True, progress=False)
    assert (result.best_step, result.best_scores) == (10, {"loss": 0.5})
    assert (tmp_path / "best.safetensors").read_bytes() == best


@pytest.mark.parametrize("better", ["loss", "lowest loss", "higher bleu"])
def test_a_score_that_cannot_choose_the_best_is_refused(tmp_path: Path, better: str) -> None:
    with pytest.raises(FormeryError, match="better|bleu"):
        trained(tmp_path, better=better)


class Reversing:
    """Pairs of a sequence and its reverse, of unequal lengths, padded."""

    def batch(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        source = torch.randint(1, VOCABULARY, (8, 6), generator=generator)
        positions = torch.arange(6).expand(8, 6).clone()
        positions[::2, 4:] = -1
        tokens = torch.cat([torch.zeros(8, 1, dtype=torch.long), source.flip(1)], dim=1)
        tokens[::2, 1:5] = source[::2, :4].flip(1)
        padded = torch.cat([torch.zeros(8, 1, dtype=torch.long), positions + (positions >= 0).long()], dim=1)
        return {"source": source, "source_positions": positions, "tokens": tokens, "positions": padded}


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_the_house_s_own_models_train_resume_exactly_and_ship(tmp_path: Path, kind: str) -> None:
    def fresh() -> Decoder | EncoderDecoder:
        torch.manual_seed(2)
        if kind == "decoder":
            return language_model(VOCABULARY, 16, 2, 4, 2, 32, max_length=16, dropout=0.1)
        return translator(VOCABULARY, 16, 1, 1, 4, 32, max_length=16, start_token=0, dropout=0.1)

    objective, batches = (next_token, Counting()) if kind == "decoder" else (translate(0.1), Reversing())
    evaluate = mean_loss(objective, [batches.batch(1000)])
    plan = Plan(steps=40, learning_rate=1e-2, warmup=4, evaluate_every=20)
    once, twice = fresh(), fresh()
    before = evaluate(once.eval())["loss"]
    result = train(once, objective, batches, plan, tmp_path / "once", evaluate, progress=False)
    assert result.best_scores["loss"] < before - 0.2 and result.best_weights is not None
    train(twice, objective, batches, plan, tmp_path / "twice", evaluate, stop_after=13, progress=False)
    again = fresh()
    train(again, objective, batches, plan, tmp_path / "twice", evaluate, resume=True, progress=False)
    assert same(once, again) and not same(once, twice)
    load_weights(once, result.best_weights)
    save(once, tmp_path / "model")
    assert evaluate(load(tmp_path / "model").eval())["loss"] == pytest.approx(
        result.best_scores["loss"], rel=1e-6
    )


# what a run leaves to look at


def test_the_log_has_one_row_a_step_with_the_plan_s_rates_and_the_scores(
    whole: tuple[nn.Module, Path],
) -> None:
    rows = list(csv.DictReader((whole[1] / "log.csv").open()))
    assert list(rows[0]) == [
        "step",
        "loss",
        "learning_rate",
        "tokens_per_second",
        "seconds",
        "evaluation/loss",
    ]
    assert [int(row["step"]) for row in rows] == list(range(1, 31))
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(
        [PLAN.learning_rate_at(s) for s in range(1, 31)]
    )
    assert [int(row["step"]) for row in rows if row["evaluation/loss"]] == [10, 20, 30]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds) and all(float(row["tokens_per_second"]) > 0 for row in rows)


def test_a_row_that_was_torn_is_written_anew(tmp_path: Path) -> None:
    trained(tmp_path, stop_after=14)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("1")  # the beginning of row 15
    trained(tmp_path, resume=True)
    assert logged_steps(tmp_path) == list(range(1, 31))


def test_the_plan_the_curve_and_the_events_are_there(whole: tuple[nn.Module, Path]) -> None:
    assert json.loads((whole[1] / "plan.json").read_text()) == PLAN.describe()
    assert (whole[1] / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert event_steps(whole[1], "loss") == list(range(1, 31))
    assert event_steps(whole[1], "evaluation/loss") == [10, 20, 30]


def test_a_checkpoint_holds_shared_tensors_once_and_no_passing_buffer(whole: tuple[nn.Module, Path]) -> None:
    with safe_open(whole[1] / "best.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model/embed.weight" in names and "model/head.weight" not in names
    assert "model/seen" in names and "model/passing" not in names
    assert all(name.startswith("model/") for name in names)


def test_plain_progress_is_a_line_with_loss_speed_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path, progress=True)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert (
        captured.out == ""
        and lines[0].startswith("counting: step 1/30  loss ")
        and lines[0].endswith(" left")
    )
    assert "tokens/s" in lines[0] and any("step 20 evaluated: loss" in line for line in lines)
    assert len(lines) <= 6


# recipes


def test_recipes_are_found_and_run_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counting_recipe_of_a_test.py").write_text(
        "NAME, DESCRIPTION = 'count', 'Counts.'\n"
        "def run(out, max_steps, resume):\n"
        "    out.write_text(f'{max_steps} {resume}')\n"
    )
    discover()  # papers take from the recipes that ship, which are hidden next
    package = importlib.import_module("formery.train.recipes")
    monkeypatch.setattr(package, "__path__", [str(tmp_path)])
    run_recipe("count", tmp_path / "told", max_steps=5, resume=True)
    assert (tmp_path / "told").read_text() == "5 True"
    with pytest.raises(FormeryError, match="no recipe named 'cuont'; did you mean count"):
        run_recipe("cuont", tmp_path)
    with pytest.raises(FormeryError, match="at least 1, not 0"):
        run_recipe("count", tmp_path, max_steps=0)
