"""A*-decoding: the checks of its sheet, on tiny random models and on a task with a known answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import hasten
from hasten.causal.controller import scorers
from hasten.causal.controller.a_star_decoding import AStarDecoding
from hasten.causal.controller.scorers import Candidate, find_scorer, register_scorer
from hasten.causal.controller.search import Search
from hasten.causal.controller.steps import Border
from hasten.causal.engine import CausalModel
from hasten.causal.run import Run
from hasten.errors import HastenError, PlanError
from hasten.measure.parsing import parses
from hasten.plan import Plan
from tests import models
from tests.techniques.held_out import function_beginnings

NAME = "a_star_decoding"
NEW = 40


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scorers that a test adds are gone after it."""
    monkeypatch.setattr(scorers, "_SCORERS", dict(scorers._SCORERS))


def plan(**knobs: Any) -> AStarDecoding:
    return AStarDecoding(**knobs)


def searched(
    fast: CausalModel, ids: Tensor, mask: Tensor | None = None, **arguments: Any
) -> tuple[Tensor, list[Search]]:
    """Generate; sequences and the searches of all rows."""
    run = fast._run(ids, mask, arguments)
    fast._execute(run)
    return run.sequences(), run.states[id(fast.bound[0][0])].searches


def tiny(**overrides: Any) -> CausalModel:
    knobs = overrides.pop("knobs", {})
    return hasten.apply(
        models.tiny_model(**overrides), plan(**knobs), tokenizer=models.tiny_tokenizer()
    )


# ------------------------------------------------------------------------------- a task to search in

STEPS = 8
RIGHT = "xy"  # two right answers for each step
PROBABILITIES = (
    (0.5, 0.2, 0.3),
    (0.2, 0.3, 0.5),
)  # x, y and the wrong one; the argmax errs every other step


def task_vocabulary() -> list[str]:
    steps = [f"{kind}{i}" for i in range(STEPS) for kind in ("x", "y", "w")]
    return ["<eos>", "go:", *steps, *(f";{i}\n" for i in range(STEPS))]


def task_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(task_vocabulary())}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def task_model() -> LlamaForCausalLM:
    """A Markov chain as a Llama: its attention and MLP write nothing, its head is the table."""
    vocabulary = task_vocabulary()
    size = len(vocabulary) + len(vocabulary) % 2
    table = torch.full((size, size), -30.0)  # (next, token)
    at = {token: i for i, token in enumerate(vocabulary)}
    for i in range(STEPS):
        before = at["go:"] if i == 0 else at[f";{i - 1}\n"]
        for kind, p in zip("xyw", PROBABILITIES[i % 2], strict=True):
            table[at[f"{kind}{i}"], before] = torch.tensor(p).log()
            table[at[f";{i}\n"], at[f"{kind}{i}"]] = 0.0
    table[at["<eos>"], at[f";{STEPS - 1}\n"]] = 0.0
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=False, eos_token_id=0, pad_token_id=0, bos_token_id=None, rms_norm_eps=0.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(table / size**0.5)  # the norm makes one-hot rows sqrt(size) long
    return model


TASK, PROMPT = task_vocabulary(), torch.tensor([[1]])
LENGTH = 2 * STEPS + 1  # tokens of a solution


def answers(ids: Sequence[int]) -> list[str]:
    """The answer of each step: x, y or w."""
    return [TASK[i][0] for i in ids if TASK[i][0] in "xyw"]


def is_right(candidate: Candidate) -> bool:
    return "w" not in answers(candidate.ids)


def share_right(ids: Sequence[int]) -> float:
    given = answers(ids)
    return sum(answer in RIGHT for answer in given) / max(1, len(given))


def oracle(candidates: Sequence[Candidate]) -> list[float]:
    return [float(is_right(c)) for c in candidates]


@pytest.fixture(scope="module")
def task() -> LlamaForCausalLM:
    return task_model()


