"""Entropy-adaptive decoding: the checks of its sheet, on tiny random models and on the zoo."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hasten
from hasten.causal.controller.entropy_adaptive_decoding import LARGE, SMALL, Routing, entropy_bits
from hasten.causal.engine import CausalModel
from hasten.errors import HastenError, PlanError
from hasten.plan import Plan
from hasten.zoo import catalogue
from tests import models

NAME = "entropy_adaptive_decoding"
NEW = 40


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with another seed and fewer layers than the large model."""
    return models.save_checkpoint(tmp_path_factory.mktemp("small"), seed=7, num_hidden_layers=1)


@pytest.fixture(scope="module")
def twin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The large model itself, on disk."""
    return models.save_checkpoint(tmp_path_factory.mktemp("twin"))


def plan(small: Path, **knobs: Any) -> str:
    written = "".join(f", {k}={v!r}" for k, v in knobs.items())
    return f"{NAME}(small={str(small)!r}{written})"


def routed(
    fast: CausalModel,
    ids: Tensor,
    mask: Tensor | None = None,
    forced: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, Routing, Tensor]:
    """Generate (or score `forced`): sequences, the technique's state, logits (batch, new, vocabulary)."""
    run = fast._run(ids, mask, arguments)
    run.forced, run.trace = forced, []
    fast._execute(run)
    state = run.states[id(fast.bound[0][0])]
    return run.sequences(), state, torch.stack(run.trace, dim=1)


