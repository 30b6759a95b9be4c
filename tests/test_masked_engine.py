"""The masked engine without a technique: static decoding, and everything that a call may ask for.

The reference is written here: one whole forward pass for every token, with transformers' own
attention and a mask made by hand, one row at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

import hasten
from hasten import technique as registry
from hasten.causal.generation import Settings
from hasten.errors import HastenError, PlanError, SubjectError
from hasten.masked.denoiser import Denoiser
from hasten.masked.engine import MaskedModel
from hasten.masked.projections import Projections
from hasten.masked.sampling import Sampler
from hasten.masked.slots import Committer, Guess
from hasten.plan import Plan
from hasten.subject import MaskedForm, open_subject
from hasten.technique import Card, Contract, Loss, Slot, technique
from tests import models

MASK = 95
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shifted": {"shifted_logits": True},
    "blocks": {"block_length": 8},
    "shifted blocks": {"shifted_logits": True, "block_length": 6},
}
NO_END: dict[str, Any] = {"eos_token_id": -1}


def masked_model(family: str = "llama", form: str = "plain", **overrides: Any) -> PreTrainedModel:
    """A tiny random model whose config says that it fills masks."""
    says = {"is_causal": False, "mask_token_id": MASK, **FORMS[form]}
    return models.tiny_model(family, **{**FAMILIES[family], **says, **overrides})


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`opened(family, form)`: a checkpoint by transformers alone, and its folder."""
    made: dict[tuple[str, str], Any] = {}

    def both(family: str = "llama", form: str = "plain") -> Any:
        if (family, form) not in made:
            folder = tmp_path_factory.mktemp("masked")
            masked_model(family, form).save_pretrained(folder)
            models.tiny_tokenizer().save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
            made[family, form] = model, folder
        return made[family, form]

    return both


def text(length: int = 16, *, seed: int = 0) -> Tensor:
    """Random ids (1, length) without the mask and the end of text."""
    return models.prompt(1, length, seed=seed, vocabulary=MASK)


