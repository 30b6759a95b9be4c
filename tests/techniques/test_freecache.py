"""FreeCache: what is computed and what is frozen, and which drafts a small model lets pass."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hasten
from hasten.errors import HastenError, PlanError
from hasten.masked.attention import undirected
from hasten.masked.committer.guided import Reader, approved
from hasten.masked.engine import MaskedModel
from hasten.masked.runners import Said
from hasten.plan import Plan
from hasten.technique import Slot
from hasten.zoo import catalogue
from tests import models
from tests.techniques.fillers import (
    MASK,
    NEVER,
    Record,
    filler,
    prompt,
    record,
    sentences,
    speaker,
)
from tests.techniques.stale import Stale

NEW = 24
FORMS = {
    "plain": {},
    "shifted": {"shifted": True},
    "blocks": {"block_length": 8},
    "shifted blocks": {"shifted": True, "block_length": 8},
}
ALONE = "freecache(guided=False{})"
Folder = Callable[..., Path]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """`folder("llama", seed=1, ...)`: a checkpoint folder of a random autoregressive model."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **arguments: Any) -> Path:
        key = f"{family} {arguments}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("guide")
            models.tiny_model(family, **arguments).save_pretrained(made[key])
        return made[key]

    return make


def padded() -> dict[str, Tensor]:
    """Three prompts of different lengths, padded on the left."""
    return models.padded([prompt(1, n, seed=n)[0] for n in (12, 7, 10)])


def steps(
    model: Any, plan: str, *, inputs: dict[str, Tensor] | None = None, new: int = NEW, **more: Any
) -> Record:
    """Generate with a plan and note every pass."""
    with hasten.apply(model, *([plan] if plan else [])) as fast:
        assert isinstance(fast, MaskedModel)
        given = inputs or {"input_ids": prompt()}
        return record(fast, given["input_ids"], new, mask=given.get("attention_mask"), **more)


def write(model: Any, plan: str, **arguments: Any) -> tuple[Tensor, dict[str, int]]:
    """The ids that a plan gives, and its counters."""
    run = steps(model, plan, **arguments).run
    return run.sequences(), run.activity


# ------------------------------------------------------------------------------------- the cache


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int] | None]:
    """First and last position of every pass from here on; None for all of them."""
    from hasten.masked.denoiser import Denoiser

    found: list[tuple[int, int] | None] = []
    read = Denoiser.read

    def noted(self: Any, *args: Any, rows: Tensor | None = None, **kwargs: Any) -> Said:
        if rows is not None:
            assert torch.equal(rows, torch.arange(int(rows[0]), int(rows[-1]) + 1))
        found.append(None if rows is None else (int(rows[0]), int(rows[-1])))
        return read(self, *args, rows=rows, **kwargs)

    monkeypatch.setattr(Denoiser, "read", noted)
    return found