def solve(model: PreTrainedModel, *, seeds: int = 12, **knobs: Any) -> tuple[float, float, float]:
    """Accuracy, share of right steps and generated tokens, averaged over seeds."""
    solved = right = generated = 0.0
    with hasten.apply(model, plan(**knobs), tokenizer=task_tokenizer()) as fast:
        for seed in range(seeds):
            ids = fast.generate(PROMPT, max_new_tokens=LENGTH, seed=seed)[0, 1:].tolist()
            solved += "w" not in answers(ids) and len(answers(ids)) == STEPS
            right += share_right(ids)
            generated += fast.activity[f"{NAME}.generated"]
    return solved / seeds, right / seeds, generated / seeds


def test_the_task_samples_as_it_should(task: LlamaForCausalLM) -> None:
    with torch.no_grad():
        logits = task(input_ids=torch.tensor([[1, 2, TASK.index(";0\n")]])).logits[0]
    for row, i in ((0, 0), (2, 1)):
        probs = logits[row].softmax(dim=-1)
        found = [float(probs[TASK.index(f"{kind}{i}")]) for kind in "xyw"]
        assert found == pytest.approx(PROBABILITIES[i], abs=1e-4)


# ------------------------------------------------------------------------------- one child


@pytest.mark.parametrize(
    "limits", [{}, {"max_tokens": 17}, {"max_depth": 2}, {"keep_caches": False}], ids=str
)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_one_child_at_temperature_zero_is_greedy(kv_heads: int, limits: dict[str, Any]) -> None:
    model = models.tiny_model(num_key_value_heads=kv_heads)
    inputs = models.padded([models.prompt(1, n, seed=n)[0] for n in (9, 17)])
    with hasten.apply(model) as plain:
        wanted = plain.generate(**inputs, max_new_tokens=NEW)
    knobs = {"num_children": 1, "temperature": 0.0, "max_step": 7, **limits}
    with hasten.apply(model, plan(**knobs), tokenizer=models.tiny_tokenizer()) as fast:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        sequences, found = searched(fast, ids, mask, max_new_tokens=NEW)
        assert torch.equal(sequences, wanted)
        assert [s.counts["generated"] + s.counts["completed"] for s in found] == [NEW, NEW]
        assert fast.activity["emitted"] == 2 * NEW
        assert not any(key.startswith(NAME) for key in fast.activity)  # nothing to choose from


def test_one_child_is_plain_sampling_with_one_call_per_step() -> None:
    calls: list[int] = []
    register_scorer("counting", lambda candidates: calls.append(len(candidates)) or [0.5])
    model, ids = models.tiny_model(), models.prompt()
    arguments = {"max_new_tokens": NEW, "do_sample": True, "seed": 4}
    with hasten.apply(model) as plain:
        wanted = plain.generate(ids, temperature=0.7, **arguments)
    knobs = {"num_children": 1, "temperature": 0.7, "scorer": "counting", "max_step": 6}
    with hasten.apply(model, plan(**knobs), tokenizer=models.tiny_tokenizer()) as fast:
        sequences, (search,) = searched(fast, ids, **arguments)
        assert torch.equal(sequences, wanted)
        assert search.counts["generated"] == wanted.shape[1] - ids.shape[1]
        assert calls == [1] * search.counts["expanded"]
        assert len(calls) == search.goals[0].depth >= NEW // 6


# ------------------------------------------------------------------------------- order of the search


@pytest.mark.parametrize("seed", range(6))
def test_an_oracle_never_extends_what_is_wrong_beside_what_is_right(
    task: LlamaForCausalLM, seed: int
) -> None:
    seen: set[tuple[int, ...]] = {()}

    def watching(candidates: Sequence[Candidate]) -> list[float]:
        seen.update(c.ids for c in candidates)
        return oracle(candidates)

    register_scorer("watching", watching)
    with hasten.apply(
        task, plan(scorer="watching", num_children=4), tokenizer=task_tokenizer()
    ) as fast:
        sequences, (search,) = searched(fast, PROMPT, max_new_tokens=LENGTH, seed=seed)
    taken = [tuple(node.tokens[0, 1:].tolist()) for node in search.trail]
    waiting: set[tuple[int, ...]] = {()}
    for ids in taken:
        if "w" in answers(ids):
            assert not any("w" not in answers(other) for other in waiting)
        waiting.discard(ids)
        waiting |= {other for other in seen if _parent(other) == ids}
    # A right node none of whose children is right costs one detour; all else is on the path.
    right = [ids for ids in seen if "w" not in answers(ids)]
    lost = [
        ids for ids in right if ids in taken and not any(_parent(other) == ids for other in right)
    ]
    detours = len(lost) - 1  # the goal has no children either
    assert "w" not in answers(sequences[0].tolist())
    assert len(search.trail) == STEPS + 2 + detours
    assert LENGTH <= search.counts["generated"] <= 4 * (LENGTH + 2 * detours)