# -- the reference ---------------------------------------------------------------------------------
def scores(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What a model says of every place of one text (1, length): (length, vocabulary)."""
    length = ids.shape[1]
    hidden = torch.zeros(length, length)
    block = getattr(model.config, "block_length", None)
    if block:
        for row in range(length):
            for column in range(length):
                if column // block > row // block:
                    hidden[row, column] = torch.finfo(torch.float32).min
    with torch.no_grad():
        logits = model(ids, attention_mask=hidden[None, None], use_cache=False).logits[0].float()
    if getattr(model.config, "shifted_logits", False):
        logits = torch.cat((logits[:1], logits[:-1]))
    logits[:, MASK] = -torch.inf
    return logits


def reference(model: PreTrainedModel, ids: Tensor, block_length: int) -> Tensor:
    """Static decoding of the masks of one text (1, length), blocks counted from the first of them."""
    ids = ids.clone()
    places = (ids[0] == MASK).nonzero().flatten().tolist()
    for first in range(places[0], ids.shape[1], block_length):
        block = [place for place in places if first <= place < first + block_length]
        while any(int(ids[0, place]) == MASK for place in block):
            chances = scores(model, ids).softmax(dim=-1)
            best, where, token = -1.0, -1, -1
            for place in block:
                chance, candidate = chances[place].max(dim=0)
                if int(ids[0, place]) == MASK and float(chance) > best:
                    best, where, token = float(chance), place, int(candidate)
            ids[0, where] = token
    return ids


def with_masks(prompt: Tensor, new: int) -> Tensor:
    return torch.cat((prompt, torch.full((1, new), MASK)), dim=1)


# -- static decoding -------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_empty_plan_is_static_decoding(opened: Any, family: str, form: str) -> None:
    theirs, folder = opened(family, form)
    with hasten.apply(folder) as fast:
        for length, new, block in ((9, 12, 12), (16, 12, 4), (1, 6, 3)):
            prompt = text(length, seed=length)
            wanted = reference(theirs, with_masks(prompt, new), block)
            ids = fast.generate(prompt, max_new_tokens=new, block_length=block, **NO_END)
            assert torch.equal(ids, wanted), (length, new, block)
            assert fast.activity["passes"] == fast.activity["emitted"] == new
            everything = new * (length + new)
            if "blocks" in form:  # what stands need not be computed again (test_masked_blocks)
                assert fast.activity["positions"] <= everything - (length > 6) * new
            else:
                assert fast.activity["positions"] == everything


@pytest.mark.parametrize("form", FORMS)
def test_a_padded_batch_gives_what_its_rows_give(opened: Any, form: str) -> None:
    _, folder = opened("llama", form)
    rows = [text(n, seed=n)[0] for n in (19, 4, 12)]
    settings = {"max_new_tokens": 12, "block_length": 6, "repetition_penalty": 1.3, **NO_END}
    with hasten.apply(folder) as fast:
        together = fast.generate(**models.padded(rows), **settings)
        for row, ids in zip(rows, together, strict=True):
            alone = fast.generate(row[None], **settings)
            assert torch.equal(ids[-12:], alone[0, -12:])
        # Padding may be of any id, the mask's too.
        other = models.padded(rows, pad=MASK)
        again = fast.generate(**other, **settings)
        assert torch.equal(again[:, -12:], together[:, -12:])
        assert torch.equal(again[:, :19], other["input_ids"])
        assert fast.activity["emitted"] == 36


def test_a_padded_batch_of_a_model_with_learned_positions() -> None:
    rows = [text(n, seed=n)[0] for n in (11, 5)]
    with hasten.apply(models.tiny_model("gpt2", is_causal=False, mask_token_id=MASK)) as fast:
        together = fast.generate(**models.padded(rows), max_new_tokens=6, **NO_END)
        for row, ids in zip(rows, together, strict=True):
            alone = fast.generate(row[None], max_new_tokens=6, **NO_END)
            assert torch.equal(ids[-6:], alone[0, -6:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_dtypes_and_kv_heads(tmp_path: Path, heads: int, dtype: str) -> None:
    masked_model(num_key_value_heads=heads).save_pretrained(tmp_path)
    with hasten.apply(tmp_path, dtype=dtype) as fast:
        batch = models.padded([text(9)[0], text(6, seed=1)[0]])
        ids = fast.generate(**batch, max_new_tokens=8)
        assert not bool((ids[:, 9:] == MASK).any())
        assert torch.equal(ids, fast.generate(**batch, max_new_tokens=8))


def test_blocks_that_are_not_asked_for(opened: Any) -> None:
    def blocks(form: str, new: int) -> list[tuple[int, int]]:
        with hasten.apply(opened("llama", form)[1]) as fast:
            run, _ = fast._generation(text(5), None, None, {"max_new_tokens": new})
            return run.blocks

    assert blocks("plain", 64) == [(5, 37), (37, 69)]
    assert blocks("plain", 12) == [(5, 17)]
    assert blocks("plain", 33) == [(5, 16), (16, 27), (27, 38)]
    assert blocks("plain", 37) == [(place, place + 1) for place in range(5, 42)]
    assert blocks("blocks", 16) == [(5, 13), (13, 21)]


def test_what_the_loop_fixes_stays_and_comes_block_by_block(opened: Any) -> None:
    with hasten.apply(opened()[1]) as fast:
        run, _ = fast._generation(text(7), None, 5, {"max_new_tokens": 15, **NO_END})
        run.trace = []
        run.execute()
    before = with_masks(text(7), 15)
    for step, after in enumerate(run.trace):
        changed = (after != before).nonzero()[:, 1].tolist()
        assert len(changed) == 1
        assert 7 + step // 5 * 5 <= changed[0] < 12 + step // 5 * 5
        assert int(before[0, changed[0]]) == MASK
        before = after
    assert torch.equal(before, run.sequences())


# -- infilling -------------------------------------------------------------------------------------
def holes(length: int, *places: int, seed: int = 0) -> Tensor:
    ids = text(length, seed=seed)
    ids[0, list(places)] = MASK
    return ids


@pytest.mark.parametrize("form", FORMS)
def test_infilling_keeps_what_is_given(opened: Any, form: str) -> None:
    theirs, folder = opened("qwen2", form)
    ids = holes(20, 0, 1, 4, 5, 6, 13, 19)
    with hasten.apply(folder) as fast:
        whole = fast.infill(ids)
        assert torch.equal(whole, reference(theirs, ids, 20))
        assert torch.equal(whole[ids != MASK], ids[ids != MASK])
        assert fast.activity["passes"] == fast.activity["emitted"] == 7
        assert torch.equal(fast.infill(ids, block_length=7), reference(theirs, ids, 7))


@pytest.mark.parametrize("form", FORMS)
def test_infilling_a_padded_batch(opened: Any, form: str) -> None:
    rows = [holes(14, 2, 3, 9)[0], holes(10, 0, 4, 5, 6, 9, seed=1)[0], holes(6, 0, seed=2)[0]]
    with hasten.apply(opened("llama", form)[1]) as fast:
        for pad in (0, MASK):
            together = fast.infill(**models.padded(rows, pad=pad))
            for row, ids in zip(rows, together, strict=True):
                assert torch.equal(ids[-row.numel() :], fast.infill(row[None])[0])
                assert bool((ids[: -row.numel()] == pad).all())


def test_an_end_of_text_inside_a_text_ends_nothing(opened: Any) -> None:
    ids = holes(12, 5, 6, 11)
    ids[0, 3] = models.EOS
    with hasten.apply(opened()[1]) as fast:
        filled = fast.infill(ids)
    assert torch.equal(filled[ids != MASK], ids[ids != MASK])
    assert not bool((filled == MASK).any())


# -- the end of a text -----------------------------------------------------------------------------
@pytest.mark.parametrize("padding", [{}, {"pad_token_id": 7}, {"pad_token_id": MASK}])
def test_an_end_of_text_ends_its_row_only(opened: Any, padding: dict[str, int]) -> None:
    rows = [text(9)[0], text(5, seed=1)[0], text(7, seed=2)[0]]
    settings = {"max_new_tokens": 16, "block_length": 4}
    with hasten.apply(opened()[1]) as fast:
        free = fast.generate(**models.padded(rows), **settings, **NO_END)[:, 9:]
        passes = fast.activity["passes"]
        end = int(free[0, 5])
        ids = fast.generate(**models.padded(rows), **settings, eos_token_id=end, **padding)[:, 9:]
        assert fast.activity["passes"] <= passes
        alone = fast.generate(rows[0][None], **settings, eos_token_id=end, **padding)
        assert fast.activity["passes"] < passes
    pad = {MASK: end}.get(padding.get("pad_token_id", 0), padding.get("pad_token_id", 0))
    for row, kept in zip(ids.tolist(), free.tolist(), strict=True):
        stop = kept.index(end) + 1 if end in kept else 16
        assert row == kept[:stop] + [pad] * (16 - stop)
    assert torch.equal(alone[0, 9:], ids[0])


def test_an_end_of_text_behind_open_places_waits_for_them(opened: Any) -> None:
    with hasten.apply(opened()[1]) as fast:
        run, _ = fast._generation(text(8), None, 12, {"max_new_tokens": 12, **NO_END})
        run.trace = []
        run.execute()
        # The token of the first pass ends the text, wherever it stands.
        place = int((run.trace[0] != MASK)[0, 8:].nonzero()[-1]) + 8
        end = int(run.trace[0][0, place])
        ids = fast.generate(text(8), max_new_tokens=12, block_length=12, eos_token_id=end)
    free = run.sequences()[0, 8:].tolist()
    stop = free.index(end) + 1
    assert ids[0, 8:].tolist() == free[:stop] + [models.EOS] * (12 - stop)


# -- streaming -------------------------------------------------------------------------------------
class Collector:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.got.append(value.flatten())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("settings", [NO_END, {}, {"do_sample": True, "seed": 3, **NO_END}])
def test_streaming_gives_the_same_ids(opened: Any, settings: dict[str, Any]) -> None:
    settings = {"max_new_tokens": 16, "block_length": 4, **settings}
    with hasten.apply(opened()[1]) as fast:
        whole = fast.generate(text(6), **settings)
        pieces = list(fast.stream(text(6), **settings))
        assert torch.equal(torch.cat(pieces), whole[0, 6:])
        assert len(pieces) > 1
        collector = Collector()
        assert torch.equal(fast.generate(text(6), streamer=collector, **settings), whole)
        assert torch.equal(torch.cat(collector.got), whole[0])
        assert collector.ended
        assert torch.equal(next(fast.stream(text(6), **settings)), pieces[0])  # left early
        assert torch.equal(fast.generate(text(6), **settings), whole)


# -- sampling --------------------------------------------------------------------------------------
def test_sampling_repeats_with_a_seed_and_temperature_zero_is_greedy(opened: Any) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 24, "block_length": 8, **NO_END}
    draw = {**settings, "do_sample": True, "top_k": 0}
    with hasten.apply(opened()[1]) as fast:
        greedy = fast.generate(text(), **settings)
        assert torch.equal(fast.generate(text(), **settings, temperature=0.0), greedy)
        assert torch.equal(fast.generate(text(), **draw, temperature=1e-6, seed=1), greedy)
        assert torch.equal(fast.generate(text(), **draw, top_p=0.0, seed=1), greedy)
        one = {**draw, "top_k": 1}
        assert torch.equal(fast.generate(text(), **one, seed=1), greedy)
        drawn = [fast.generate(text(), **draw, seed=seed) for seed in (1, 2, 1)]
        assert torch.equal(drawn[0], drawn[2])
        assert not torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], greedy)
        torch.manual_seed(7)
        first = fast.generate(text(), **draw)
        torch.manual_seed(7)
        assert torch.equal(fast.generate(text(), **draw), first)


def test_rows_of_a_batch_draw_for_themselves(opened: Any) -> None:
    settings = {"max_new_tokens": 16, "do_sample": True, "seed": 1, "temperature": 1.5, **NO_END}
    with hasten.apply(opened()[1]) as fast:
        ids = fast.generate(text().expand(3, -1), **settings)
    assert len({tuple(row) for row in ids.tolist()}) == 3


def settings_for(**arguments: Any) -> Settings:
    return Settings.resolve(
        masked_model(), 1, {"max_new_tokens": 1, "do_sample": True, "top_k": 0, **arguments}
    )


def drawn_shares(logits: Tensor, draws: int, **arguments: Any) -> Tensor:
    """How often each id of (vocabulary,) logits is drawn, over places and seeds."""
    counts = torch.zeros(logits.shape[0])
    for seed in range(draws // 500):
        sampler = Sampler(settings_for(seed=seed, **arguments), 1)
        wanted = torch.arange(500)
        ids = sampler.best(
            logits.expand(1, 500, -1), torch.zeros(1, 500, dtype=torch.long), wanted, 4
        )
        counts += torch.bincount(ids[0], minlength=logits.shape[0])
    return counts / draws


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([1.0, 0.2, -0.5, 0.9, -torch.inf])
    for arguments in ({}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.7}):
        shares = drawn_shares(logits, 4000, **arguments)
        expected = (logits / arguments.get("temperature", 1.0)).softmax(dim=0)
        if arguments.get("top_k") or arguments.get("top_p"):
            expected = torch.where(torch.tensor([1, 0, 0, 1, 0]).bool(), expected, 0.0)
            expected = expected / expected.sum()
        assert bool((shares[expected == 0] == 0).all()), arguments
        spread = (expected * (1 - expected) / 4000).sqrt()
        assert bool(((shares - expected).abs() <= 4 * spread).all()), (arguments, shares, expected)


def test_noise_belongs_to_its_place_and_row() -> None:
    logits = torch.randn(2, 12, 9, generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros(2, 12, dtype=torch.long)

    def best(sampler: Sampler, first: int, end: int, entries: Tensor | None = None) -> Tensor:
        some = logits[:, first:end] if entries is None else logits[entries, first:end]
        return sampler.best(some, tokens, torch.arange(first, end), 8, entries)

    whole = best(Sampler(settings_for(seed=5, temperature=3.0), 2), 0, 12)
    sampler = Sampler(settings_for(seed=5, temperature=3.0), 2)
    parts = [best(sampler, *ends) for ends in ((0, 4), (4, 8), (8, 12), (0, 4))]
    assert torch.equal(torch.cat(parts[:3], dim=1), whole)
    assert torch.equal(parts[3], parts[0])
    entries = torch.tensor([1, 0, 1])
    assert torch.equal(best(sampler, 4, 8, entries), whole[entries, 4:8])


def test_a_repetition_penalty_counts_what_is_fixed() -> None:
    sampler = Sampler(settings_for(do_sample=False, repetition_penalty=2.0), 1)
    tokens = torch.tensor([[0, 4, 3, 4]])  # 4 is the mask
    logits = torch.tensor([[[3.0, 2.0, 1.6, -1.0, -torch.inf]]])
    wanted = torch.tensor([1])
    penalized = sampler._penalized(logits, tokens, 4)
    assert penalized[0, 0].tolist() == [1.5, 2.0, pytest.approx(1.6), -2.0, -torch.inf]
    assert sampler.best(logits, tokens, wanted, 4).tolist() == [[1]]


def test_a_repetition_penalty_changes_the_text(opened: Any) -> None:
    settings = {"max_new_tokens": 24, **NO_END}
    with hasten.apply(opened()[1]) as fast:
        free = fast.generate(text(), **settings)[0, 16:].tolist()
        held = fast.generate(text(), **settings, repetition_penalty=100.0)[0, 16:].tolist()
    assert len(set(held)) == 24 > len(set(free))


def test_a_generation_config_and_a_result_object(opened: Any) -> None:
    with hasten.apply(opened()[1]) as fast:
        plain = fast.generate(text(), max_new_tokens=8, **NO_END)
        config = GenerationConfig(max_new_tokens=8, eos_token_id=-1, return_dict_in_generate=True)
        out = fast.generate(text(), generation_config=config)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert torch.equal(out.sequences, plain)


# -- kept keys and values --------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_projections_of_all_rows_equal_none(family: str, form: str) -> None:
    model = masked_model(family, form)
    shape = open_subject(model).form
    denoiser = Denoiser(model, shape)
    rows = [holes(18, 9, 10, 16)[0], holes(12, 4, 11, seed=1)[0]]
    tokens = models.padded(rows)["input_ids"]
    pads = torch.tensor([0, 6])
    wanted, every = torch.arange(7, 18), torch.arange(18)
    cache = Projections(18)
    for _ in range(3):
        plain = denoiser.read(tokens, wanted, pads=pads).logits
        kept = denoiser.read(
            tokens, wanted, pads=pads, cache=cache, rows=None if cache.is_empty else every
        )
        torch.testing.assert_close(kept.logits, plain, atol=1e-6, rtol=0)
        place = int((tokens[0] == MASK).nonzero()[0])
        tokens[:, place] = 11
    assert cache.num_bytes() == 2 * 2 * 2 * 2 * 18 * 8 * 4  # sides, layers, batch, heads, ...
    assert cache.take(torch.tensor([1, 0, 1])).num_bytes() == 3 * cache.num_bytes() // 2
    assert (denoiser.passes, denoiser.positions) == (6, 6 * 36)


def test_rows_that_are_left_out_keep_their_old_projections() -> None:
    model = masked_model()
    denoiser = Denoiser(model, MaskedForm(MASK))
    tokens = holes(12, 4, 5, 6)
    wanted, rows = torch.tensor([4, 5, 6]), torch.tensor([3, 4, 5, 6])
    cache = Projections(12)
    denoiser.read(tokens, wanted, cache=cache)
    same = denoiser.read(tokens, wanted, cache=cache, rows=rows).logits
    torch.testing.assert_close(same, denoiser.read(tokens, wanted).logits, atol=1e-5, rtol=0)
    moved = tokens.clone()
    moved[0, 10] = 3  # outside the rows: a pass over them does not see it
    stale = denoiser.read(moved, wanted, cache=cache, rows=rows).logits
    torch.testing.assert_close(stale, same, atol=1e-5, rtol=0)
    fresh = denoiser.read(moved, wanted, cache=cache).logits
    assert not torch.allclose(fresh, same, atol=1e-3)
    torch.testing.assert_close(fresh, denoiser.read(moved, wanted).logits, atol=1e-5, rtol=0)


# -- apply and undo --------------------------------------------------------------------------------
def test_undo_leaves_the_model_as_it_was(opened: Any) -> None:
    model = opened("qwen3", "shifted")[0]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings, implementation = model.config.to_json_string(), model.config._attn_implementation
    before = model(text()).logits
    fast = hasten.apply(model)
    ids = fast.generate(text(), max_new_tokens=8)
    assert torch.equal(model(text()).logits, before)  # between calls, too
    with pytest.raises(PlanError, match="on it already; call undo"):
        hasten.apply(model)
    fast.undo()
    assert torch.equal(model(text()).logits, before)
    assert model.config.to_json_string() == settings
    assert model.config._attn_implementation == implementation
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in state.items())
    for call in (fast.generate, fast.infill):
        with pytest.raises(PlanError, match="was undone"):
            call(with_masks(text(), 2) if call == fast.infill else text())
    with hasten.apply(model) as again:
        assert torch.equal(again.generate(text(), max_new_tokens=8), ids)


def test_a_failed_call_leaves_the_model_usable(opened: Any) -> None:
    model = opened()[0]
    implementation = model.config._attn_implementation
    with hasten.apply(model) as fast:
        run, _ = fast._generation(text(), None, None, {"max_new_tokens": 4})

        def stop(_: Any) -> None:
            raise KeyboardInterrupt

        run.on_tokens = stop
        with pytest.raises(KeyboardInterrupt):
            fast._execute(run)
        assert fast.activity["passes"] == 1
        assert model.config._attn_implementation == implementation
        wanted = reference(model, with_masks(text(), 4), 4)
        assert torch.equal(fast.generate(text(), max_new_tokens=4, **NO_END), wanted)


# -- bad input -------------------------------------------------------------------------------------
def masked_prompt() -> Tensor:
    ids = text()
    ids[0, 3] = MASK
    return ids


BAD_CALLS: list[tuple[Callable[[MaskedModel], Any], str]] = [
    (lambda fast: fast.generate(masked_prompt()), r"holds the mask \(id 95\); use infill"),
    (
        lambda fast: fast.generate(text(), max_new_tokens=12, block_length=5),
        "block_length=5 does not divide max_new_tokens=12; give 4, or",
    ),
    (lambda fast: fast.generate(text(), max_new_tokens=4, block_length=8), "does not divide"),
    (lambda fast: fast.generate(text(), max_new_tokens=4, block_length=0), "block_length=0"),
    (lambda fast: fast.generate(text(), max_new_tokens=4, block_length=2.0), r"block_length=2\.0"),
    (lambda fast: fast.generate(text(), max_new_tokens=4, block_length=True), "block_length=True"),
    (lambda fast: fast.generate(text(510), max_new_tokens=4), "made for 512"),
    (lambda fast: fast.infill(with_masks(text(510), 4)), "made for 512"),
    (lambda fast: fast.generate(text()[:, :0]), "prompt is empty"),
    (lambda fast: fast.generate(), "input_ids is missing"),
    (lambda fast: fast.generate(text()[0]), "must be whole numbers of shape"),
    (lambda fast: fast.generate(text(), torch.zeros(1, 16)), "all zero: that prompt is empty"),
    (
        lambda fast: fast.generate(text(4), torch.tensor([[1, 1, 1, 0]])),
        "padded on the right; pad on the left",
    ),
    (lambda fast: fast.generate(text(), stop_strings=["x"]), "stop_strings is not supported"),
    (lambda fast: fast.infill(masked_prompt(), stop_strings=["x"]), "stop_strings is not supp"),
    (lambda fast: fast.infill(masked_prompt(), max_new_tokens=4), "max_new_tokens is not supp"),
    (lambda fast: fast.infill(text()), r"holds no mask \(id 95\)"),
    (lambda fast: fast.generate(text(), max_new_tokens=0), "max_new_tokens=0"),
    (lambda fast: fast.generate(text(), do_sample=True, temperature=0.0), "use do_sample=False"),
    (lambda fast: fast.generate(text(), temperature=-1.0), r"temperature=-1\.0"),
    (lambda fast: fast.generate(text(), top_p=1.5), r"top_p=1\.5"),
    (lambda fast: fast.generate(text(), num_beams=4), "num_beams=4"),
    (lambda fast: fast.generate(text(), nonsense=1), "Unknown argument 'nonsense'"),
    (lambda fast: next(fast.stream(text().expand(2, -1))), "batch of one"),
    (lambda fast: fast.generate(text().expand(2, -1), streamer=Collector()), "batch of one"),
]


@pytest.mark.parametrize(("call", "words"), BAD_CALLS)
def test_a_bad_call_is_refused_in_one_line(
    opened: Any, call: Callable[[MaskedModel], Any], words: str
) -> None:
    with hasten.apply(opened()[1]) as fast:
        with pytest.raises(HastenError, match=words) as caught:
            call(fast)
        assert "\n" not in str(caught.value)
        assert fast.generate(text(), max_new_tokens=2).shape == (1, 18)  # it goes on working


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"mask_token_id": None}, "names no mask_token_id; add the id of its mask to config.json"),
    ({"mask_token_id": 96}, "mask_token_id=96; allowed is 0 to 95"),
    ({"mask_token_id": -1}, "mask_token_id=-1"),
    ({"mask_token_id": "<mask>"}, "mask_token_id='<mask>'"),
    ({"block_length": 0}, "block_length=0"),
    ({"block_length": "all"}, "block_length='all'"),
]


@pytest.mark.parametrize(("config", "words"), BAD_CONFIGS)
def test_a_config_that_cannot_be_followed(config: dict[str, Any], words: str) -> None:
    with pytest.raises(SubjectError, match=words) as caught:
        open_subject(masked_model(**config))
    assert "\n" not in str(caught.value)


def test_attention_with_a_window_is_refused() -> None:
    model = masked_model("mistral", sliding_window=12)
    with hasten.apply(model) as fast, pytest.raises(SubjectError, match="with a window"):
        fast.generate(text(), max_new_tokens=2)
    assert model.config._attn_implementation == "sdpa"


@pytest.fixture
def first_first() -> Any:
    """The name of a masked technique, registered for the time of a test."""

    @technique("first_first")
    @dataclass(frozen=True, kw_only=True)
    class FirstFirst(Committer):
        """Fixes the first open place."""

        card: ClassVar[Card] = Card(title="", family="test", loss=Loss.LOSSY)
        contract: ClassVar[Contract] = Contract(slots=(Slot.COMMITTER,))

        def choose(self, state: Any, run: Any, guess: Guess) -> Tensor:
            return run.open & (run.open.long().cumsum(dim=1) == 1)

    yield "first_first"
    registry._REGISTERED.pop("first_first")


def test_a_technique_of_the_other_engine_is_refused(opened: Any, first_first: str) -> None:
    for model, plan, words in (
        (models.tiny_model(), first_first, "first_first is of the masked engine, .* causal one"),
        (opened()[0], "prompt_lookup", "prompt_lookup is of the causal engine, .* masked one"),
    ):
        with pytest.raises(PlanError, match=words) as caught:
            hasten.apply(model, plan)
        assert "hasten list --engine" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(PlanError, match="prompt_lookup is of the causal engine"):
        MaskedModel(open_subject(masked_model()), Plan.parse("prompt_lookup"))
    with pytest.raises(PlanError, match="runs on one engine; this one names causal, masked"):
        Plan.parse(f"{first_first}, prompt_lookup")
    with pytest.raises(PlanError, match="does not run on the 'compiled' runner"):
        hasten.apply(opened()[0], first_first, runner="compiled")  # as it never said that it can
    with hasten.apply(opened()[0], first_first) as fast:  # and where it belongs it works
        pieces = list(fast.stream(text(), max_new_tokens=6, **NO_END))
        assert [piece.numel() for piece in pieces] == [1] * 6