@pytest.mark.parametrize(
    "form,knobs,ranges",
    [
        ("plain", "", [(12, 35), (12, 35), (20, 35), (20, 35), (28, 35)]),
        ("shifted", "", [(11, 35), (11, 35), (19, 35), (19, 35), (27, 35)]),
        ("plain", ", window=3", [(9, 22), (9, 30), (17, 30), (17, 35), (25, 35)]),
        # Attention sees 8 to 15, 16 to 23, ...; a block from 12 to 19 has its part in two of them.
        ("blocks", "", [(8, 23), (8, 31), (16, 31), (16, 35), (24, 35)]),
        ("shifted blocks", "", [(8, 23), (8, 31), (16, 31), (16, 35), (24, 35)]),
    ],
)
def test_which_positions_are_computed(
    form: str, knobs: str, ranges: list[Any], computed: list[Any]
) -> None:
    """In the first block, at the next one's start, in it, at the last one's start, in it."""
    _, activity = write(filler(**FORMS[form]), ALONE.format(knobs), block=8)
    first, second, inside, third, last = ranges
    assert computed == [None, *[first] * 7, second, *[inside] * 7, third, *[last] * 7]
    total = 36 + sum(stop - start + 1 for start, stop in computed[1:])
    assert activity["positions"] == total
    assert activity["freecache.reused"] == 36 * 24 - total


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 3])
def test_what_is_frozen_stays_bit_for_bit(
    form: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hasten.apply(filler(**FORMS[form]), ALONE.format(f", window={window}")) as fast:
        assert isinstance(fast, MaskedModel)
        inputs = padded()
        arguments = {"max_new_tokens": NEW, **NEVER}
        run, _ = fast._generation(inputs["input_ids"], inputs["attention_mask"], 8, arguments)
        kept: dict[int, Tensor] = {}  # by position, as it was when it was frozen
        checked = [0]

        def compare(current: Any) -> None:
            assert current.cache is not None
            (state,) = current.states.values()
            for position, before in kept.items():
                assert torch.equal(current.cache.states[..., position, :], before)
                checked[0] += 1
            # What is left of `frozen` was computed for the last time, and after it was finished.
            for position in range(state.frozen):
                kept.setdefault(position, current.cache.states[..., position, :].clone())

        run.on_tokens = compare
        fast._execute(run)
    assert checked[0] > 0 and len(kept) >= 12 + 8 + 8 - window - 8


@pytest.mark.parametrize("form", FORMS)
def test_a_refresh_in_every_pass_is_no_cache(form: str) -> None:
    model = filler(**FORMS[form])
    plain = steps(model, "", inputs=padded(), block=8)
    whole = {"passes": NEW, "positions": 3 * 36 * NEW, "emitted": 3 * NEW}
    for plan, work in (
        (ALONE.format(", refresh=1"), whole),
        (ALONE.format(", cache=False"), dict(plain.run.activity)),
    ):
        same = steps(model, plan, inputs=padded(), block=8)
        assert dict(same.run.activity) == work
        # The engine keeps keys and values of its own for models that see blocks: passes of another
        # width, which round otherwise.
        close = 1e-4 if "blocks" in form else 0.0
        for ours, theirs in zip(same.guesses, plain.guesses, strict=True):
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=close)


def expected_rows(
    texts: list[Tensor], form: str, *, window: int, refresh: int, block: int
) -> list[tuple[int, int] | None]:
    """Ends of what each pass computes, for prompts of 12 and blocks of the text that is decoded.

    All at first and at each refresh. Else from the block (in a shifted model from the place before
    it) to the end, and at a block's first pass from the block before it; a window moves both ends.
    """
    found: list[tuple[int, int] | None] = []
    starts: list[int] = []
    for number, text in enumerate(texts):
        column = int((text == MASK).any(dim=0).float().argmax())
        start = column - (column - 12) % block
        first = max(0, start - FORMS[form].get("shifted", False) - window)
        end = min(36, start + block + window) if window else 36
        since = starts[-1] if starts else first
        due = number == 0 or (refresh and number % refresh == 0)
        found.append(None if due else (min(since, first), end))
        starts.append(first)
    return found


