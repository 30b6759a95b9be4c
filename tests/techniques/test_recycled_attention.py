"""Recycled Attention: what the sheet says would prove it wrong."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.causal.attention import AttentionView, selected
from hasten.causal.kv.reading import top_entries
from hasten.causal.kv.recycled_attention import Recycled, RecycledAttention, State
from tests import models

ARGUMENTS = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": -1}
NAME = "recycled_attention"


def logits(
    model: Any, technique: RecycledAttention | str, prompt: Tensor, continuation: Tensor
) -> Tensor:
    fast = hasten.apply(model, technique)
    found = fast.score(prompt, continuation, logits=True).logits
    fast.undo()
    return found


# ------------------------------------------------------------------------------------- neutral


@pytest.mark.parametrize(
    "plan",
    [
        "recycled_attention(budget=1.0)",
        "recycled_attention(stride=1)",
        "recycled_attention(budget=0.999, stride=5)",
        "recycled_attention(budget=0.999, stride=1000)",
        "recycled_attention(schedule='dynamic', threshold=1.01, stride=1)",
    ],
)
def test_full_steps_only_or_full_sets_are_dense_bit_for_bit(tiny_llama, plan: str) -> None:
    model = tiny_llama()
    ids, continuation = models.prompt(2, 30), models.prompt(2, 14, seed=1)
    assert torch.equal(logits(model, plan, ids, continuation), logits(model, "", ids, continuation))


def test_reading_a_full_set_by_gathering_is_dense_attention() -> None:
    query, keys, values = (torch.randn(2, heads, n, 8) for heads, n in ((4, 1), (2, 20), (2, 20)))
    everything = torch.randperm(20).expand(2, 2, -1)
    found = selected(query, keys, values, None, everything, 0.3)
    keys, values = keys.repeat_interleave(2, dim=1), values.repeat_interleave(2, dim=1)
    weights = (query @ keys.transpose(2, 3) * 0.3).softmax(dim=-1)
    torch.testing.assert_close(found, (weights @ values).transpose(1, 2), atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_full_step_chooses_what_it_attends_to_most(kv_heads: int) -> None:
    query, keys = torch.randn(3, 4, 1, 8), torch.randn(3, kv_heads, 40, 8)
    view = models.attention_view(query, keys)
    state = State()
    technique = RecycledAttention(budget=0.2, kernel=1)
    assert technique.read(state, view) is None  # nothing is remembered, so a full step
    last = state.layers[view.layer]
    scores = query @ keys.repeat_interleave(4 // kv_heads, dim=1).transpose(2, 3) * 8**-0.5
    pooled = scores.softmax(dim=-1)[:, :, 0].unflatten(1, (kv_heads, -1)).amax(dim=2)
    assert last.length == 40
    assert torch.equal(last.chosen.sort().values, pooled.topk(8).indices.sort().values)


def test_neighbours_of_an_attended_entry_are_chosen_with_it() -> None:
    query, keys = torch.ones(1, 1, 1, 8), torch.zeros(1, 1, 40, 8)
    keys[0, 0, 17] = 5.0
    state, view = State(), models.attention_view(query, keys)
    RecycledAttention(budget=0.125, kernel=5).read(state, view)
    assert set(state.layers[view.layer].chosen[0, 0].tolist()) == {15, 16, 17, 18, 19}


def test_the_prompt_chooses_by_its_last_row() -> None:
    query, keys = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8)
    prompt, alone = (
        models.attention_view(query, keys),
        models.attention_view(query[:, :, -1:], keys),
    )
    technique = RecycledAttention(budget=0.25)
    first, second = State(), State()
    assert technique.read(first, prompt) is None
    technique.read(second, alone)
    assert torch.equal(first.layers[prompt.layer].chosen, second.layers[alone.layer].chosen)
    assert first.full == 0 and second.full == 1  # a prompt is no decoding step


def test_padding_is_never_chosen_and_does_not_count() -> None:
    query, keys = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 40, 8)
    technique = RecycledAttention(budget=0.25)
    state, view = State(), models.attention_view(query, keys, pads=torch.tensor([0, 21]))
    technique.read(state, view)
    alone, alone_view = State(), models.attention_view(query[1:], keys[1:, :, 21:])
    technique.read(alone, alone_view)
    padded = state.layers[view.layer].chosen[1]
    assert ((padded == -1) | (padded >= 21)).all()
    for ours, theirs in zip(padded, alone.layers[alone_view.layer].chosen[0], strict=True):
        assert set(ours.tolist()) - {-1} == set((theirs + 21).tolist())


def test_later_tokens_are_always_read_and_a_draft_with_them() -> None:
    technique = RecycledAttention(budget=0.1, stride=50)
    state = State()
    keys = torch.randn(1, 2, 60, 8)
    view = models.attention_view(torch.randn(1, 4, 1, 8), keys[:, :, :40])
    technique.read(state, view)
    last = state.layers[view.layer]
    view.layer.update(keys[:, :, 40:], keys[:, :, 40:])  # sixteen tokens and a draft of four
    view.query, view.positions = torch.randn(1, 4, 4, 8), torch.arange(56, 60)[None]
    view.mask = torch.ones(4, 60, dtype=torch.bool).tril(56)[None, None]
    chosen = technique.read(state, view)
    assert chosen.shape == (1, 2, 4 + 20)
    assert torch.equal(chosen[..., :4], last.chosen)
    assert torch.equal(chosen[..., 4:], torch.arange(40, 60).expand(1, 2, -1))


# ------------------------------------------------------------------------------------ schedule


@dataclass(frozen=True, kw_only=True)
class Watched(RecycledAttention):
    """Writes down at which cache lengths the first layer takes a full step."""

    lengths: list = field(default_factory=list)

    def _choose(self, view: AttentionView) -> Recycled:
        if view.layer_idx == 0:
            self.lengths.append(view.layer.length)
        return super()._choose(view)


def test_every_token_is_in_the_cache_at_the_next_full_step(tiny_llama) -> None:
    watched = Watched(stride=6)
    fast = hasten.apply(tiny_llama(), watched)
    fast.generate(models.prompt(2, 20), **ARGUMENTS)
    fast.undo()
    # The prompt, then every sixth of the 23 passes: the cache holds all tokens processed so far.
    assert watched.lengths == [20, 26, 32, 38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_are_counted_to_the_entry(tiny_llama, dtype: torch.dtype) -> None:
    fast = hasten.apply(tiny_llama(dtype=dtype), "recycled_attention(budget=0.2, stride=6)")
    rows = [models.prompt(1, 20)[0], models.prompt(1, 13, seed=1)[0]]
    fast.generate(**models.padded(rows), **ARGUMENTS)
    fast.undo()
    read = skipped = 0
    for prompt in (20, 13):
        full_at, kept = prompt, math.ceil(0.2 * prompt - 1e-9)
        for length in range(prompt + 1, prompt + 24):
            if length - full_at == 6:
                full_at, kept = length, math.ceil(0.2 * length - 1e-9)
                read += length
            else:
                read += kept + length - full_at
                skipped += full_at - kept
    heads = 4 * 2  # of both layers
    assert fast.activity[f"{NAME}.entries_read"] == heads * read
    assert fast.activity[f"{NAME}.entries_skipped"] == heads * skipped
    assert fast.activity[f"{NAME}.full_reads"] == 2 * 3
    assert fast.activity[f"{NAME}.recycled_reads"] == 2 * 20


@pytest.mark.parametrize(("threshold", "full"), [(-1.0, 0), (1.01, 2 * 5)])
def test_the_dynamic_schedule_has_two_ends(tiny_llama, threshold: float, full: int) -> None:
    technique = RecycledAttention(schedule="dynamic", threshold=threshold, stride=4)
    fast = hasten.apply(tiny_llama(), technique)
    fast.generate(models.prompt(1, 20), **ARGUMENTS)
    fast.undo()
    assert fast.activity[f"{NAME}.full_reads"] == full  # never; or at each of the 23 // 4 checks


def test_the_dynamic_schedule_looks_at_the_query_of_the_last_full_step() -> None:
    technique = RecycledAttention(schedule="dynamic", threshold=0.9, stride=2, budget=0.1)
    keys = torch.randn(1, 1, 40, 8)
    first, other = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    state = State()
    view = models.attention_view(first, keys[:, :, :30])
    technique.read(state, view)
    # Steps one and three are not compared; at step two the query is what it was, at four not.
    for query, full in ((other, False), (2 * first, False), (other, False), (other, True)):
        view.layer.update(keys[:, :, :1], keys[:, :, :1])
        view.query = query
        assert (technique.read(state, view) is None) == full
    assert state.layers[view.layer].length == 34


def test_a_row_reads_the_same_alone_and_in_a_padded_batch(tiny_llama) -> None:
    fast = hasten.apply(tiny_llama(), "recycled_attention(budget=0.3, stride=5)")
    rows = [models.prompt(1, n, seed=n)[0] for n in (24, 17, 9)]
    together = fast.generate(**models.padded(rows), **ARGUMENTS)
    for row, ids in zip(rows, together, strict=True):
        assert torch.equal(ids[-24:], fast.generate(row[None], **ARGUMENTS)[0, -24:])
    fast.undo()


# ---------------------------------------------------------------------------------- on the zoo


@dataclass(frozen=True, kw_only=True)
class RandomSet(RecycledAttention):
    """The same schedule and number of entries, chosen without looking."""

    def _choose(self, view: AttentionView) -> Recycled:
        length, heads = view.layer.length, view.layer.keys.shape[1]
        scores = torch.rand(view.query.shape[0], heads, length)
        return Recycled(top_entries(scores, None, self.budget), length, None)


@dataclass(frozen=True, kw_only=True)
class Stale(RecycledAttention):
    """What the prompt chose, for ever, with as many late tokens as the fixed schedule reads."""

    first: dict = field(default_factory=dict)

    def _choose(self, view: AttentionView) -> Recycled:
        if view.is_prompt:
            self.first[view.layer_idx] = super()._choose(view).chosen
        return Recycled(self.first[view.layer_idx], view.layer.length, None)


@dataclass(frozen=True, kw_only=True)
class Mass(RecycledAttention):
    """Notes the attention mass of dense attention that each recycled read covers, by distance."""

    covered: dict = field(default_factory=lambda: defaultdict(list))

    def read(self, state: State, view: AttentionView) -> Tensor | None:
        chosen = super().read(state, view)
        if chosen is not None:
            weights = view.probabilities()[:, :, 0].unflatten(1, (-1, view.groups))
            index = chosen[:, :, None].expand(-1, -1, view.groups, -1)
            distance = view.layer.length - state.layers[view.layer].length
            self.covered[distance].append(weights.gather(3, index).sum(dim=3).mean().item())
        return chosen


@pytest.fixture(scope="module")
def code(zoo) -> tuple[Any, Tensor]:
    """A trained model and held-out files of 608 tokens."""
    from hasten.zoo import corpus

    subject = hasten.open_subject(zoo("code-lm-small"))
    tokenized = (subject.tokenizer(f.text)["input_ids"] for f in corpus.default_corpus().held_out)
    rows = [torch.tensor(ids[:608]) for ids in tokenized if len(ids) >= 608]
    return subject, torch.stack(rows[:8])


@pytest.mark.zoo
def test_refreshing_beats_a_stale_and_a_random_choice(code) -> None:
    subject, ids = code

    def nll(technique: RecycledAttention) -> tuple[float, float]:
        fast = hasten.apply(subject, technique)
        found = fast.score(ids[:, :512], ids[:, 512:])
        fast.undo()
        read, skipped = (
            found.activity.get(f"{NAME}.entries_{what}", 0) for what in ("read", "skipped")
        )
        return found.nll.mean().item(), read / max(1, read + skipped)

    dense, _ = nll(RecycledAttention(budget=1.0))
    ours, share = nll(RecycledAttention())
    random, random_share = nll(RandomSet())
    stale, stale_share = nll(Stale())
    fixed, fixed_share = nll(RecycledAttention(stride=2))
    dynamic, dynamic_share = nll(RecycledAttention(schedule="dynamic", stride=1, threshold=0.45))
    print(f"dense {dense:.4f} ours {ours:.4f} ({share:.3f}) random {random:.4f} ({random_share:.3f}) "
          f"stale {stale:.4f} ({stale_share:.3f}) stride 2 {fixed:.4f} ({fixed_share:.3f}) "
          f"dynamic {dynamic:.4f} ({dynamic_share:.3f})")  # fmt: skip
    assert share == pytest.approx(random_share, rel=0.05)
    assert share == pytest.approx(stale_share, rel=0.15)
    assert dense < ours < random - 0.3
    assert ours < stale - 0.3
    # At no more reads the dynamic schedule does not lose against the fixed one.
    assert dynamic_share <= fixed_share + 0.02 and dynamic < fixed + 0.01


@pytest.mark.zoo
def test_covered_attention_falls_slowly_with_the_distance_from_the_full_step(code) -> None:
    subject, ids = code
    mass = Mass(stride=16)
    fast = hasten.apply(subject, mass)
    fast.score(ids[:, :512], ids[:, 512:560])
    fast.undo()
    means = {distance: sum(found) / len(found) for distance, found in sorted(mass.covered.items())}
    print({distance: round(mean, 3) for distance, mean in means.items()})
    assert means[1] > 0.5
    assert means[15] > means[1] - 0.15