def _parent(ids: tuple[int, ...]) -> tuple[int, ...] | None:
    """The path one step before, in the task's two-token steps."""
    return None if not ids else ids[: (len(ids) - 1) // 2 * 2]


def test_a_constant_score_follows_the_documented_order() -> None:
    knobs = {
        "scorer": "constant",
        "step_border": "",
        "max_step": 5,
        "max_tokens": 400,
        "temperature": 1.0,
    }
    with tiny(knobs=knobs) as fast:
        _, (search,) = searched(fast, models.prompt(), max_new_tokens=30, seed=0, eos_token_id=[])
        assert [node.depth for node in search.trail] == list(range(7))  # deeper first
        assert len({node.f for node in search.trail[1:]}) == 1
        children = {tuple(node.tokens[0].tolist()) for node in search.trail}
        assert len(children) == 7
    with tiny(knobs={**knobs, "cost": "length"}) as fast:
        _, (search,) = searched(fast, models.prompt(), max_new_tokens=30, seed=0, eos_token_id=[])
        depths = [node.depth for node in search.trail]
        assert depths == sorted(depths) and depths[:5] == [0, 1, 1, 1, 2]  # breadth first


def test_the_first_of_equals_is_the_one_sampled_first() -> None:
    scored: list[tuple[int, ...]] = []
    register_scorer("noting", lambda cs: [scored.append(c.ids) or 0.5 for c in cs])
    with tiny(
        knobs={"scorer": "noting", "step_border": "", "max_step": 5, "temperature": 1.0}
    ) as fast:
        _, (search,) = searched(fast, models.prompt(), max_new_tokens=10, seed=0, eos_token_id=[])
    first = tuple(search.trail[1].tokens[0, 16:].tolist())
    assert first == scored[0] and len(scored) == 6


@pytest.mark.parametrize("aggregate", ["last", "min", "product"])
def test_f_never_falls_under_the_cost_of_change(aggregate: str) -> None:
    knobs = {
        "scorer": "chance", "step_border": "", "max_step": 4, "max_tokens": 800, "temperature": 1.0,
        "aggregate": aggregate,
    }  # fmt: skip
    for seed in range(3):
        with tiny(knobs=knobs) as fast:
            _, (search,) = searched(
                fast, models.prompt(), max_new_tokens=24, seed=seed, eos_token_id=[]
            )
        values = [node.f for node in search.trail]
        assert len(values) > 8
        assert all(a <= b for a, b in pairwise(values))
        for node in search.trail[1:]:
            assert node.f >= 1 - node.r - 1e-9  # f = g + h, and g is no less than 0
    falls = 0
    for seed in range(3):
        with tiny(knobs={**knobs, "cost": "drop", "aggregate": "last"}) as fast:
            _, (search,) = searched(
                fast, models.prompt(), max_new_tokens=24, seed=seed, eos_token_id=[]
            )
        falls += sum(b.f < a.f for a, b in pairwise(search.trail))
    assert falls > 0


def test_f_is_cost_plus_estimate() -> None:
    given = {(): 1.0}
    register_scorer(
        "fixed",
        lambda cs: [given.setdefault(c.ids, random.Random(str(c.ids)).random()) for c in cs],
    )
    for cost in ("change", "drop", "length"):
        knobs = {
            "scorer": "fixed",
            "step_border": "",
            "max_step": 4,
            "temperature": 1.0,
            "cost": cost,
        }
        with tiny(knobs=knobs) as fast:
            _, (search,) = searched(
                fast, models.prompt(), max_new_tokens=24, seed=1, eos_token_id=[]
            )
        for node in search.trail:
            ids = tuple(node.tokens[0, 16:].tolist())
            path = [given[ids[:n]] for n in (0, *node.step_ends)]
            g = 0.0
            for before, after in pairwise(path):
                g += max(0.0, before - after) if cost == "drop" else abs(before - after)
            g += 0.1 * len(ids) / 24 if cost == "length" else 0.0
            assert node.f == pytest.approx(g + 1 - path[-1], abs=1e-9)


def test_r_of_a_path() -> None:
    for aggregate in ("last", "min", "product"):
        given: dict[tuple[int, ...], float] = {}
        register_scorer(
            "fixed",
            lambda cs, g=given: [
                g.setdefault(c.ids, 0.5 + 0.5 * random.Random(str(c.ids)).random()) for c in cs
            ],
        )
        knobs = {
            "scorer": "fixed",
            "step_border": "",
            "max_step": 4,
            "temperature": 1.0,
            "aggregate": aggregate,
        }
        with tiny(knobs=knobs) as fast:
            _, (search,) = searched(
                fast, models.prompt(), max_new_tokens=24, seed=1, eos_token_id=[]
            )
        for node in search.trail[1:]:
            ids = tuple(node.tokens[0, 16:].tolist())
            path = torch.tensor([given[ids[:n]] for n in node.step_ends], dtype=torch.float64)
            wanted = {"last": path[-1], "min": path.min(), "product": path.prod()}[aggregate]
            assert node.r == pytest.approx(float(wanted))


# ------------------------------------------------------------------------------- counting and limits


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens that the loop emitted, whoever asked for them."""
    counts: list[int] = []
    original = Run.emit

    def counting(run: Run, verdict: Any) -> None:
        counts.append(int((verdict.tokens >= 0).sum()))
        original(run, verdict)

    monkeypatch.setattr(Run, "emit", counting)
    yield counts


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 50, 333])
def test_all_tokens_are_counted_and_limited(emitted: list[int], max_tokens: int) -> None:
    with tiny(knobs={"scorer": "chance", "max_tokens": max_tokens, "max_step": 7}) as fast:
        sequences = fast.generate(models.prompt(), max_new_tokens=NEW, seed=0, eos_token_id=[])
        activity = fast.activity
    generated, completed = activity[f"{NAME}.generated"], activity.get(f"{NAME}.completed", 0)
    assert generated <= max_tokens
    assert generated + completed == sum(emitted)
    assert sequences.shape[1] == 16 + NEW  # an answer comes all the same
    assert activity["emitted"] == NEW
    if max_tokens < NEW:
        assert generated == max_tokens and completed > 0


def test_frontier_is_capped_and_equals_are_merged() -> None:
    knobs = {
        "scorer": "chance",
        "max_frontier": 4,
        "max_step": 4,
        "step_border": "",
        "cost": "length",
    }
    with tiny(knobs=knobs) as fast:
        fast.generate(models.prompt(), max_new_tokens=NEW, seed=0, eos_token_id=[])
        assert fast.activity[f"{NAME}.peak_frontier"] == 4
        assert fast.activity[f"{NAME}.dropped"] > 0
        assert f"{NAME}.merged" not in fast.activity
    with tiny(knobs={**knobs, "temperature": 0.0}) as fast:  # all children are the same
        fast.generate(models.prompt(), max_new_tokens=NEW, seed=0, eos_token_id=[])
        expanded = fast.activity[f"{NAME}.expanded"]
        assert fast.activity[f"{NAME}.merged"] == 2 * expanded
        assert fast.activity[f"{NAME}.scored"] == expanded == fast.activity[f"{NAME}.scorer_calls"]


def test_the_same_seed_finds_the_same() -> None:
    ids = models.prompt()
    with tiny(knobs={"scorer": "chance", "max_step": 6}) as fast:
        seeded = [fast.generate(ids, max_new_tokens=NEW, seed=seed) for seed in (1, 1, 2)]
        plain = [fast.generate(ids, max_new_tokens=NEW) for _ in range(2)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    assert torch.equal(plain[0], plain[1])


def test_caches_are_counted_and_can_be_dropped() -> None:
    knobs = {"scorer": "likelihood", "max_step": 4, "step_border": "", "max_tokens": 400}
    ids, arguments = models.prompt(1, 40), {"max_new_tokens": NEW, "seed": 0, "eos_token_id": []}
    with hasten.apply(models.tiny_model()) as plain:
        plain.generate(ids, **arguments)
        one = plain.peak_cache_bytes
    with tiny(knobs=knobs) as fast:
        kept = fast.generate(ids, **arguments)
        peak = fast.peak_cache_bytes
        assert f"{NAME}.reread" not in fast.activity
    with tiny(knobs={**knobs, "keep_caches": False}) as fast:
        again = fast.generate(ids, **arguments)
        assert torch.equal(kept, again)
        assert fast.activity[f"{NAME}.reread"] > 0
        assert one < fast.peak_cache_bytes < peak


# ------------------------------------------------------------------------------- forks


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("keep_caches", [True, False])
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_stored_node_goes_on_as_a_fresh_prefill(
    family: str, keep_caches: bool, is_padded: bool
) -> None:
    model = models.tiny_model(family)
    knobs = {"scorer": "chance", "max_step": 5, "step_border": "", "keep_caches": keep_caches}
    inputs = models.padded(
        [models.prompt(1, n, seed=n)[0] for n in ((9, 14) if is_padded else (14,))]
    )
    row = 0
    with hasten.apply(model, plan(**knobs)) as fast:
        run = fast._run(
            inputs["input_ids"], inputs["attention_mask"], {"max_new_tokens": NEW, "seed": 0}
        )
        for technique, bound in fast.bound:
            run.states[id(technique)] = technique.begin(run, bound)
        state = run.states[id(fast.bound[0][0])]
        search = Search(fast.bound[0][0], run, row, state.scorer, state.sampler)
        level = [search.frontier[0][3]]
        for _ in range(3):
            children = search.expand(level[0])
            search.score(level[0], children)
            level = children[::-1]  # not in the order in which they were made
            for node in children:
                twin = search.resume(node)
                tokens = node.tokens[:, int(run.pads[row]) :]
                with torch.no_grad():
                    fresh = model(input_ids=tokens, use_cache=False).logits[:, -1]
                torch.testing.assert_close(twin.last.logits[:, 0], fresh, rtol=0, atol=1e-5)
                if not keep_caches:
                    assert node.run is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_batch(dtype: torch.dtype) -> None:
    rows = [models.prompt(1, n, seed=n)[0] for n in (6, 15, 11)]
    inputs = models.padded(rows)
    with tiny(dtype=dtype, knobs={"scorer": "likelihood", "max_step": 6}) as fast:
        out = fast.generate(**inputs, max_new_tokens=NEW, seed=0, pad_token_id=0)
        assert torch.equal(out[:, :15], inputs["input_ids"])
        # The first row draws first, so it finds what it finds alone.
        alone = fast.generate(rows[0][None], max_new_tokens=NEW, seed=0, pad_token_id=0)[0, 6:]
        found = out[0, 15 : 15 + alone.numel()]
        if dtype == torch.float32:
            assert torch.equal(found, alone)


def test_rows_may_end_at_different_lengths(task: LlamaForCausalLM) -> None:
    register_scorer("oracle", oracle)
    ids = torch.tensor([[1], [TASK.index(";5\n")], [TASK.index(";6\n")]])
    with hasten.apply(
        task, plan(scorer="oracle", num_children=8), tokenizer=task_tokenizer()
    ) as fast:
        out = fast.generate(ids, max_new_tokens=LENGTH, seed=0, pad_token_id=1)
        assert out.shape == (3, 1 + LENGTH)
        assert [int((row == 1).sum()) for row in out] == [1, LENGTH - 5, LENGTH - 3]
        assert fast.activity["emitted"] == LENGTH + 5 + 3


def test_streaming_gives_the_answer_once() -> None:
    with tiny(knobs={"max_step": 6}) as fast:
        wanted = fast.generate(models.prompt(), max_new_tokens=NEW, seed=0)
        parts = list(fast.stream(models.prompt(), max_new_tokens=NEW, seed=0))
    assert len(parts) == 1 and torch.equal(parts[0], wanted[0, 16:])


def test_scoring_a_given_text_is_unchanged() -> None:
    model, ids, forced = models.tiny_model(), models.prompt(2), models.prompt(2, NEW, seed=5)
    with hasten.apply(model) as plain:
        wanted = plain.score(ids, forced).nll
    with hasten.apply(model, plan(), tokenizer=models.tiny_tokenizer()) as fast:
        assert torch.equal(fast.score(ids, forced).nll, wanted)
        assert not any(key.startswith(NAME) for key in fast.activity)


def test_stop_strings_make_a_goal() -> None:
    tokenizer = models.tiny_tokenizer()
    with tiny(knobs={"scorer": "constant", "temperature": 1.5, "max_step": 6}) as fast:
        arguments = {
            "max_new_tokens": 100,
            "seed": 0,
            "eos_token_id": [],
            "stop_strings": ["Q", "7"],
        }
        sequences, (search,) = searched(fast, models.prompt(), tokenizer=tokenizer, **arguments)
    text = tokenizer.decode(sequences[0, 16:])
    assert len(text) < 100 and text[-1] in "Q7" and not set(text[:-1]) & set("Q7")
    assert search.goals


# ------------------------------------------------------------------------------- what it gains


def test_a_good_score_beats_best_of_n_with_fewer_tokens(task: LlamaForCausalLM) -> None:
    register_scorer("oracle", oracle)
    best = {"num_children": 12, "step_border": "", "max_step": 1000, "stop": "best"}
    search = solve(task, scorer="oracle", num_children=4)
    best_of_n = solve(task, scorer="oracle", **best)
    by_chance = solve(task, scorer="chance", num_children=4)
    assert search[0] > best_of_n[0] + 0.3
    assert search[2] < best_of_n[2] / 2.5
    assert by_chance[0] < 0.15  # the advantage is the scorer's


def test_noise_takes_the_advantage_away(task: LlamaForCausalLM) -> None:
    def noisy(sigma: float) -> str:
        def score(candidates: Sequence[Candidate]) -> list[float]:
            noise = [random.Random(str(c.ids)).gauss(0, sigma) for c in candidates]
            return [
                min(1.0, max(0.0, value + n))
                for value, n in zip(oracle(candidates), noise, strict=True)
            ]

        register_scorer("noisy", score)
        return "noisy"

    right = [
        solve(task, scorer=noisy(sigma), num_children=4, max_tokens=150)[1]
        for sigma in (0.0, 1.0, 20.0)
    ]
    assert right[0] > right[1] > right[2]


def test_an_inverted_score_is_worse_than_greedy(task: LlamaForCausalLM) -> None:
    register_scorer("inverted", lambda candidates: [1 - share_right(c.ids) for c in candidates])
    with hasten.apply(task) as plain:
        greedy = share_right(plain.generate(PROMPT, max_new_tokens=LENGTH)[0, 1:].tolist())
    assert greedy == 0.5
    assert solve(task, scorer="inverted", num_children=4)[1] < greedy / 2


def test_the_best_goal_is_returned(task: LlamaForCausalLM) -> None:
    register_scorer("share", lambda candidates: [share_right(c.ids) for c in candidates])
    knobs = {"scorer": "share", "stop": "best", "max_tokens": 300, "cost": "length"}
    with hasten.apply(task, plan(**knobs), tokenizer=task_tokenizer()) as fast:
        sequences, (search,) = searched(fast, PROMPT, max_new_tokens=LENGTH, seed=0)
        assert fast.activity[f"{NAME}.generated"] == 300
        assert share_right(sequences[0, 1:].tolist()) == max(goal.r for goal in search.goals)
        assert len(search.goals) == fast.activity[f"{NAME}.goals"] > 1


# ------------------------------------------------------------------------------- borders and scorers


def _line(text: str, *, prompt: str = "", finished: bool = False) -> Any:
    tokenizer = models.tiny_tokenizer()
    ids = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
    return SimpleNamespace(
        tokens=torch.tensor([ids]),
        lengths=torch.tensor([len(ids)]),
        finished=torch.tensor([finished]),
        prompt_length=len(prompt),
        tokenizer=tokenizer,
    )


@pytest.mark.parametrize(
    ("text", "border", "reached"),
    [
        ("x = 1", "\n", False),
        ("x = 1\n", "\n", True),
        ("\n\n   ", "\n", False),  # nothing but blanks is no step
        ("\n  x\n", "\n", True),
        ("a\nb\n", "\n\n", False),
        ("a\n\n", "\n\n", True),
        ("see:\n```\nx = 1\n", "\n", False),  # inside a block
        ("see:\n```\nx = 1\n```\n", "\n", True),
        ("a\nb\n", "", False),
        ("a" * 20, "\n", True),  # the longest that a step may be
    ],
)
def test_borders(text: str, border: str, reached: bool) -> None:
    assert Border(border, 20).is_reached(_line(text), 0, 0) is reached
    assert Border(border, 20).is_reached(_line(text, finished=True), 0, 0)
    # A block that the prompt opened is where the continuation lives.
    assert Border(border, 20).is_reached(_line(text, prompt="```\n"), 0, 4) is reached


def candidate(prompt: str, text: str) -> Candidate:
    tokenizer = models.tiny_tokenizer()
    prompt_ids, ids = (
        tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in (prompt, text)
    )
    return Candidate(prompt_ids, ids, (-1.0, -2.0), (2,), False, tokenizer)


@pytest.mark.parametrize(
    ("prompt", "text", "score"),
    [
        ("def f(x):\n", "    return x\n", 1.0),
        ("def f(x):\n", "    return (x,\n", 1.0),
        ("def f(x):\n", '    """Says\n', 1.0),
        ("def f(x):\n", "    # only a remark\n", 1.0),
        ("def f(x):\n", "    return )\n", 0.0),
        ("def f(x):\n", "    return x\n  oops\n", 0.0),
        ("def f(x):\n", "    return )", 1.0),  # the line is not over
        ("x = 1\n", "    y = 2\n", 0.0),
        ("try:\n    x()\n", "exc", 1.0),
        ("Dear Sir,\n", "I am\n", 0.5),
        ("    return 1\n", "def f():\n", 0.5),
    ],
)
def test_parses(prompt: str, text: str, score: float) -> None:
    assert scorers.parses([candidate(prompt, text)]) == [score]
    combined = scorers.parses_likelihood([candidate(prompt, text)])[0]
    assert combined == (0.0 if score == 0.0 else pytest.approx(2.718281828**-1.5))


