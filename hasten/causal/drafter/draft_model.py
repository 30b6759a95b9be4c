"""A small model drafts, the large one verifies: speculative decoding in its first form. A rival.

Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding"
(arXiv 2211.17192). The small model keeps its own cache in the call and samples with the call's own
settings, so that rejection sampling is exact; greedy calls compare ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hasten.causal.acceptor.plain import Tally, plain
from hasten.causal.acceptor.rejection import rejection
from hasten.causal.companion import AUTO, Companion, open_companion
from hasten.causal.run import Lane, Run, longest_exact
from hasten.causal.runners import Block, Output
from hasten.causal.slots import Acceptor, Draft, Drafter, Verdict
from hasten.errors import HastenError
from hasten.technique import Card, Claim, Contract, Loss, Parts, Resource, Slot, knob, technique

LANE = "draft"


@dataclass
class State:
    """One call: how many drafted tokens the draft model's cache holds, and the count."""

    num_open: int = 0
    tally: Tally = field(default_factory=Tally)


@technique("draft_model")
@dataclass(frozen=True, kw_only=True)
class DraftModel(Drafter, Acceptor):
    """A second, smaller model with the same vocabulary drafts a few tokens before each pass."""

    card: ClassVar[Card] = Card(
        title="Fast Inference from Transformers via Speculative Decoding",
        family="decoding",
        loss=Loss.DISTRIBUTION,
        link="https://arxiv.org/abs/2211.17192",
        year=2022,
        claims=(
            Claim("speed-up", 2.6, "T5-XXL 11B with T5-small, translation, temperature 1, TPU v4"),
            Claim("speed-up", 3.4, "T5-XXL 11B with T5-small, translation, greedy, TPU v4"),
        ),
        saves="passes",
        notes=(
            "Greedy decoding gives the model's own ids, up to ties that are closer than rounding. "
            "Sampling draws other random numbers than the model alone, from the same distribution. "
            "The draft model's weights and cache come on top in memory. It pays where one of its "
            "passes costs a small part of the large model's; between models of a few million "
            "parameters the fixed cost of a pass leaves little."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.DRAFTER, Slot.ACCEPTOR),
        changes=frozenset({Resource.ONE_TOKEN_PASSES}),
        runners=frozenset({"eager", "compiled"}),
    )

    draft: str = knob(
        AUTO, "zoo name or checkpoint folder of the smaller model; auto: the zoo's own pair"
    )
    num_draft: int = knob(
        3,
        "tokens that it drafts before each pass; more gain more where it is often right",
        low=1,
        high=64,
    )

    # -- in a call -------------------------------------------------------------------------------
    def bind(self, model: nn.Module, parts: Parts) -> Companion:
        """Open the draft model, once."""
        assert isinstance(model, PreTrainedModel)
        return open_companion(model, self.draft, technique=self.name, knob="draft")

    def begin(self, run: Run, bound: Companion) -> State:
        """Give the draft model a lane of its own in this call."""
        needed = run.last_position + 1
        if bound.context is not None and needed > bound.context:
            raise HastenError(
                f"{self.name}: the call may need {needed} tokens; the draft model {bound.name} was made "
                f"for {bound.context}. Shorten the prompt or max_new_tokens."
            )
        run.lanes[LANE] = run.new_lane(LANE, bound.runner(type(run.lane.runner)))
        return State()

    def propose(self, state: State, run: Run) -> Draft:
        """Catch the draft model up, then let it go on `num_draft` tokens further."""
        lane = run.lanes[LANE]
        tokens, positions, has_holes = run.pending(lane)
        root = positions[:, -1:]
        drafted: list[Tensor] = []
        probs: list[Tensor] = []
        for ahead in range(1, self.num_draft + 1):
            is_prompt = ahead == 1 and lane.cache.get_seq_length() == 0
            block = Block(tokens, positions, None, 1, has_holes, is_prompt)
            logits = lane.runner.forward(block, lane.cache).logits[:, -1]
            lane.cache.commit()
            scores = run.sampler.scores(
                logits, _prefix(run, drafted), run.pads if run.has_pads else None
            )
            tokens = run.sampler.pick(scores)[:, None]
            positions, has_holes = (root + ahead).clamp(max=run.last_position), False
            drafted.append(tokens)
            if not run.sampler.greedy:
                probs.append(scores.softmax(dim=-1))
        state.num_open = self.num_draft - 1  # the last one was drawn, but never run
        draft = Draft.chain(torch.cat(drafted, dim=1), torch.stack(probs, dim=1) if probs else None)
        state.tally.drafting(run, draft)
        return draft

    def accept(self, state: State, run: Run, draft: Draft | None, output: Output) -> Verdict:
        """What the model would take (greedy), or rejection sampling; the lane drops the rest."""
        if draft is None:
            return plain(run, output)
        verdict = (
            longest_exact(run, draft, output)
            if draft.probs is None
            else rejection(run, draft, output)
        )
        assert verdict.nodes is not None
        counts = (verdict.nodes >= 0).sum(dim=1).clamp(max=state.num_open)
        _keep(run.lanes[LANE], counts, state.num_open)
        run.lanes[LANE].filled = run.lengths + counts
        return verdict

    def finish(self, state: State, run: Run) -> None:
        """See `CausalTechnique.finish`."""
        state.tally.publish(run, self.name)


def _keep(lane: Lane, counts: Tensor, num_open: int) -> None:
    """Of the last `num_open` cache entries keep the first counts[row] in each row."""
    lane.cache.reopen(num_open)
    most = int(counts.max())
    if bool((counts == most).all()):
        lane.cache.commit(num_kept=most)
        return
    order = torch.arange(most, device=counts.device).expand(counts.shape[0], -1)
    lane.cache.commit(order.masked_fill(order >= counts[:, None], -1))


def _prefix(run: Run, drafted: list[Tensor]) -> Tensor | None:
    """(batch, longest + drafted) ids that a repetition penalty looks at, or None without one."""
    if not run.sampler.needs_prefix:
        return None
    prefix = run.sequence()
    newest = run.tokens.gather(1, run.lengths[:, None] - 1)
    behind = torch.arange(prefix.shape[1], device=run.device) >= run.lengths[:, None]
    # Repeating a token changes no penalty, so it may fill what lies behind a shorter row's end.
    return torch.cat((torch.where(behind, newest, prefix), *drafted), dim=1)
