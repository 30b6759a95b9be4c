"""FreeDave: the text and the order of static decoding, in the fewest passes that drafts allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import PlanError
from hasten.masked.attention import undirected
from hasten.masked.candidates.freedave import FreeDave
from hasten.masked.engine import MaskedModel
from hasten.masked.run import Run
from hasten.masked.slots import Guess
from hasten.plan import Plan
from hasten.technique import Loss, Slot
from hasten.zoo.corpus import shipped_held_out
from tests import models
from tests.techniques.fillers import MASK, NEVER, filler, prompt, record

NEW = 24
FORMS = {
    "plain": {},
    "shifted": {"shifted": True},
    "blocks": {"block_length": 8},
    "shifted blocks": {"shifted": True, "block_length": 8},
}


def rows(seed: int = 0) -> dict[str, Tensor]:
    """Three prompts of different lengths, padded on the left."""
    return models.padded([prompt(1, n, seed=seed + n)[0] for n in (12, 7, 10)])


def write(
    model: Any, plan: str, inputs: dict[str, Tensor], *, block: int | None = None, **arguments: Any
) -> tuple[Tensor, dict[str, int]]:
    """The ids that a plan gives, and its counters."""
    settings = {"max_new_tokens": NEW, **NEVER, **arguments}
    with hasten.apply(model, *([plan] if plan else [])) as fast:
        assert isinstance(fast, MaskedModel)
        ids = fast.generate(**inputs, block_length=block, **settings)
        return ids, fast.activity


# ----------------------------------------------------------------------------- the same as static


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [1, 8, 24])
def test_the_text_is_that_of_static_decoding(form: str, block: int) -> None:
    model = filler(**FORMS[form])
    wanted, static = write(model, "", rows(), block=block)
    assert static["passes"] == NEW
    for num_draft in (2, 4, 8, NEW):
        ids, activity = write(model, f"freedave(num_draft={num_draft})", rows(), block=block)
        assert torch.equal(ids, wanted)
        assert activity["emitted"] == static["emitted"]
        # What a random model says of the next place seldom holds once the one before it is filled.
        assert activity["passes"] < NEW or (block == 1 and activity["passes"] == NEW)


def test_many_prompts_at_once() -> None:
    model = filler(sharp=8.0)
    for seed in range(3):
        inputs = {"input_ids": prompt(8, 11, seed=seed)}
        wanted, _ = write(model, "", inputs)
        for num_draft in (2, 4, 8):
            ids, activity = write(model, f"freedave(num_draft={num_draft})", inputs)
            assert torch.equal(ids, wanted)
            assert 0 < activity["freedave.accepted"] <= activity["freedave.drafted"]


def test_one_draft_is_static_decoding_pass_by_pass() -> None:
    for form in FORMS.values():
        with hasten.apply(filler(**form)) as fast:
            static = record(fast, prompt(3), block=8)
        with hasten.apply(filler(**form), "freedave(num_draft=1)") as fast:
            single = record(fast, prompt(3), block=8)
        # Nothing of its own; where models see blocks, what is filled already is not asked for again.
        assert single.run.activity.keys() == static.run.activity.keys()
        for counter in ("passes", "emitted"):
            assert single.run.activity[counter] == static.run.activity[counter]
        assert single.run.activity["positions"] <= static.run.activity["positions"]
        assert all(torch.equal(*pair) for pair in zip(single.after, static.after, strict=True))


@dataclass
class Jump:
    """One verification: the drafts, what was said at them, and what was kept."""

    before: Tensor
    drafts: Tensor
    guess: Guess | None
    best: Tensor


@pytest.fixture
def jumps(monkeypatch: pytest.MonkeyPatch) -> list[Jump]:
    """Every verification from here on."""
    found: list[Jump] = []
    verify = FreeDave.verify

    def noted(self: FreeDave, state: Any, run: Run, drafts: Tensor, guess: Guess | None) -> Tensor:
        best = verify(self, state, run, drafts, guess)
        found.append(Jump(run.tokens, drafts, guess, best))
        return best

    monkeypatch.setattr(FreeDave, "verify", noted)
    return found


def by_masks_left(texts: list[Tensor]) -> list[dict[int, list[int]]]:
    """For each row its text at each number of masks left."""
    return [
        {row.count(MASK): row for row in states}
        for states in zip(*(text.tolist() for text in texts), strict=True)
    ]


@pytest.mark.parametrize("form", FORMS)
def test_places_are_filled_in_the_order_of_static_decoding(form: str, jumps: list[Jump]) -> None:
    model, inputs = filler(**FORMS[form], sharp=8.0), rows()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with hasten.apply(model) as fast:
        static = record(fast, ids, NEW, mask=mask, block=12)
    right = by_masks_left([static.before[0], *static.after])
    with hasten.apply(model, "freedave(num_draft=6)") as fast:
        run = record(fast, ids, NEW, mask=mask, block=12).run
    assert len(run.trace or []) < NEW
    for text in run.trace or []:
        for row, states in zip(text.tolist(), right, strict=True):
            assert row == states[row.count(MASK)]
    longest = 0
    for jump in jumps:  # also each single place inside a jump
        for row, best in enumerate(jump.best.tolist()):
            for draft in jump.drafts[row, : best + 1].tolist():
                assert draft == right[row][draft.count(MASK)]
            longest = max(longest, best)
    assert longest >= 1


# ---------------------------------------------------------------------------- the fewest passes


def fewest_passes(model: Any, static: list[Tensor], first: int, block: int) -> int:
    """Passes with drafts of any depth, found from the states of static decoding (one row) alone.

    From each state the furthest later one is taken that its own guess foresaw place by place. A
    state with one place left needs no pass to be finished.
    """
    form = hasten.open_subject(model).form
    assert form is not None
    new = len(static) - 1
    places, number = torch.arange(first, first + new), torch.arange(new) // block
    total, at = 1, 0  # the look at the beginning
    while at < new:
        with torch.no_grad(), undirected(model):
            logits = model(input_ids=static[at][None]).logits[0]
        logits[:, MASK] = -torch.inf
        said = logits[places - 1 if form.shifted else places].softmax(dim=-1).max(dim=-1)
        still = static[at][places] == MASK
        key = (said.values - 2 * number).masked_fill(~still, -torch.inf)
        draft, reached = static[at].clone(), at
        for place in key.argsort(descending=True, stable=True)[: new - at]:
            draft[places[place]] = said.indices[place]
            if not torch.equal(draft, static[reached + 1]):
                break
            reached += 1
        total += at < new - 1
        at = reached
    return total


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("block", [1, 8, 24])
def test_deep_drafts_need_as_few_passes_as_can_be(shifted: bool, block: int) -> None:
    found = []
    for seed in range(4):
        model = filler(shifted=shifted, seed=seed)
        with hasten.apply(model) as fast:
            static = record(fast, prompt(seed=seed), NEW, block=block)
        states = [static.before[0][0], *(text[0] for text in static.after)]
        wanted = fewest_passes(model, states, 12, block)
        inputs = {"input_ids": prompt(seed=seed)}
        ids, activity = write(model, f"freedave(num_draft={NEW})", inputs, block=block)
        assert torch.equal(ids[0], states[-1])
        assert activity["passes"] == wanted
        assert activity.get("freedave.accepted", 0) >= NEW - activity["passes"]
        found.append(wanted)
    assert min(found) < NEW


def test_without_the_check_it_is_so_many_tokens_a_pass() -> None:
    different = 0
    for seed in range(8):
        inputs = {"input_ids": prompt(seed=seed)}
        static, _ = write(filler(), "", inputs)
        ids, activity = write(filler(), "freedave(num_draft=4, checked=False)", inputs)
        several, plain = write(filler(), "fixed_steps(tokens_per_pass=4)", inputs)
        assert torch.equal(ids, several)
        assert plain["passes"] == NEW // 4
        assert activity["passes"] == NEW // 4 + 1  # the last drafts are looked at, and not heeded
        different += not torch.equal(ids, static)
    assert different >= 6
    assert FreeDave(checked=False).loss_class() is Loss.LOSSY
    assert FreeDave().loss_class() is Loss.EXACT


@pytest.mark.zoo
def test_two_fifths_of_the_passes_write_the_same_where_blocks_are_seen() -> None:
    subject = hasten.open_subject("code-dlm-block", dtype="float32")
    assert subject.tokenizer is not None
    passes = {"": 0, "freedave(num_draft=8)": 0}
    for file in sorted(shipped_held_out(), key=lambda file: file.num_bytes)[-4:]:
        ids = torch.tensor([subject.tokenizer(file.text, verbose=False)["input_ids"][100:196]])
        texts = []
        for plan in passes:
            out, activity = write(subject, plan, {"input_ids": ids}, max_new_tokens=64)
            passes[plan] += activity["passes"]
            texts.append(out)
        assert torch.equal(*texts)
    assert passes[""] == 4 * 64
    assert passes["freedave(num_draft=8)"] < 0.4 * passes[""]


# ------------------------------------------------------------------------------ the check itself


def test_a_right_token_at_the_wrong_place_does_not_pass() -> None:
    with hasten.apply(filler()) as fast:
        run, _ = fast._generation(prompt(), None, 4, {"max_new_tokens": 4, **NEVER})
    first = run.length - 4

    def guess(*texts: tuple[float, ...], second: int = 7) -> Guess:
        tokens = torch.full((1, len(texts), run.length), 7)
        tokens[..., first + 1] = second
        sure = torch.zeros(1, len(texts), run.length)
        sure[0, :, first:] = torch.tensor(texts)
        return Guess(tokens, sure, torch.empty(1, len(texts), 0), run.needed())

    technique = FreeDave(num_draft=3)
    one = torch.tensor([0])
    drafts = technique.propose(None, run, guess((0.4, 0.3, 0.2, 0.1)).of(one, one))
    assert [row[first:] for row in drafts[0].tolist()] == [
        [7, MASK, MASK, MASK],
        [7, 7, MASK, MASK],
        [7, 7, 7, MASK],
    ]
    same = [(0.9, 0.3, 0.2, 0.1), (0.9, 0.9, 0.2, 0.1), (0.9, 0.9, 0.9, 0.1)]
    assert technique.verify(None, run, drafts, guess(*same)).tolist() == [2]
    # After the first place it would be the third one's turn, though the second gets its 7 too.
    swapped = (0.9, 0.2, 0.3, 0.1)
    assert technique.verify(None, run, drafts, guess(swapped, *same[1:])).tolist() == [0]
    # The right place, and another token.
    assert technique.verify(None, run, drafts, guess(*same, second=8)).tolist() == [0]
    # The last draft needs no guess of its own.
    assert technique.verify(None, run, drafts, guess(*same[:2])).tolist() == [2]
    assert technique.verify(None, run, drafts, guess(same[0], swapped)).tolist() == [2]


def test_drafts_as_a_batch_say_what_a_tree_says() -> None:
    """One sequence that repeats the block for each draft, where the prompt does not see the block."""
    size, count = 8, 3
    for shifted in (False, True):
        model = filler(block_length=size, shifted=shifted, sharp=1.0)
        with hasten.apply(model, "freedave(num_draft=3)") as fast:
            ids = prompt(1, 2 * size)
            run, _ = fast._generation(ids, None, size, {"max_new_tokens": size, **NEVER})
            run.states = {id(technique): None for technique, _ in run.slots.entries()}
            drafts = FreeDave(num_draft=count).propose(None, run, run.look())
            said = run.evaluate(drafts)
            assert said.row is not None
            batch = said.logits[0, said.row]
        before = 2 * size
        tokens = torch.cat((ids[0], *drafts[0, :, before:]))[None]
        positions = torch.cat(
            (torch.arange(before), torch.arange(before, before + size).repeat(count))
        )
        group = torch.cat(
            (torch.zeros(before).long(), torch.arange(1, count + 1).repeat_interleave(size))
        )
        prefix = torch.arange(before) // size
        visible = group[:, None] == group
        visible[:, :before] = group[:, None] > 0
        visible[:before, :before] = prefix[:, None] >= prefix
        with torch.no_grad(), undirected(model, visible[None, None]):
            tree = model(input_ids=tokens, position_ids=positions[None], use_cache=False).logits[0]
        own = tree[before:].view(count, size, -1)
        if shifted:  # a block's first place is spoken for by the token before it
            own = torch.cat((tree[before - 1].expand(count, 1, -1), own[:, :-1]), dim=1)
        own[..., MASK] = -torch.inf
        torch.testing.assert_close(batch, own, rtol=0, atol=1e-5)


def test_threshold_decoding_checks_by_subset(jumps: list[Jump]) -> None:
    model, inputs = filler(sharp=6.0), {"input_ids": prompt(3)}
    plan = "freedave(num_draft=4, threshold=0.6)"
    _, activity = write(model, plan, inputs)
    _, exact = write(model, "freedave", inputs)
    assert activity["passes"] < exact["passes"]
    assert FreeDave(threshold=0.6).loss_class() is Loss.LOSSY

    jumped = 0
    for jump in jumps[: -exact["passes"]]:
        for row, best in enumerate(jump.best.tolist()):
            texts = jump.drafts[row].tolist()
            at = 0
            while jump.guess is not None and at < jump.guess.tokens.shape[1]:
                draft, confidence = texts[at], jump.guess.confidence[row, at]
                still = [place for place, token in enumerate(draft) if token == MASK]
                sure = {p for p in still if float(confidence[p]) > 0.6}
                sure |= {max(still, key=confidence.tolist().__getitem__)} if still else set()
                after = [
                    int(jump.guess.tokens[row, at, p]) if p in sure else token
                    for p, token in enumerate(draft)
                ]
                fitting = [
                    index
                    for index in range(at + 1, len(texts))
                    if all(a in (b, MASK) for a, b in zip(texts[index], after, strict=True))
                ]
                if not fitting:
                    break
                at = max(fitting)
            assert at == best
            jumped += at > 0
    assert jumped


def test_a_threshold_of_zero_fills_a_block_at_once() -> None:
    _, activity = write(filler(), "freedave(threshold=0.0)", {"input_ids": prompt()}, block=8)
    assert activity["passes"] == NEW // 8
    assert not [key for key in activity if key.startswith("freedave")]


# ---------------------------------------------------------------------------------- all settings


@pytest.mark.parametrize("shifted", [False, True])
def test_a_seed_draws_the_same_tokens(shifted: bool) -> None:
    model, texts = filler(shifted=shifted), []
    for seed in range(3):
        settings = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": seed}
        for block in (12, 3):
            wanted, _ = write(model, "", rows(), block=block, **settings)
            for draft in (2, 5):
                plan = f"freedave(num_draft={draft})"
                ids, _ = write(model, plan, rows(), block=block, **settings)
                assert torch.equal(ids, wanted)
        texts.append(wanted)
    assert not torch.equal(texts[0], texts[1])


def test_a_penalty_counts_what_each_draft_holds() -> None:
    wanted, _ = write(filler(), "", rows(), repetition_penalty=1.4)
    ids, activity = write(filler(), "freedave", rows(), repetition_penalty=1.4)
    assert torch.equal(ids, wanted) and activity["freedave.accepted"]


def test_rows_that_end_at_different_times() -> None:
    model, inputs = filler(sharp=8.0), rows()
    free, _ = write(model, "", inputs, block=8)
    ends = 0
    for token in set(free[:, 18].tolist() + free[:, 25].tolist()):
        wanted, static = write(model, "", inputs, block=8, eos_token_id=token, pad_token_id=0)
        ids, activity = write(
            model, "freedave", inputs, block=8, eos_token_id=token, pad_token_id=0
        )
        assert torch.equal(ids, wanted)
        assert activity["passes"] <= static["passes"]
        ends += static["passes"] < NEW
    assert ends


@pytest.mark.parametrize("block", [None, 5, 1])
def test_holes_in_texts(block: int | None) -> None:
    model = filler(shifted=True)
    text = prompt(3, 30, seed=4)
    holes = torch.rand(text.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    holes[:, 0] = False
    text = text.masked_fill(holes, MASK)
    with hasten.apply(model) as fast:
        wanted = fast.infill(text, block_length=block)
        static = fast.activity["passes"]
    for num_draft in (1, 3, 9):
        with hasten.apply(model, f"freedave(num_draft={num_draft})") as fast:
            assert torch.equal(fast.infill(text, block_length=block), wanted)
            assert fast.activity["passes"] <= static


def test_bfloat16_runs() -> None:
    model = filler(dtype=torch.bfloat16)
    ids, activity = write(model, "freedave", rows(), block=8)
    assert not bool((ids == MASK).any())
    assert NEW // 4 <= activity["passes"] <= NEW


# ------------------------------------------------------------------------------------ other plans


@pytest.mark.parametrize("form", FORMS)
def test_on_a_cache_it_is_that_caches_static_decoding(form: str) -> None:
    model = filler(**FORMS[form])
    for window in (0, 3):
        cache = f"freecache(guided=False, window={window})"
        wanted, static = write(model, cache, rows(), block=8)
        ids, activity = write(model, f"{cache}, freedave", rows(), block=8)
        assert torch.equal(ids, wanted)
        assert activity["passes"] < static["passes"] == NEW
        assert activity["freecache.reused"] > 0


def test_what_it_goes_with() -> None:
    assert FreeDave.contract.slots == (Slot.CANDIDATES, Slot.COMMITTER)
    for other in ("freecache", "dinfer", "fixed_steps", "confidence_threshold", "saber"):
        with pytest.raises(PlanError, match="freedave"):
            Plan.parse("freedave", other)
    Plan.parse("freedave", "freecache(guided=False)")