def test_likelihood_is_that_of_the_raw_logits() -> None:
    seen: list[Candidate] = []
    register_scorer("noting", lambda cs: [seen.append(c) or 0.5 for c in cs])
    model, ids = models.tiny_model(), models.prompt()
    knobs = {"scorer": "noting", "temperature": 0.6, "max_step": 6}
    with hasten.apply(model, plan(**knobs), tokenizer=models.tiny_tokenizer()) as fast:
        fast.generate(ids, max_new_tokens=NEW, seed=0, repetition_penalty=1.3)
    for c in seen:
        assert c.prompt_ids == tuple(ids[0].tolist()) and c.step_ends[-1] == len(c.ids) == len(
            c.log_probs
        )
        full = torch.tensor([[*c.prompt_ids, *c.ids]])
        with torch.no_grad():
            log_probs = model(input_ids=full, use_cache=False).logits[0, :-1].log_softmax(dim=-1)
        wanted = log_probs.gather(1, full[0, 1:, None])[len(c.prompt_ids) - 1 :, 0]
        assert c.log_probs == pytest.approx(wanted.tolist(), abs=1e-4)
        assert scorers.likelihood([c])[0] == pytest.approx(float(wanted.mean().exp()), abs=1e-4)


def test_chance_is_even_and_repeats() -> None:
    values = scorers.chance([Candidate((), (i, i + 1), (), (), False) for i in range(400)])
    assert values == scorers.chance([Candidate((), (i, i + 1), (), (), False) for i in range(400)])
    assert 0.4 < sum(values) / 400 < 0.6 and min(values) < 0.1 and max(values) > 0.9


