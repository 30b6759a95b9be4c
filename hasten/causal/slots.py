"""The slots of the causal engine: what a technique may do, and when.

    prefill     builds the prompt's KV cache
    drafter     proposes tokens (a list or a tree) for the next pass to verify
    acceptor    says how much of a draft is kept
    kv          evicts or merges cache entries, or picks the entries that a query reads
    controller  chooses the model of the next pass, or searches above the loop
    emission    decides by itself how positions map to tokens (a drafter and an acceptor in one)

A slot's methods get `state`, what the technique's own `begin` returned for this call, because
technique objects hold knobs only. `run` is the call in progress (`hasten.causal.run.Run`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.technique import Technique

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hasten.causal.attention import AttentionView
    from hasten.causal.cache import KVCache
    from hasten.causal.run import Lane, Output, Run


class CausalTechnique(Technique):
    """A technique of the causal engine."""

    def model(self, bound: Any) -> PreTrainedModel | None:
        """The model that decodes in the subject's place, made by `bind`; None for the subject itself."""
        return None

    def begin(self, run: Run, bound: Any) -> Any:
        """Make this call's state; `bound` is what `bind` returned for the model."""
        return None

    def finish(self, state: Any, run: Run) -> None:
        """Called once when the call ends, also when it failed; a place for last counters."""


@dataclass
class Draft:
    """Proposed tokens as a tree whose root is the newest token (already emitted, not yet run).

    Nodes stand in topological order. A chain has parents -1, 0, 1, ...

    Attributes:
        tokens: (batch, nodes); -1 marks a node that a row does not have.
        parents: parent node of each node, -1 for the root's children; the same for all rows.
        probs: (batch, nodes, vocabulary) that each node was sampled from, for rejection sampling.
    """

    tokens: Tensor
    parents: tuple[int, ...]
    probs: Tensor | None = None

    @classmethod
    def chain(cls, tokens: Tensor, probs: Tensor | None = None) -> Draft:
        """A list of tokens, one after the other."""
        return cls(tokens, tuple(range(-1, tokens.shape[1] - 1)), probs)

    @property
    def num_nodes(self) -> int:
        """Nodes without the root."""
        return len(self.parents)

    def depths(self) -> list[int]:
        """Distance of each node from the root (the root's children have 1)."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def ancestors(self) -> Tensor:
        """(nodes, nodes) bool, True where the column is the row itself or one of its ancestors.

        Made once per tree and shared between drafts: not to be written to.
        """
        return _ancestors(self.parents)

    def mask(self, num_pending: int) -> Tensor | None:
        """What a block of `num_pending` tokens and this tree may see of itself; None for a chain.

        (block, block) bool, True where the row may see the column. As `ancestors`, it is shared.
        """
        return _mask(self.parents, num_pending)

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to `node`."""
        nodes = [node]
        while self.parents[nodes[-1]] >= 0:
            nodes.append(self.parents[nodes[-1]])
        return nodes[::-1]


@lru_cache(maxsize=256)
def _ancestors(parents: tuple[int, ...]) -> Tensor:
    seen = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


@lru_cache(maxsize=256)
def _mask(parents: tuple[int, ...], num_pending: int) -> Tensor | None:
    if parents == tuple(range(-1, len(parents) - 1)):
        return None
    block = num_pending + len(parents)
    mask = torch.ones((block, block), dtype=torch.bool).tril()
    mask[num_pending:, num_pending:] = _ancestors(parents)
    return mask


@dataclass
class Verdict:
    """What a pass decided.

    Attributes:
        tokens: (batch, emitted) new tokens, -1 pads rows that got fewer; every row gets one at least.
        nodes: (batch, kept) draft nodes whose keys and values stay in the cache, in sequence
            order, -1 pads. They must be the nodes of the first tokens emitted. None keeps none.
        at: (batch,) index of the row of `Output` from which the next draft starts: 0 is the
            newest token before the pass, 1 + node a draft node.
    """

    tokens: Tensor
    nodes: Tensor | None = None
    at: Tensor | None = None


class Prefill(CausalTechnique):
    """Builds the prompt's cache its own way."""

    def fill(self, state: Any, run: Run) -> Output:
        """Fill `run.lane.cache` for the prompt and return the output at its last token.

        Must leave the cache committed with one entry per prompt token, and `run.lane.filled` set.
        """
        raise NotImplementedError


class Drafter(CausalTechnique):
    """Proposes what the next pass verifies. The engine runs, masks, commits and rolls back."""

    def propose(self, state: Any, run: Run) -> Draft | None:
        """A draft that continues `run.tokens`, or None to run a plain pass.

        `run.last` is the output at the newest position that was run (hidden states if the
        contract reads them). At most `run.room()` tokens are of use.
        """
        raise NotImplementedError


class Acceptor(CausalTechnique):
    """Decides how much of a draft is kept."""

    def accept(self, state: Any, run: Run, draft: Draft | None, output: Output) -> Verdict:
        """`output.logits` is (batch, 1 + nodes, vocabulary): row 0 is the root, 1 + i node i."""
        raise NotImplementedError


class Emission(Drafter, Acceptor):
    """Owns how positions map to tokens: proposes and accepts by its own rule."""


class KV(CausalTechnique):
    """Acts on the cache. All layers, all rows; called with the lane's cache."""

    def read(self, state: Any, view: AttentionView) -> Tensor | None:
        """Entries that this pass reads in this layer, or None for all (`attention.selected`)."""
        return None

    def observe(self, state: Any, view: AttentionView) -> None:
        """Watch one layer's attention in this pass."""

    def compress(self, state: Any, run: Run, cache: KVCache) -> None:
        """Shrink the cache; called after the prompt and after every committed pass."""


class Controller(CausalTechnique):
    """Stands above the passes."""

    def lanes(self, state: Any, run: Run) -> dict[str, Lane]:
        """Further models that this technique switches between, by name."""
        return {}

    def before_pass(self, state: Any, run: Run) -> None:
        """May set `run.lane` to another of `run.lanes`; the engine catches its cache up."""

    def after_pass(self, state: Any, run: Run, output: Output) -> None:
        """See the logits that decided the newest tokens."""

    def drive(self, state: Any, run: Run) -> None:
        """Generate. The default decodes to the end; a search forks and extends instead."""
        run.decode()
