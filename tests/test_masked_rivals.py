"""As `test_rivals`, for the techniques of the masked engine: each beats the rival that its card names.

Held-out code is continued by `code-dlm`; what was written is judged by `code-lm`, the model that it
was converted from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

import hasten
from hasten import technique as registry
from hasten.masked.engine import MaskedModel
from hasten.subject import Subject
from hasten.zoo.corpus import shipped_held_out

PROMPT, NEW = 96, 64  # tokens
ITEMS, MORE_ITEMS = 16, {"saber": 64}  # one text gains much by what saber does, another nothing
SLUGS = [slug for slug in registry.names(engine="masked") if registry.get(slug).card.rival]

pytestmark = [pytest.mark.zoo, pytest.mark.thorough]


@cache
def subject(name: str) -> Subject:
    return hasten.open_subject(name)


@cache
def prompts(items: int) -> Tensor:
    """(items, PROMPT) ids from different places of held-out files."""
    tokenizer, found = subject("code-dlm").tokenizer, []
    assert tokenizer is not None
    for file in sorted(shipped_held_out(), key=lambda file: file.path):
        ids = torch.tensor(tokenizer(file.text, verbose=False)["input_ids"])
        found += [ids[at : at + PROMPT] for at in range(0, len(ids) - PROMPT, 4 * PROMPT)]
    places = torch.randperm(len(found), generator=torch.Generator().manual_seed(2))[:items]
    return torch.stack([found[place] for place in places.tolist()])


@cache
def written(plan: str, items: int) -> tuple[Tensor, Tensor, Tensor]:
    """(items, NEW) ids that a plan writes, and the passes and positions (items,) of each."""
    ids, passes, positions = [], [], []
    with hasten.apply(subject("code-dlm"), plan) as fast:
        assert isinstance(fast, MaskedModel)
        for prompt in prompts(items):
            out = fast.generate(prompt[None], max_new_tokens=NEW, eos_token_id=-1)
            assert isinstance(out, Tensor)
            ids.append(out[0, PROMPT:])
            passes.append(fast.activity["passes"])
            positions.append(fast.activity["positions"])
    return torch.stack(ids), torch.tensor(passes), torch.tensor(positions)


def perplexity(plan: str, items: int) -> Tensor:
    """Minus the mean nats of each continuation under the autoregressive model."""
    new = written(plan, items)[0]
    with torch.no_grad():
        logits = subject("code-lm").model(torch.cat((prompts(items), new), dim=1)).logits
    chances = logits[:, PROMPT - 1 : -1].log_softmax(dim=-1)
    return chances.gather(2, new[..., None])[..., 0].mean(dim=1)


def agreement(plan: str, items: int) -> Tensor:
    """Share of each continuation's ids that static decoding writes too."""
    return (written(plan, items)[0] == written("", items)[0]).double().mean(dim=1)


def work(plan: str, items: int) -> Tensor:
    """Tokens for each thousand positions computed; speed without the cost of a call."""
    return 1000 * NEW / written(plan, items)[2].double()


METRICS: dict[str, Callable[[str, int], Tensor]] = {
    "perplexity": perplexity,
    "agreement": agreement,
    "ratio": work,
}


@pytest.mark.parametrize("slug", SLUGS)
def test_it_beats_its_rival_by_more_than_the_noise(slug: str) -> None:
    kind = registry.get(slug)
    rival = kind.card.rival
    assert rival is not None
    measure, items = METRICS[rival.metric], MORE_ITEMS.get(slug, ITEMS)
    theirs = measure(rival.plan.format(**kind().knobs), items)
    gain = (measure(slug, items) - theirs).double()
    error = float(gain.std() / len(gain) ** 0.5)
    assert error > 0 and float(gain.mean()) > 2 * error, f"{float(gain.mean()):.4f} +- {error:.4f}"


def test_freedave_writes_what_static_decoding_writes() -> None:
    ids, passes, _ = written("freedave", ITEMS)
    assert torch.equal(ids, written("", ITEMS)[0])
    assert float(passes.double().mean()) < 0.9 * NEW