# ------------------------------------------------------------------------------- what is refused


def test_an_unknown_scorer_is_named_with_the_nearest() -> None:
    with pytest.raises(PlanError, match="Did you mean parses"):
        hasten.apply(models.tiny_model(), f"{NAME}(scorer='parse')")
    with pytest.raises(PlanError, match="plain word"):
        register_scorer("two words", oracle)
    assert find_scorer("parses") is scorers.parses


@pytest.mark.parametrize(
    ("returned", "message"),
    [([1.5], "from 0 to 1"), ([float("nan")], "from 0 to 1"), ([], "0 numbers")],
)
def test_a_scorer_that_returns_no_scores_is_named(returned: list[float], message: str) -> None:
    register_scorer("broken", lambda candidates: returned)
    with (
        tiny(knobs={"scorer": "broken", "num_children": 1}) as fast,
        pytest.raises(HastenError, match=message),
    ):
        fast.generate(models.prompt(), max_new_tokens=NEW)


def test_text_needs_a_tokenizer() -> None:
    model = models.tiny_model()
    with hasten.apply(model, plan()) as fast, pytest.raises(HastenError, match="give tokenizer="):
        fast.generate(models.prompt(), max_new_tokens=NEW)
    with hasten.apply(model, plan(step_border="", scorer="likelihood")) as fast:
        fast.generate(models.prompt(), max_new_tokens=NEW)