@pytest.mark.parametrize("form", ["plain", "shifted"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("window,refresh", [(0, 0), (4, 0), (0, 3), (5, 4)])
def test_every_pass_says_what_a_pass_with_old_keys_and_values_says(
    window: int, refresh: int, guided: bool, form: str, folder: Folder, computed: list[Any]
) -> None:
    model, inputs = filler(**FORMS[form], sharp=8.0), padded()
    knobs = f"window={window}, refresh={refresh}"
    plan = ALONE.format(f", {knobs}")
    if guided:
        plan = f"freecache(guide='{folder()}', rule=top_k, top_k=40, {knobs})"
    noted = steps(model, plan, inputs=inputs, block=8)
    rows = expected_rows(noted.before, form, window=window, refresh=refresh, block=8)
    assert computed == [None if ends is None else (ends[0], ends[1] - 1) for ends in rows]
    assert guided == (len(rows) < NEW)
    stale = Stale(model, pads=torch.tensor([0, 5, 2]))
    for text, guess, ends in zip(noted.before, noted.guesses, rows, strict=True):
        said = stale.logits(text, None if ends is None else range(*ends))[:, guess.wanted]
        torch.testing.assert_close(guess.logits, said, rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", ["blocks", "shifted blocks"])
def test_a_model_of_blocks_says_what_it_says_with_old_keys_and_values(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.masked.denoiser import Denoiser

    rows: list[Tensor | None] = []
    read = Denoiser.read

    def noted_read(self: Any, *args: Any, **more: Any) -> Said:
        rows.append(more.get("rows"))
        return read(self, *args, **more)

    monkeypatch.setattr(Denoiser, "read", noted_read)
    model = filler(**FORMS[form], sharp=8.0)
    noted = steps(model, ALONE.format(""), inputs=padded(), block=12)
    stale = Stale(model, pads=torch.tensor([0, 5, 2]))
    for text, guess, some in zip(noted.before, noted.guesses, rows, strict=True):
        said = stale.logits(text, None if some is None else some.tolist())[:, guess.wanted]
        torch.testing.assert_close(guess.logits, said, rtol=0, atol=1e-3)


def test_a_refresh_comes_when_it_should(computed: list[Any]) -> None:
    write(filler(), ALONE.format(", refresh=5"), block=8)
    assert [at for at, rows in enumerate(computed) if rows is None] == [0, 5, 10, 15, 20]


@pytest.mark.parametrize("form", ["blocks", "shifted blocks"])
@pytest.mark.parametrize("block", [4, 8, 24])
def test_models_of_blocks_lose_nothing(form: str, block: int) -> None:
    model = filler(**FORMS[form])
    plain = steps(model, "", inputs=padded(), block=block)
    cached = steps(model, ALONE.format(""), inputs=padded(), block=block)
    assert torch.equal(cached.run.sequences(), plain.run.sequences())
    assert cached.run.activity["positions"] < 3 * 36 * NEW
    for ours, theirs in zip(cached.guesses, plain.guesses, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)


def test_a_finished_block_is_stored_once(computed: list[Any]) -> None:
    """Where attention sees the blocks that are decoded, each comes by once more, in full."""
    write(filler(block_length=8), ALONE.format(""), inputs={"input_ids": prompt(1, 16)}, block=8)
    for start in (16, 24):
        behind = [rows for rows in computed[start - 16 + 8 :] if rows is None or rows[0] <= start]
        assert behind == [(start, start + 15)]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("plan", ["", "fixed_steps(tokens_per_pass=4)"])
def test_what_is_frozen_belongs_to_the_finished_text(shifted: bool, plan: str) -> None:
    """With one layer, keys and values depend on their own token only; so nothing may be stale."""
    model = filler(shifted=shifted, num_hidden_layers=1)
    plain = steps(model, plan, inputs=padded(), block=8)
    together = ", ".join(filter(None, (plan, ALONE.format(""))))
    cached = steps(model, together, inputs=padded(), block=8)
    assert torch.equal(cached.run.sequences(), plain.run.sequences())
    for ours, theirs in zip(cached.guesses, plain.guesses, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)


def test_with_more_layers_it_is_stale() -> None:
    """Else the tests above would say nothing."""
    plain = steps(filler(), "", block=8)
    cached = steps(filler(), ALONE.format(""), block=8)
    assert torch.equal(cached.guesses[0].logits, plain.guesses[0].logits)
    assert not torch.allclose(cached.guesses[1].logits, plain.guesses[1].logits, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_a_batch_is_what_it_is_alone(form: str, folder: Folder) -> None:
    model = filler(**FORMS[form], sharp=8.0)
    inputs = padded()
    for plan in (ALONE.format(""), f"freecache(guide='{folder()}', ratio=0.0, top_k=40)"):
        ids, _ = write(model, plan, inputs=inputs, block=8)
        for row, length in enumerate((12, 7, 10)):
            alone = {"input_ids": prompt(1, length, seed=length)}
            single, _ = write(model, plan, inputs=alone, block=8)
            assert torch.equal(ids[row, 12 - length :], single[0])


# ------------------------------------------------------------------------------------- the guide


def left_to_right(model: PreTrainedModel, ids: Tensor, new: int, block: int) -> Tensor:
    """The first masked place gets the model's best token, one a pass, without this engine's loop."""
    form = hasten.open_subject(model).form
    assert form is not None
    text = torch.cat((ids, ids.new_full((ids.shape[0], new), MASK)), dim=1)
    for place in range(ids.shape[1], text.shape[1]):
        with torch.no_grad(), undirected(model):
            logits = model(input_ids=text, use_cache=False).logits
        logits[..., MASK] = -torch.inf
        text[:, place] = logits[:, place - form.shifted].argmax(dim=-1)
    return text


@pytest.mark.parametrize("shifted", [False, True])
def test_never_is_greedy_decoding_from_left_to_right(shifted: bool, folder: Folder) -> None:
    model, ids = filler(shifted=shifted), prompt(3)
    wanted = left_to_right(model, ids, 12, 12)
    nobody = "freecache(cache=False, rule={})"
    # A threshold of 1 is exceeded by nothing, so this guide reads everything and rejects it.
    stern = nobody.format(f"threshold, threshold=1.0, guide='{folder()}'")
    for plan in (nobody.format("never"), stern):
        for block in (4, 12):
            noted = steps(model, plan, inputs={"input_ids": ids}, new=12, block=block)
            assert torch.equal(noted.run.sequences(), wanted)
            assert noted.run.activity["passes"] == 12
            assert "freecache.parallel" not in noted.run.activity
    assert noted.run.activity["freecache.guide_passes"] == 12


def test_always_is_one_pass() -> None:
    for cache in (True, False):
        plan = f"freecache(rule=always, cache={cache})"
        one = steps(filler(), plan, inputs=padded(), block=NEW)
        assert one.run.activity["passes"] == 1
        assert torch.equal(one.run.sequences(), one.guesses[0].tokens)
        _, activity = write(filler(), plan, inputs=padded(), block=8)
        assert activity["passes"] == NEW // 8
        assert activity["freecache.parallel"] == 3 * (NEW - NEW // 8)


def passes(rule: str, draft: int, chances: list[float]) -> bool:
    """Whether a draft passes (`KNOBS`), from what the guide thinks of every token there."""
    best = sorted(chances, reverse=True)
    return {
        "deterministic": chances[draft] == best[0],
        "top_k": chances[draft] >= best[29],
        "threshold": chances[draft] > 0.01,
        "relative": chances[draft] >= best[29] and chances[draft] >= 0.2 * best[0],
    }[rule]


KNOBS = "top_k=30, threshold=0.01, ratio=0.2"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["relative", "top_k", "threshold", "deterministic"])
def test_the_models_own_drafts_are_fixed_up_to_the_first_unlikely_one(
    form: str, rule: str, folder: Folder
) -> None:
    model, inputs = filler(**FORMS[form], sharp=8.0), padded()
    place = folder(initializer_range=0.1)
    guide = models.tiny_model(initializer_range=0.1)
    noted = steps(
        model, f"freecache(rule={rule}, guide='{place}', {KNOBS})", inputs=inputs, block=12
    )
    seen = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
    positions = (seen.cumsum(dim=1) - 1).clamp(min=0)
    for at, (before, after, guess) in enumerate(
        zip(noted.before, noted.after, noted.guesses, strict=True)
    ):
        new = before != after
        assert torch.equal(after[new], guess.tokens[new])  # never the guide's own
        end = 24 if bool((before[:, :24] == MASK).any()) else 36
        drafts = torch.where(before == MASK, guess.tokens, before)[:, :end]
        with torch.no_grad():
            said = guide(
                input_ids=drafts, attention_mask=seen[:, :end], position_ids=positions[:, :end]
            ).logits.softmax(dim=-1)
        for row in range(3):
            still = (before[row, :end] == MASK).nonzero()[:, 0].tolist()
            wanted = still[:1]
            for column in still:
                if not passes(rule, int(drafts[row, column]), said[row, column - 1].tolist()):
                    break
                wanted = still[: still.index(column) + 1]
            assert new[row].nonzero()[:, 0].tolist() == wanted, f"pass {at}, row {row}"
    assert noted.run.activity["passes"] <= NEW
    assert noted.run.activity["freecache.guide_passes"] == noted.run.activity["passes"]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("block", [30, 9])
def test_holes_are_judged_from_the_left_and_what_is_given_is_not(
    block: int, shifted: bool, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.masked.run import Run

    model, guide = filler(shifted=shifted, sharp=8.0), models.tiny_model(initializer_range=0.1)
    text = prompt(3, 30, seed=4)
    holes = torch.rand(text.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    holes[:, 0] = torch.tensor([True, False, False])  # nothing stands before it
    text = text.masked_fill(holes, MASK)
    before: list[Tensor] = []
    guesses: list[Any] = []
    look = Run.look

    def noted(self: Run) -> Any:
        before.append(self.tokens.clone())
        guesses.append(look(self))
        return guesses[-1]

    monkeypatch.setattr(Run, "look", noted)
    place = folder(initializer_range=0.1)
    with hasten.apply(model, f"freecache(guide='{place}', {KNOBS})") as fast:
        filled = fast.infill(text, block_length=block)
    after = [*before[1:], filled]
    extra = 0
    for old, new, guess in zip(before, after, guesses, strict=True):
        first = int((old == MASK).any(dim=0).float().argmax())
        end = min(30, first // block * block + block)
        drafts = torch.where(old == MASK, guess.tokens, old)[:, :end]
        with torch.no_grad():
            said = guide(input_ids=drafts).logits.softmax(dim=-1)
        for row in range(3):
            still = (old[row, :end] == MASK).nonzero()[:, 0].tolist()
            wanted = still[:1]
            for column in still:
                draft = int(drafts[row, column])
                if column and not passes("relative", draft, said[row, column - 1].tolist()):
                    break
                wanted = still[: still.index(column) + 1]
            changed = (old[row] != new[row]).nonzero()[:, 0].tolist()
            assert changed == wanted
            assert torch.equal(new[row, wanted], guess.tokens[row, wanted])
            extra += max(0, len(wanted) - 1)
    assert extra == fast.activity["freecache.parallel"] > 0


def test_the_rules_by_hand() -> None:
    chances = torch.tensor([0.05, 0.5, 0.3, 0.15])
    logits = chances.log().expand(1, 5, 4)
    drafts = torch.tensor([[1, 2, 3, 0, 4]])  # the guide does not know the last one

    def passing(
        rule: str, *, top_k: int = 2, threshold: float = 0.1, ratio: float = 0.5
    ) -> list[int]:
        found = approved(logits, drafts, rule, top_k=top_k, threshold=threshold, ratio=ratio)
        return drafts[found].tolist()

    assert passing("deterministic") == [1]
    assert passing("top_k") == [1, 2]
    assert passing("top_k", top_k=3) == [1, 2, 3]
    assert passing("threshold") == [1, 2, 3]
    assert passing("threshold", threshold=0.2) == [1, 2]
    assert passing("relative") == [1, 2]
    assert passing("relative", ratio=0.7) == [1]
    assert passing("relative", top_k=1, ratio=0.0) == [1]
    assert passing("relative", top_k=4, ratio=0.05) == [1, 2, 3, 0]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen3"])
def test_the_guides_cache_says_what_a_full_pass_says(
    family: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = models.tiny_model(family)
    reads: list[tuple[int, int]] = []
    read = Reader.read

    def compared(self: Reader, tokens: Tensor, count: int) -> Tensor:
        logits = read(self, tokens, count)
        seen = (torch.arange(tokens.shape[1]) >= self.pads[:, None]).long()
        positions = (seen.cumsum(dim=1) - 1).clamp(min=0)
        full = guide(input_ids=tokens, attention_mask=seen, position_ids=positions).logits
        torch.testing.assert_close(logits, full[:, -count:], rtol=0, atol=1e-5)
        reads.append((self.seen, tokens.shape[1]))
        return logits

    monkeypatch.setattr(Reader, "read", compared)
    plan = f"freecache(guide='{folder(family)}', rule=top_k, top_k=50)"
    with torch.no_grad():
        _, activity = write(filler(sharp=8.0), plan, inputs=padded(), block=8)
    assert activity["freecache.guide_positions"] == 3 * sum(stop - seen for seen, stop in reads)
    assert reads[0][0] == 0
    assert all(seen >= 10 for seen, _ in reads[1:])  # the prompt is read once
    assert activity["freecache.parallel"] > 0
    jumps = {after[0] - before[0] for before, after in pairwise(reads[1:])}
    assert len(jumps) > 1  # trimmed to different lengths


@pytest.fixture(scope="module")
def tutor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guide that learnt the language of `speaker`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.tiny_model(hidden_size=64, intermediate_size=128, initializer_range=0.05)
        generator = torch.Generator().manual_seed(3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(250):
            text = sentences(32, 24, generator)
            loss = model(input_ids=text, labels=text).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("tutor")
    model.save_pretrained(path)
    return path


def test_a_guide_that_knows_nothing_approves_nothing(tutor: Path, folder: Folder) -> None:
    ids = sentences(6, 12, torch.Generator().manual_seed(9))
    run: dict[str, float] = {}
    for name, guide in (("trained", tutor), ("random", folder(hidden_size=64))):
        plan = f"freecache(guide='{guide}', cache=False)"
        _, activity = write(speaker(), plan, inputs={"input_ids": ids}, new=20, block=20)
        run[name] = activity.get("freecache.parallel", 0) / (6 * 19)
    assert run["trained"] > 0.5
    assert run["random"] < 0.1


def test_the_guide_needs_the_same_tokens(folder: Folder, tmp_path: Path) -> None:
    small = folder(vocab_size=MASK)
    with hasten.apply(filler(), f"freecache(guide='{small}')") as fast:  # all but the mask
        assert isinstance(fast, MaskedModel)
        fast.generate(prompt(), max_new_tokens=8, **NEVER)
    with pytest.raises(PlanError, match="another tokenizer"):
        hasten.apply(filler(), f"freecache(guide='{folder(vocab_size=MASK - 1)}')")
    masked = tmp_path / "masked"
    filler().save_pretrained(masked)
    with pytest.raises(PlanError, match="fills masks too"):
        hasten.apply(filler(), f"freecache(guide='{masked}')")


def test_words_count_where_there_are_tokenizers(tmp_path: Path) -> None:
    """An added mask does not matter; another order of the words does."""

    def save(name: str, tokenizer: Any, model: PreTrainedModel) -> Path:
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    with_mask = models.tiny_tokenizer(models.CHARACTERS[:-1])
    with_mask.add_special_tokens({"mask_token": "<mask>"})
    assert with_mask.mask_token_id == MASK
    own = save("own", with_mask, filler())
    plain = save("plain", models.tiny_tokenizer(models.CHARACTERS[:-1]), models.tiny_model())
    turned = save("turned", models.tiny_tokenizer(models.CHARACTERS[-2::-1]), models.tiny_model())
    with hasten.apply(str(own), f"freecache(guide='{plain}')") as fast:
        fast.generate(prompt(), max_new_tokens=8, **NEVER)
    with pytest.raises(PlanError, match="another tokenizer"):
        hasten.apply(str(own), f"freecache(guide='{turned}')")


def test_auto_is_the_zoos_small_model(zoo: Callable[[str], Path]) -> None:
    zoo("code-lm-small")
    assert catalogue.is_zoo_name("code-lm-small")
    with pytest.raises(PlanError, match="code-lm-small has another tokenizer"):
        hasten.apply(filler(), "freecache")
    model = filler(vocab_size=4097)
    model.config.mask_token_id = 4096
    with hasten.apply(model, "freecache") as fast:
        assert isinstance(fast, MaskedModel)
        fast.generate(prompt(), max_new_tokens=8, **NEVER)
        assert fast.activity["freecache.guide_passes"] == fast.activity["passes"]


def test_a_text_longer_than_the_guide_can_read(folder: Folder) -> None:
    guide = folder(max_position_embeddings=20)
    with hasten.apply(filler(), f"freecache(guide='{guide}')") as fast:
        assert isinstance(fast, MaskedModel)
        fast.generate(prompt(), max_new_tokens=8, **NEVER)
        with pytest.raises(HastenError, match="was made for 20"):
            fast.generate(prompt(), max_new_tokens=9, **NEVER)


# ---------------------------------------------------------------------------------- all settings


def test_an_end_of_text_ends_a_row(folder: Folder) -> None:
    model, inputs = filler(sharp=8.0), padded()
    plan = f"freecache(guide='{folder()}', rule=top_k, top_k=40)"
    free, _ = write(model, plan, inputs=inputs, block=8)
    end = int(free[1, 18])
    ids, activity = write(model, plan, inputs=inputs, block=8, eos_token_id=end, pad_token_id=0)
    for row, before in zip(ids[:, 12:].tolist(), free[:, 12:].tolist(), strict=True):
        if end in before:
            stop = before.index(end) + 1
            assert row == before[:stop] + [0] * (NEW - stop)
        else:
            assert row == before
    assert activity["emitted"] > 0


@pytest.mark.parametrize("block", [None, 5])
def test_holes_in_texts(block: int | None, folder: Folder) -> None:
    model = filler(shifted=True)
    text = prompt(3, 30, seed=4)
    holes = torch.rand(text.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    holes[1, 0] = True  # nothing stands before it
    text = text.masked_fill(holes, MASK)
    knobs = f"guide='{folder()}', rule=top_k, top_k=40"
    with hasten.apply(model, f"freecache({knobs})") as fast:
        assert isinstance(fast, MaskedModel)
        filled = fast.infill(text, block_length=block)
        assert fast.activity["freecache.parallel"] > 0
    assert torch.equal(filled[~holes], text[~holes]) and not bool((filled == MASK).any())
    with hasten.apply(model, "freecache(rule=never, cache=False)") as fast:
        assert isinstance(fast, MaskedModel)
        fast.infill(text, block_length=30)
        assert fast.activity["passes"] == int(holes.sum(dim=1).max())


def test_a_single_place_at_the_start_of_a_text(folder: Folder) -> None:
    text = prompt(2, 6)
    text[:, 0] = MASK
    with hasten.apply(filler(), f"freecache(guide='{folder()}')") as fast:
        assert isinstance(fast, MaskedModel)
        assert not bool((fast.infill(text) == MASK).any())
        assert "freecache.guide_passes" not in fast.activity


def test_a_seed_repeats_and_bfloat16_runs(folder: Folder) -> None:
    plan = f"freecache(guide='{folder()}', rule=top_k, top_k=30)"
    settings = {"do_sample": True, "temperature": 0.9, "seed": 5, "inputs": padded(), "block": 8}
    first, activity = write(filler(), plan, **settings)
    again, _ = write(filler(), plan, **settings)
    assert torch.equal(first, again)
    other, _ = write(filler(), plan, **{**settings, "seed": 6})
    assert not torch.equal(first, other)
    ids, activity = write(filler(dtype=torch.bfloat16), plan, inputs=padded(), block=8)
    assert not bool((ids == MASK).any()) and activity["freecache.guide_passes"] > 0


def test_each_half_takes_its_slot_only_while_it_is_on() -> None:
    both, alone, guided, neither = (
        next(iter(Plan.parse(f"freecache({knobs})")))
        for knobs in ("", "guided=False", "cache=False", "cache=False, guided=False")
    )
    assert both.terms().slots == (Slot.WINDOW, Slot.COMMITTER)
    assert alone.terms().slots == (Slot.WINDOW,)
    assert guided.terms().slots == (Slot.COMMITTER,)
    assert neither.terms().slots == ()
    Plan.parse(alone, "fixed_steps")
    Plan.parse(guided, "dinfer(decoder=none)")
    for clash in ("fixed_steps", "freedave", "saber", "dinfer"):
        with pytest.raises(PlanError, match="freecache"):
            Plan.parse(both, clash)
    with pytest.raises(PlanError, match="stay fixed"):
        Plan.parse(alone, "saber")
