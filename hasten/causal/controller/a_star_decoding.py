"""A*-decoding: always extend the partial solution that promises the most for what it has lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hasten.causal.controller.scorers import Scorer, find_scorer
from hasten.causal.controller.search import Search
from hasten.causal.generation import Sampler
from hasten.causal.run import Run
from hasten.causal.slots import Controller
from hasten.technique import (
    Card,
    Claim,
    Contract,
    Loss,
    Parts,
    Phase,
    Resource,
    Rival,
    Slot,
    knob,
    technique,
)


@dataclass
class State:
    """One call: how steps are drawn, and the searches of its rows."""

    scorer: Scorer
    sampler: Sampler
    searches: list[Search] = field(default_factory=list)


@technique("a_star_decoding")
@dataclass(frozen=True, kw_only=True)
class AStarDecoding(Controller):
    """Searches over whole steps of text, best first, with a scorer as the estimate of what is left.

    A node is a prefix cut at a step border; `num_children` next steps are sampled from it at once,
    duplicates merged, the rest scored with one call of the scorer. The node with the smallest
    f = g + 1 - r is extended next; of equal ones the deeper, then the one that was sampled first.
    The first goal that comes up is the answer; if `max_tokens` are used up before, the goal found
    with the best score, and without one the most promising node, completed greedily.

    A goal is a state at which the call's own rules stop: end of text, a stop string, or
    `max_new_tokens`. A step ends with the token that completes `step_border` after something that
    is not blank, never inside a ``` block that the continuation opened. Steps are drawn at this
    technique's temperature with the call's seed, top-k and top-p; a greedy call without a seed
    uses seed 0, so that it repeats. Rows of a batch are searched one after the other.

    Source: arXiv 2505.13672 (states, transition, h = 1 - r). Inferred: the path costs, of which
    "change" keeps the estimate consistent, so that the f of the nodes taken never falls; the
    queue, stop rule, limits and tie-break; that a root has r = 1.
    """

    card: ClassVar[Card] = Card(
        title="A*-Decoding: Token-Efficient Inference Scaling",
        family="decoding",
        loss=Loss.LOSSY,
        paper="a_star_decoding",
        link="https://arxiv.org/abs/2505.13672",
        year=2025,
        claims=(
            Claim(
                "tokens of best-of-N for equal accuracy, share",
                0.33,
                "MATH500, AIME 2024 (at best)",
            ),
            Claim("scorer calls of best-of-N for equal accuracy, share", 0.7, "MATH500, AIME 2024"),
        ),
        neutral={"num_children": 1, "temperature": 0.0},
        rival=Rival(
            "a_star_decoding(scorer='chance', num_children={num_children}, max_tokens={max_tokens})",
            "parse",
            "searches by a number that says nothing",
        ),
        saves="none",
        notes=(
            "Costs more than plain decoding, not less: it spends tokens for quality, and its claim is "
            "to spend fewer than best-of-N does. `generated` counts all children, not the returned "
            "path; a greedy completion is counted apart (completed). It is as good as its scorer: "
            "parses knows Python only, and none of those that ship is the trained reward model of the "
            "paper. Each node of the frontier holds a cache (keep_caches=False computes it again: "
            "reread counts those tokens). Scoring a given text is not changed by it."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.CONTROLLER,),
        reads=frozenset({Resource.LOGITS}),
        needs=frozenset({Resource.CACHE_FORK, Resource.ONE_TOKEN_PASSES}),
        phase=Phase.SEARCH,
    )

    scorer: str = knob("parses", "what r is: a name known to hasten.causal.controller.scorers")
    num_children: int = knob(
        3, "steps sampled from each node; more are surer and cost more", low=1, high=64
    )
    temperature: float = knob(
        0.8, "of the sampled steps; low gives duplicates, high gives errors", low=0.0, high=100.0
    )
    max_tokens: int = knob(
        1024, "generated tokens, over all children, at which the search ends", low=1
    )
    step_border: str = knob("\n", "text that ends a step; empty cuts at max_step only")
    max_step: int = knob(64, "tokens of a step at most", low=1)
    max_depth: int = knob(30, "steps of a path at most; then it waits for completion", low=1)
    max_frontier: int = knob(32, "nodes that wait at most; the worst are dropped", low=1)
    cost: str = knob(
        "change", "path cost of a step: change of r, its drop only, or change plus length",
        choices=("change", "drop", "length"),
    )  # fmt: skip
    length_weight: float = knob(
        0.1, "cost='length' only: cost of max_new_tokens tokens; more searches broader", low=0.0
    )
    aggregate: str = knob(
        "last", "r of a path: the scorer's newest, the lowest on the way, or the product",
        choices=("last", "min", "product"),
    )  # fmt: skip
    stop: str = knob(
        "first", "first: the first goal that comes up; best: use all tokens, return the best goal",
        choices=("first", "best"),
    )  # fmt: skip
    keep_caches: bool = knob(True, "waiting nodes keep their caches; false saves memory, not time")

    def bind(self, model: nn.Module, parts: Parts) -> Scorer:
        """Look the scorer up."""
        return find_scorer(self.scorer)

    def begin(self, run: Run, bound: Scorer) -> State:
        """Set up how steps are drawn."""
        settings = replace(
            run.settings, do_sample=self.temperature > 0, temperature=self.temperature or 1.0
        )
        sampler = Sampler(settings, run.device)
        sampler.generator = run.sampler.generator
        if sampler.generator is None and not run.settings.do_sample:
            sampler.generator = torch.Generator(device=run.device).manual_seed(0)
        return State(bound, sampler)

    def drive(self, state: State, run: Run) -> None:
        """Search row by row; what was found becomes the call's result."""
        if run.forced is not None:
            run.decode()
            return
        found: list[Tensor] = []
        for row in range(run.batch):
            search = Search(self, run, row, state.scorer, state.sampler)
            state.searches.append(search)
            found.append(search.solve())
            search.frontier.clear()  # its caches are of no use to the next row
        before = run.lengths
        run.tokens = pad_sequence(
            [tokens[0] for tokens in found],
            batch_first=True,
            padding_value=run.settings.pad_token_id,
        )
        run.lengths = torch.tensor([tokens.shape[1] for tokens in found], device=run.device)
        run.finished = torch.ones_like(run.finished)
        run.uniform = bool((run.lengths == run.lengths[0]).all())
        run.activity["emitted"] = int((run.lengths - before).sum())  # forks counted every child
        if run.on_tokens is not None:
            run.on_tokens(run, before)

    def finish(self, state: State, run: Run) -> None:
        """Publish the counters; without siblings there was nothing to choose from, so no search."""
        if self.num_children == 1:
            return
        total = sum((search.counts for search in state.searches), Counter[str]())
        run.activity.update(
            {f"{self.name}.{what}": number for what, number in total.items() if number}
        )
        for search in state.searches:
            peak = f"{self.name}.peak_frontier"
            run.activity[peak] = max(run.activity[peak], search.peak_frontier)