@pytest.mark.parametrize("kv", ["sinks_recent(budget=0.5)", "recycled_attention(budget=0.25)"])
def test_composes_with_what_keeps_no_statistics(kv: str) -> None:
    knobs = {"scorer": "likelihood", "max_step": 6, "num_children": 2}
    for keep_caches in (True, False):
        chain = (plan(**knobs, keep_caches=keep_caches), kv)
        with hasten.apply(models.tiny_model(), *chain, tokenizer=models.tiny_tokenizer()) as fast:
            out = fast.generate(models.prompt(2, 40), max_new_tokens=NEW, seed=0, eos_token_id=[])
            assert out.shape == (2, 40 + NEW)


@pytest.mark.parametrize("other", ["medusa", "prompt_lookup", "d2o", "entropy_adaptive_decoding"])
def test_clashes(other: str) -> None:
    with pytest.raises(PlanError, match="leave one of them out"):
        Plan.parse(NAME, other)


# ------------------------------------------------------------------------------- on the zoo


@pytest.mark.zoo
def test_a_verifier_helps_a_trained_model(zoo: Callable[[str], Path]) -> None:
    """Share of continuations that parse: search above greedy is not asked for (greedy code is dull and
    parses), but search above chance and above best-of-n, and an inverted verifier below greedy."""
    register_scorer("inverted", lambda cs: [1 - value for value in scorers.parses(cs)])
    subject = hasten.open_subject(zoo("code-lm-small"))
    prompts = function_beginnings(8)

    def parsed(*chain: AStarDecoding) -> int:
        found = 0
        with hasten.apply(subject, *chain) as fast:
            for seed, prompt in enumerate(prompts):
                ids = subject.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")[
                    "input_ids"
                ]
                out = fast.generate(ids, max_new_tokens=64, seed=seed)
                text = scorers.decoded(subject.tokenizer, out[0, ids.shape[1] :].tolist())
                found += bool(parses(prompt + text, prompt_chars=len(prompt)))
        return found

    greedy, search = parsed(), parsed(plan(max_tokens=250))
    assert search >= greedy
    assert search >= parsed(plan(max_tokens=250, scorer="chance")) + 3
    assert search >= parsed(
        plan(step_border="", max_step=1000, stop="best")
    )  # best of three, as many tokens
    assert parsed(plan(max_tokens=250, scorer="inverted")) <= greedy - 2
