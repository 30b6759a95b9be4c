"""The A* search of one row: a frontier of partial solutions, and which one is extended next."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.causal.controller.scorers import Candidate, Scorer, scores_of
from hasten.causal.controller.steps import Border, sample_steps
from hasten.causal.generation import Sampler
from hasten.causal.run import Run

if TYPE_CHECKING:
    from hasten.causal.controller.a_star_decoding import AStarDecoding


@dataclass
class Node:
    """A state of the search: the prompt and some steps after it.

    Attributes:
        tokens: (1, length) prompt, its left padding included, and continuation.
        run: the call as it stands here, one row with its caches; None where there is no need.
        r: how promising the scorer finds it. The root has 1: nothing is lost yet.
        f: path cost so far plus 1 - r.
    """

    tokens: Tensor
    run: Run | None
    log_probs: tuple[float, ...] = ()
    step_ends: tuple[int, ...] = ()
    is_goal: bool = False
    r: float = 1.0
    f: float = 0.0

    @property
    def depth(self) -> int:
        """Steps after the prompt."""
        return len(self.step_ends)


Entry = tuple[float, int, int, Node]  # (f, -depth, order of sampling, node)


class Search:
    """The search of one row of a call.

    Attributes:
        trail: nodes in the order in which they were taken from the frontier.
        counts: what it did so far; "generated" are the tokens of all children.
        peak_frontier: most nodes that waited at a time.
        frontier: heap of waiting nodes.
        goals: whole solutions found so far.
    """

    def __init__(
        self, knobs: AStarDecoding, call: Run, row: int, scorer: Scorer, sampler: Sampler
    ) -> None:
        self.knobs, self.call, self.scorer = knobs, call, scorer
        self.border = Border(knobs.step_border, knobs.max_step)
        self.root = self._fork(call, row)
        self.root.sampler, self.root.on_tokens, self.root.trace = sampler, None, None
        self.root.last = self.root.read_prompt()
        call.first_token_at = call.first_token_at or time.perf_counter()
        self.trail: list[Node] = []
        self.counts: Counter[str] = Counter()
        self.peak_frontier = 0
        self.goals: list[Node] = []
        self.frontier: list[Entry] = []
        self._spare: list[Entry] = []  # taken, but not to be extended
        self._order = count()
        self.push([Node(self.root.tokens[:, : call.prompt_length], self.root)])

    def solve(self) -> Tensor:
        """The answer: (1, length) prompt and continuation."""
        while self.frontier:
            entry = heapq.heappop(self.frontier)
            node = entry[3]
            self.trail.append(node)
            if node.is_goal:
                return node.tokens
            if self.left == 0 or node.depth == self.knobs.max_depth:
                self._spare.append(entry)
                if self.left == 0:
                    break
                continue
            children = self.expand(node)
            self.score(node, children)
            self.push(children)
        if self.goals:
            return max(self.goals, key=lambda goal: goal.r).tokens
        return self.complete(min(self._spare)[3])

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return self.knobs.max_tokens - self.counts["generated"]

    def expand(self, node: Node) -> list[Node]:
        """Sample successors and merge those that are the same."""
        run = self.resume(node)
        node.run = None  # its cache is not needed any more
        steps = sample_steps(
            run,
            min(self.knobs.num_children, self.left),
            self.border,
            most=self.left,
            keep_caches=self.knobs.keep_caches,
            watch=self._note_memory,
        )
        children: dict[tuple[int, ...], Node] = {}
        for step in steps:
            ids = tuple(step.tokens[0].tolist())
            if ids not in children:
                children[ids] = Node(
                    step.tokens,
                    step.run,
                    (*node.log_probs, *step.log_probs),
                    (*node.step_ends, len(ids) - self.root.prompt_length),
                    step.is_last,
                )
        self.counts["expanded"] += 1
        self.counts["generated"] += sum(len(step.log_probs) for step in steps)
        self.counts["merged"] += len(steps) - len(children)
        return list(children.values())

    def resume(self, node: Node) -> Run:
        """The call standing at a node: caches that hold all its tokens, `last` what follows them."""
        run = node.run
        if run is None:  # again from the prompt's cache: the continuation becomes pending
            run = self._fork(self.root, 0)
            run.tokens = node.tokens.clone()
            run.lengths = torch.full_like(run.lengths, node.tokens.shape[1])
            self.counts["reread"] += node.tokens.shape[1] - run.prompt_length - 1
        if bool((run.lane.filled < run.lengths).any()):
            run.last = run.forward(run.compose(None))
            run.commit(None)
        return run

    def score(self, node: Node, children: Sequence[Node]) -> None:
        """Set r and f of the successors of a node, with one call of the scorer."""
        values = scores_of(
            self.knobs.scorer, self.scorer, [self._candidate(child) for child in children]
        )
        self.counts["scorer_calls"] += 1
        self.counts["scored"] += len(children)
        for child, value in zip(children, values, strict=True):
            if self.knobs.aggregate == "min":
                value = min(value, node.r)
            elif self.knobs.aggregate == "product":
                value *= node.r
            child.r = value
            lost = node.r - value
            # The path cost rises by the cost and the estimate by what r lost. Written so, f stays
            # exactly equal where r improves: rounding neither breaks a tie nor lets f fall.
            child.f = node.f + (self._cost(node, child, lost) + lost)

    def push(self, nodes: Sequence[Node]) -> None:
        """Put nodes into the frontier and drop the worst of too many."""
        for node in nodes:
            if node.is_goal:
                self.goals.append(node)
                self.counts["goals"] += 1
            if not node.is_goal or self.knobs.stop == "first":
                heapq.heappush(self.frontier, (node.f, -node.depth, next(self._order), node))
        surplus = len(self.frontier) - self.knobs.max_frontier
        if surplus > 0:
            self.frontier = heapq.nsmallest(self.knobs.max_frontier, self.frontier)
            self.counts["dropped"] += surplus
        self.peak_frontier = max(self.peak_frontier, len(self.frontier))

    def complete(self, node: Node) -> Tensor:
        """Go on from a node greedily to the call's end."""
        run = self.resume(node)
        run.sampler = Sampler(replace(run.settings, do_sample=False), run.device)
        assert run.last is not None
        run.decide(None, run.last)
        while not run.done():
            run.step()
        self._note_memory([run])
        self.counts["completed"] += int(run.lengths) - node.tokens.shape[1]
        return run.sequences()

    def _candidate(self, node: Node) -> Candidate:
        ids = tuple(node.tokens[0].tolist())
        start, stop = int(self.root.pads), self.root.prompt_length
        tokenizer = self.root.tokenizer
        return Candidate(
            ids[start:stop], ids[stop:], node.log_probs, node.step_ends, node.is_goal, tokenizer
        )

    def _cost(self, node: Node, child: Node, lost: float) -> float:
        if self.knobs.cost == "drop":
            return max(0.0, lost)
        if self.knobs.cost == "change":
            return abs(lost)
        tokens = child.tokens.shape[1] - node.tokens.shape[1]
        return abs(lost) + self.knobs.length_weight * tokens / self.call.settings.max_new_tokens

    def _fork(self, run: Run, row: int) -> Run:
        return run.fork(torch.tensor([row], device=run.device))

    def _note_memory(self, forks: Sequence[Run]) -> None:
        """Bring the call's peak up to the caches of forks, of waiting nodes and of the prompt."""
        held = [self.root, *forks, *(entry[3].run for entry in self.frontier)]
        caches = {id(lane.cache): lane.cache for run in held if run for lane in run.lanes.values()}
        size = sum(cache.num_bytes() for cache in caches.values())
        self.call.peak_cache_bytes = max(self.call.peak_cache_bytes, size)
