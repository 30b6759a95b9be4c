"""Every supported model family, as a tiny checkpoint saved to disk and loaded from there.

The empty plan gives the ids of transformers' own `generate`; techniques of every slot run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hasten
from hasten import technique as registry
from hasten.causal.engine import CausalModel
from hasten.errors import SubjectError
from hasten.technique import Loss, Slot
from tests import models
from tests.lab import Lab, counters

FAMILIES = sorted(models.FAMILIES)
NEW = 24


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def opened(lab: Lab) -> Any:
    """`opened(family)`: a checkpoint's model by transformers alone, and by hasten with no plan."""
    made: dict[str, tuple[PreTrainedModel, CausalModel]] = {}

    def both(family: str) -> tuple[PreTrainedModel, CausalModel]:
        if family not in made:
            folder = models.save_checkpoint(lab.folder / family, family)
            theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
            made[family] = theirs, hasten.apply(str(folder))
        return made[family]

    return both


def prompts(*lengths: int) -> dict[str, Tensor]:
    return models.padded([models.prompt(1, n, seed=n)[0] for n in lengths])


CALLS: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "greedy": (prompts(20), {"do_sample": False}),
    "greedy with padding": (prompts(20, 9, 14), {"do_sample": False}),
    "sampling": (prompts(20), {"do_sample": True}),
    "sampling with padding": (
        prompts(20, 9, 14),
        {"do_sample": True, "temperature": 1.4, "top_k": 20, "top_p": 0.9},
    ),
    "repetition penalty": (prompts(20), {"do_sample": False, "repetition_penalty": 1.4}),
    "repetition penalty with padding": (
        prompts(20, 9, 14),
        {"do_sample": False, "repetition_penalty": 1.4},
    ),
    "one token of prompt": (prompts(1), {"do_sample": False}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_empty_plan_gives_the_ids_of_generate(opened: Any, family: str, call: str) -> None:
    theirs, ours = opened(family)
    inputs, arguments = CALLS[call]
    arguments = {**arguments, "max_new_tokens": NEW}
    torch.manual_seed(5)
    wanted = theirs.generate(**inputs, **arguments)
    torch.manual_seed(5)
    assert torch.equal(ours.generate(**inputs, **arguments), wanted)
    assert torch.equal(
        ours.generate(**inputs, **arguments, seed=5), wanted
    )  # without the global seed


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_end_where_generate_ends_them(opened: Any, family: str) -> None:
    theirs, ours = opened(family)
    inputs = prompts(20, 9, 14)
    arguments = {"max_new_tokens": NEW, "do_sample": False}
    free = theirs.generate(**inputs, **arguments, eos_token_id=-1)[:, 20:]
    assert torch.equal(ours.generate(**inputs, **arguments, eos_token_id=-1)[:, 20:], free)
    ends = [int(free[0, 3]), int(free[1, 7])]  # ids that some rows do give
    wanted = theirs.generate(**inputs, **arguments, eos_token_id=ends)
    assert torch.equal(ours.generate(**inputs, **arguments, eos_token_id=ends), wanted)
    assert wanted[0, 24:].eq(models.EOS).all()  # the first row did end, and was padded


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_end_at_stop_strings(opened: Any, lab: Lab, family: str) -> None:
    theirs, ours = opened(family)
    tokenizer = AutoTokenizer.from_pretrained(lab.folder / family)
    inputs = prompts(20, 9, 14)
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1}
    free = theirs.generate(**inputs, **arguments)[:, 20:]
    arguments |= {"tokenizer": tokenizer, "stop_strings": [tokenizer.decode(free[1, 4:6])]}
    wanted = theirs.generate(**inputs, **arguments)
    assert torch.equal(ours.generate(**inputs, **arguments), wanted)
    assert wanted[1, 26:].eq(models.EOS).all()


# -------------------------------------------------------------- techniques of every slot

SLUGS = {
    Slot.PREFILL: ("kv_prediction",),
    Slot.DRAFTER: ("prompt_lookup",),
    Slot.ACCEPTOR: ("medusa",),
    Slot.KV: ("prefix_kv", "double_sparsity", "recycled_attention"),
    Slot.CONTROLLER: ("a_star_decoding",),
    Slot.EMISSION: ("lexical_unit_decoding",),
}
# What a technique cannot do on a family, with a part of what it says then.
OWN_PROJECTIONS = "kv_prediction cannot run on .*k_proj and a v_proj of its own"
REFUSED = {(family, "kv_prediction"): OWN_PROJECTIONS for family in ("gpt2", "gpt_neox", "phi3")}


def test_every_slot_of_the_engine_is_here() -> None:
    assert set(SLUGS) == {slot for slot in Slot if slot.engine == "causal"}
    for slot, slugs in SLUGS.items():
        assert all(slot in registry.get(slug).contract.slots for slug in slugs)


@pytest.mark.parametrize("slug", [slug for slugs in SLUGS.values() for slug in slugs])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_technique_of_each_slot_runs(lab: Lab, family: str, slug: str) -> None:
    lab.add(family, family)
    stretch = models.prompt(1, 12, seed=3)[0]
    inputs = models.padded([stretch.repeat(3), stretch.repeat(2)[:21]])
    arguments: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": -1}
    technique = lab.technique(family, slug)
    if (family, slug) in REFUSED:
        with pytest.raises(SubjectError, match=REFUSED[family, slug]):
            lab.apply(family, technique)
        return
    wanted = lab.plain_kept(family, inputs, **arguments)
    with lab.apply(family, technique) as fast:
        ids = fast.generate(**inputs, **arguments)
        assert ids.shape == (2, 52) and torch.equal(ids[:, :36], inputs["input_ids"])
        assert counters(fast, slug)
    if technique.card.loss is not Loss.LOSSY:
        assert torch.equal(ids, wanted)
    elif technique.card.neutral is not None:
        with lab.apply(family, lab.technique(family, slug, neutral=True)) as fast:
            assert torch.equal(fast.generate(**inputs, **arguments), wanted)