@torch.no_grad()
def fresh_logits(
    model: PreTrainedModel, sequences: Tensor, mask: Tensor | None, new: int
) -> Tensor:
    """Logits that decide the last `new` tokens, by one full pass without any cache: (batch, new, V)."""
    if mask is None:
        mask = torch.ones_like(sequences)
    else:
        mask = torch.cat(
            (mask, mask.new_ones(mask.shape[0], sequences.shape[1] - mask.shape[1])), dim=1
        )
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(
        input_ids=sequences, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    return logits[:, -new - 1 : -1]


def replay(
    bits: dict[str, Sequence[float]],
    *,
    threshold: float,
    window: int = 5,
    min_run: int = 5,
    hysteresis: float = 0.0,
    start: str = LARGE,
    inverted: bool = False,
) -> list[str]:
    """The rule written a second time: the lane of every token from the entropies of both models."""
    lanes: list[str] = []
    seen: list[float] = []
    for t in range(len(bits[LARGE])):
        lane = lanes[-1] if lanes else start
        since = next((i for i, x in enumerate(reversed(lanes)) if x != lane), len(lanes))
        if lanes and since >= min_run:
            mean = math.fsum(seen[-window:]) / len(seen[-window:])
            if inverted:
                lane = LARGE if mean <= threshold else SMALL
            elif lane == LARGE:
                lane = LARGE if mean > threshold else SMALL
            else:
                lane = LARGE if mean > threshold + hysteresis else SMALL
        lanes.append(lane)
        seen.append(bits[lane][t])
    return lanes


@torch.no_grad()
def median_entropy(*pair: PreTrainedModel) -> float:
    """A threshold that random models cross often."""
    ids = models.prompt(1, 64, seed=3)
    return float(
        torch.cat([entropy_bits(model(input_ids=ids).logits[0]) for model in pair]).median()
    )


# ------------------------------------------------------------------------------------ entropy


def test_entropy_is_in_bits() -> None:
    assert entropy_bits(torch.zeros(3, 4096)).tolist() == pytest.approx([12.0] * 3, abs=1e-5)
    assert float(entropy_bits(torch.full((96,), 5.0))) == pytest.approx(math.log2(96), abs=1e-5)
    sure = torch.full((8,), -math.inf)
    sure[3] = 0.0
    assert float(entropy_bits(sure)) == 0.0
    half = torch.tensor([1.0, 1.0, -math.inf], dtype=torch.bfloat16)
    assert float(entropy_bits(half)) == pytest.approx(1.0)


def test_entropy_is_taken_before_temperature(small_folder: Path) -> None:
    model = models.tiny_model()
    small = hasten.open_subject(small_folder).model
    knobs = {"threshold": median_entropy(model), "min_run": 2}
    with hasten.apply(model, plan(small_folder, **knobs)) as fast:
        sequences, state, _ = routed(
            fast,
            models.prompt(),
            max_new_tokens=NEW,
            do_sample=True,
            temperature=0.3,
            seed=1,
            eos_token_id=[],
        )
    lanes = {LARGE: model, SMALL: small}
    bits = {
        k: entropy_bits(fresh_logits(m, sequences, None, NEW)[0]).tolist() for k, m in lanes.items()
    }
    assert state.lanes == replay(bits, **knobs)
    assert len(set(state.lanes)) == 2


# ------------------------------------------------------------------------------------ end points


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_threshold_below_zero_is_the_large_model(small_folder: Path, kv_heads: int) -> None:
    model = models.tiny_model(num_key_value_heads=kv_heads)
    ids, forced = models.prompt(2), models.prompt(2, NEW, seed=5)
    with hasten.apply(model) as plain:
        wanted, score = (
            plain.generate(ids, max_new_tokens=NEW),
            plain.score(ids, forced, logits=True),
        )
    with hasten.apply(model, plan(small_folder, threshold=-1.0)) as fast:
        assert torch.equal(fast.generate(ids, max_new_tokens=NEW), wanted)
        assert not any(key.startswith(NAME) for key in fast.activity)
        assert torch.equal(fast.score(ids, forced, logits=True).logits, score.logits)


def test_threshold_without_end_is_the_small_model(small_folder: Path) -> None:
    small = hasten.open_subject(small_folder).model
    ids, forced = models.prompt(2), models.prompt(2, NEW, seed=5)
    with hasten.apply(small) as plain:
        wanted, score = (
            plain.generate(ids, max_new_tokens=NEW),
            plain.score(ids, forced, logits=True),
        )
    with hasten.apply(
        models.tiny_model(), plan(small_folder, threshold=math.inf, start="small")
    ) as fast:
        assert torch.equal(fast.generate(ids, max_new_tokens=NEW), wanted)
        assert fast.activity[f"{NAME}.large_tokens"] == 0
        assert torch.equal(fast.score(ids, forced, logits=True).logits, score.logits)


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True, "seed": 3, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("start", ["large", "small"])
def test_two_equal_models_are_the_one_model(
    twin_folder: Path, start: str, arguments: dict[str, Any]
) -> None:
    model = models.tiny_model()
    middle = median_entropy(model)
    ids = models.prompt(1, 24)
    with hasten.apply(model) as plain:
        wanted = plain.generate(ids, max_new_tokens=NEW, eos_token_id=[], **arguments)
    switches = 0
    for threshold in (-1.0, 0.9 * middle, middle, 1.1 * middle, math.inf):
        with hasten.apply(
            model, plan(twin_folder, threshold=threshold, min_run=2, start=start)
        ) as fast:
            ours = fast.generate(ids, max_new_tokens=NEW, eos_token_id=[], **arguments)
            assert torch.equal(ours, wanted)
            switches += fast.activity.get(f"{NAME}.switches", 0)
    assert switches >= 4


# ------------------------------------------------------------------------------------ switching


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_every_token_comes_from_a_model_that_knows_the_whole_prefix(
    tmp_path: Path, family: str, is_padded: bool
) -> None:
    folder = models.save_checkpoint(tmp_path, family, seed=7)
    model, small = models.tiny_model(family), hasten.open_subject(folder).model
    inputs = models.padded(
        [models.prompt(1, n, seed=n)[0] for n in ((9, 17, 12) if is_padded else (17,))]
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    forced = models.prompt(ids.shape[0], NEW, seed=5)
    full = {
        lane: fresh_logits(m, torch.cat((ids, forced), dim=1), mask, NEW)
        for lane, m in {LARGE: model, SMALL: small}.items()
    }
    bits = {lane: entropy_bits(logits).mean(dim=0).tolist() for lane, logits in full.items()}
    threshold = float(torch.tensor([*bits[LARGE], *bits[SMALL]]).median())
    knobs = {"threshold": threshold, "min_run": 2, "window": 3, "hysteresis": 0.02}
    with hasten.apply(model, plan(folder, **knobs)) as fast:
        _, state, logits = routed(fast, ids, mask, forced, max_new_tokens=NEW, do_sample=False)
        nll = fast.score(ids, forced, mask).nll
    assert state.lanes == replay(bits, **knobs)
    switches = [t for t in range(1, NEW) if state.lanes[t] != state.lanes[t - 1]]
    assert len(switches) >= 2
    for t in range(NEW):
        torch.testing.assert_close(logits[:, t], full[state.lanes[t]][:, t], rtol=0, atol=1e-5)
    expected = torch.stack(
        [full[lane][:, t] for t, lane in enumerate(state.lanes)], dim=1
    ).log_softmax(-1)
    torch.testing.assert_close(
        nll, -expected.gather(2, forced[..., None])[..., 0], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("rule", ["entropy", "inverted", "random"])
@pytest.mark.parametrize("min_run", [1, 5, 8])
def test_a_stretch_lasts_min_run_tokens(small_folder: Path, rule: str, min_run: int) -> None:
    model = models.tiny_model()
    knobs = {"threshold": median_entropy(model), "min_run": min_run, "rule": rule, "window": 3}
    with hasten.apply(model, plan(small_folder, **knobs)) as fast:
        _, state, _ = routed(fast, models.prompt(), max_new_tokens=120, eos_token_id=[])
    lengths = [len(list(group)) for _, group in groupby(state.lanes)]
    assert len(lengths) >= 3 and sum(lengths) == 120
    assert all(length >= min_run for length in lengths[:-1])


def test_hysteresis_needs_more_to_switch_up(small_folder: Path) -> None:
    model, small = models.tiny_model(), hasten.open_subject(small_folder).model
    counts = []
    for hysteresis in (0.0, 0.1, 10.0):
        knobs = {"threshold": median_entropy(model, small), "min_run": 1, "hysteresis": hysteresis}
        with hasten.apply(model, plan(small_folder, **knobs)) as fast:
            fast.score(models.prompt(), models.prompt(1, 120, seed=5))
            counts.append(fast.activity.get(f"{NAME}.switches", 0))
    assert (
        counts[0] > counts[1] > counts[2] == 1
    )  # the last one never comes back from the small model


def test_the_coin_meets_its_share(small_folder: Path) -> None:
    with hasten.apply(
        models.tiny_model(), plan(small_folder, rule="random", share=0.3, min_run=4)
    ) as fast:
        first = routed(fast, models.prompt(), max_new_tokens=240, eos_token_id=[])[1].lanes
        again = routed(fast, models.prompt(), max_new_tokens=240, eos_token_id=[])[1].lanes
        other = routed(fast, models.prompt(seed=1), max_new_tokens=240, eos_token_id=[])[1].lanes
    assert first == again != other
    shares = [lanes.count(LARGE) / 240 for lanes in (first, other)]
    assert all(0.15 < share < 0.45 for share in shares)


# ------------------------------------------------------------------------------------ counting


def test_counters_add_up(small_folder: Path) -> None:
    model = models.tiny_model()
    ids = models.prompt(1, 24)
    with hasten.apply(model, plan(small_folder, threshold=median_entropy(model))) as fast:
        _, state, _ = routed(fast, ids, max_new_tokens=60, eos_token_id=[])
        activity = fast.activity
    switches = [t for t in range(1, 60) if state.lanes[t] != state.lanes[t - 1]]
    assert activity[f"{NAME}.switches"] == len(switches)
    for lane, key in ((LARGE, "large_tokens"), (SMALL, "small_tokens")):
        assert activity[f"{NAME}.{key}"] == state.lanes.count(lane)
    # What was read twice: each pass reads one token or the prompt; the rest is catching up.
    assert activity["positions"] == 24 + 59 + activity[f"{NAME}.catch_up"]
    # A model that takes over reads what the other one wrote, save the newest token, and the last
    # token of its own, which it never read; the first time it reads the prompt instead of that.
    ends = [0, *switches, 60]
    lengths = [b - a for a, b in pairwise(ends)]
    assert activity[f"{NAME}.catch_up"] == 24 + sum(lengths[:-1]) - 1


def test_a_batch_decides_by_its_unfinished_rows(small_folder: Path) -> None:
    model, small = models.tiny_model(), hasten.open_subject(small_folder).model
    inputs = models.padded([models.prompt(1, n, seed=n)[0] for n in (9, 17, 12)])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    knobs = {"threshold": median_entropy(model), "min_run": 2}
    with hasten.apply(model, plan(small_folder, **knobs)) as fast:
        free = routed(fast, ids, mask, max_new_tokens=NEW, eos_token_id=[])[0][:, ids.shape[1] :]
        eos = int(free[1, 12])  # a token at which some row stops before the others
        sequences, state, _ = routed(
            fast, ids, mask, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0
        )
        activity = fast.activity
    new = sequences[:, ids.shape[1] :]
    ends = [row.tolist().index(eos) if eos in row else NEW for row in new]
    assert len(set(ends)) > 1
    live = torch.tensor([[t <= end for t in range(new.shape[1])] for end in ends]).float()
    bits = {}
    for lane, m in {LARGE: model, SMALL: small}.items():
        entropies = entropy_bits(fresh_logits(m, sequences, mask, new.shape[1]))
        bits[lane] = ((entropies * live).sum(dim=0) / live.sum(dim=0)).tolist()
    assert state.lanes == replay(bits, **knobs)
    assert (
        activity[f"{NAME}.small_tokens"] + activity[f"{NAME}.large_tokens"] == activity["emitted"]
    )


def test_bf16(small_folder: Path) -> None:
    model = models.tiny_model(dtype=torch.bfloat16)
    with hasten.apply(
        model, plan(small_folder, threshold=median_entropy(model), min_run=2)
    ) as fast:
        companion = fast.bound[0][1]
        assert companion.model.dtype == torch.bfloat16
        fast.generate(models.prompt(2), max_new_tokens=NEW)
        assert fast.activity[f"{NAME}.switches"] > 0


# ------------------------------------------------------------------------------------ what is refused


def test_auto_needs_a_zoo_model() -> None:
    with pytest.raises(PlanError, match="knows a smaller model only for code-lm"):
        hasten.apply(models.tiny_model(), NAME)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = models.save_checkpoint(tmp_path / "wide", vocab_size=128)
    with pytest.raises(PlanError, match="128 tokens and the model one of 96"):
        hasten.apply(models.tiny_model(), plan(folder))


def test_another_tokenizer_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = models.save_checkpoint(tmp_path)
    swapped = (folder / "tokenizer.json").read_text().replace('"a": ', '"ä": ')
    (folder / "tokenizer.json").write_text(swapped)
    with pytest.raises(PlanError, match="another tokenizer"):
        hasten.apply(tiny_checkpoint, plan(folder))


def test_a_small_model_with_a_short_context_is_refused(tmp_path: Path) -> None:
    folder = models.save_checkpoint(tmp_path, max_position_embeddings=32)
    with (
        hasten.apply(models.tiny_model(), plan(folder)) as fast,
        pytest.raises(HastenError, match="was made for 32"),
    ):
        fast.generate(models.prompt(1, 20), max_new_tokens=20)


@pytest.mark.parametrize(
    "other", ["medusa", "prompt_lookup", "double_sparsity", "d2o", "a_star_decoding"]
)
def test_clashes(other: str) -> None:
    with pytest.raises(PlanError, match="leave one of them out"):
        Plan.parse(NAME, other)


def test_composes_with_a_read_set(small_folder: Path) -> None:
    model = models.tiny_model()
    chain = (
        plan(small_folder, threshold=median_entropy(model), min_run=3),
        "recycled_attention(budget=0.25)",
    )
    with hasten.apply(model, *chain) as fast:
        fast.generate(models.prompt(2, 40), max_new_tokens=NEW, eos_token_id=[])
        assert fast.activity[f"{NAME}.switches"] > 0


# ------------------------------------------------------------------------------------ on the zoo


def shuffled(lanes: list[str], generator: random.Random) -> list[str]:
    """Random routing with the same share and the same lengths of stretches, in another order."""
    stretches: dict[str, list[int]] = {LARGE: [], SMALL: []}
    for lane, group in groupby(lanes):
        stretches[lane].append(len(list(group)))
    for lengths in stretches.values():
        generator.shuffle(lengths)
    order = [lane for lane, _ in groupby(lanes)]
    if len(stretches[LARGE]) == len(stretches[SMALL]) and generator.random() < 0.5:
        order = [SMALL if lane == LARGE else LARGE for lane in order]
    return [lane for lane in order for _ in range(stretches[lane].pop())]


@pytest.mark.zoo
@torch.no_grad()
def test_random_routing_is_worse_and_the_inverted_rule_worse_still(
    zoo: Callable[[str], Path],
) -> None:
    """At an equal share of large tokens, over held-out code; what is lost is measured as KL(large || small).

    The likelihood of the one token that really followed is ordered the same way, but needs all held-out
    files to be told from noise: its standard deviation a token is five times the gap between the models.
    """
    pair = {
        LARGE: hasten.open_subject(zoo("code-lm")),
        SMALL: hasten.open_subject(zoo("code-lm-small")),
    }
    windows = held_out_windows(pair[LARGE].tokenizer, count=32, length=256)
    new = 192
    logits = {
        lane: torch.cat(
            [subject.model(input_ids=part).logits[:, -new - 1 : -1] for part in windows.split(8)]
        )
        for lane, subject in pair.items()
    }
    bits = {lane: entropy_bits(value).tolist() for lane, value in logits.items()}
    log_probs = {lane: value.log_softmax(dim=-1) for lane, value in logits.items()}
    lost = (log_probs[LARGE].exp() * (log_probs[LARGE] - log_probs[SMALL])).sum(dim=-1)

    def routes(**knobs: Any) -> list[list[str]]:
        return [
            replay({lane: value[i] for lane, value in bits.items()}, **knobs)
            for i in range(len(windows))
        ]

    def share(routed: list[list[str]]) -> float:
        return sum(lanes.count(LARGE) for lanes in routed) / (len(windows) * new)

    def mean_loss(routed: list[list[str]]) -> Tensor:
        """(windows,) what is lost a token where the small model decided."""
        return (torch.tensor([[lane == SMALL for lane in lanes] for lanes in routed]) * lost).mean(
            dim=1
        )

    ours = routes(threshold=4.0)
    assert 0.2 < share(ours) < 0.6
    inverted = min(
        (routes(threshold=tenths / 10, inverted=True) for tenths in range(15, 45)),
        key=lambda routed: abs(share(routed) - share(ours)),
    )
    assert abs(share(inverted) - share(ours)) < 0.02
    # Each is compared with shuffles of its own stretches, window by window: windows differ far more
    # from each other than routes do, and the two rules share them out differently.
    dice = random.Random(0)
    for routed_by, sign in ((ours, 1), (inverted, -1)):
        shuffles = [mean_loss([shuffled(lanes, dice) for lanes in routed_by]) for _ in range(8)]
        gain = sign * (torch.stack(shuffles).mean(dim=0) - mean_loss(routed_by))
        assert float(gain.mean()) > 2 * float(gain.std()) / len(windows) ** 0.5
    assert float(mean_loss(ours).mean()) < float(mean_loss(inverted).mean())
    # The engine takes the routes that were computed here.
    with hasten.apply(pair[LARGE], plan(zoo("code-lm-small"), threshold=4.0)) as fast:
        _, state, _ = routed(fast, windows[:1, :-new], None, windows[:1, -new:], max_new_tokens=new)
    assert state.lanes == ours[0]
    with hasten.apply(pair[LARGE], NAME) as fast:  # auto finds the pair
        assert fast.bound[0][1].name == "code-lm-small"


def held_out_windows(tokenizer: Any, *, count: int, length: int) -> Tensor:
    """Windows of held-out files, (count, length), evenly spread."""
    rows: list[list[int]] = []
    for text in catalogue.held_out_files("code-lm"):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        rows += [ids[start : start + length] for start in range(0, len(ids) - length, length)]
    return torch.tensor(rows[:: len(rows) // count][:count])
