"""Medusa: small heads on the last hidden state draft a tree of tokens that one pass verifies.

Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads"
(arXiv 2401.10774). Head k turns the state h at position t into z = h + SiLU(W_k h + b_k) and
guesses token t + k + 1, where the model's own head guesses t + 1. What differs from the paper's
repository: every head shares the model's LM head instead of training a copy of it, and b_k starts
at zero like W_k, so that an untrained head is the LM head itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hasten.causal.acceptor.plain import Tally, plain
from hasten.causal.acceptor.typical import typical
from hasten.causal.drafter.heads import train_heads
from hasten.causal.drafter.tree import Tree, chain_tree, random_tree, tuned_tree
from hasten.causal.run import Run, longest_exact
from hasten.causal.runners import Output
from hasten.causal.slots import Acceptor, Draft, Drafter, Verdict
from hasten.preparation import Preparation
from hasten.technique import (
    Card,
    Claim,
    Contract,
    Loss,
    Parts,
    Resource,
    Rival,
    Slot,
    knob,
    technique,
)


@dataclass
class Heads:
    """The heads as one matrix product, and the tree that their guesses fill.

    Attributes:
        weight: (heads * hidden, hidden), only the heads that the tree needs.
        bias: (heads * hidden,).
        lm_head: the model's own output layer.
        columns: (nodes,) each node's guess among the heads' best ones, head after head.
        num_ranks: best guesses taken from each head.
    """

    weight: Tensor
    bias: Tensor
    lm_head: nn.Module
    tree: Tree
    columns: Tensor
    num_ranks: int

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (batch, heads, vocabulary) of all heads for states (batch, hidden)."""
        step = F.silu(F.linear(hidden, self.weight, self.bias))
        return self.lm_head(hidden[:, None] + step.view(hidden.shape[0], -1, hidden.shape[1]))

    def tokens(self, hidden: Tensor) -> Tensor:
        """The tree's tokens (batch, nodes)."""
        best = self.logits(hidden).topk(self.num_ranks, dim=-1).indices
        return best.flatten(1).index_select(1, self.columns)


@dataclass
class State:
    """One call: the heads, and what their drafts brought."""

    heads: Heads
    tally: Tally = field(default_factory=Tally)


@technique("medusa")
@dataclass(frozen=True, kw_only=True)
class Medusa(Drafter, Acceptor):
    """Trained heads guess the next tokens; one pass checks a tree of their likeliest combinations."""

    card: ClassVar[Card] = Card(
        title="Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
        family="decoding",
        loss=Loss.EXACT,
        paper="medusa",
        link="https://arxiv.org/abs/2401.10774",
        year=2024,
        claims=(
            Claim("speed-up", 2.2, "Medusa-1 (frozen model), Vicuna 7B and 13B, MT-Bench, A100"),
            Claim("speed-up", 2.3, "Medusa-2 (model tuned too), lower end, MT-Bench, A100"),
            Claim("speed-up", 3.6, "Medusa-2 (model tuned too), upper end: coding and extraction"),
        ),
        rival=Rival(
            "medusa(tree=random, num_nodes={num_nodes})",
            "ratio",
            "as many nodes that the heads' accuracies did not choose",
        ),
        saves="passes",
        trained=True,
        notes=(
            "This is Medusa-1: the model stays frozen. Greedy decoding gives the model's own ids, up "
            "to ties that are closer than rounding (a pass over several tokens rounds differently "
            "from single passes, which bfloat16 can show). Sampling with acceptance=exact keeps the "
            "model's distribution; acceptance=typical does not and is lossy, and at temperature zero "
            "it is the exact rule. The paper trains 5 heads with an output layer each; here they "
            "share the model's LM head and 3 are the default, since small models guess less far. "
            "A pass over a tree costs more than a pass over one token, on CPUs above all: more nodes "
            "are accepted further, but not faster."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.DRAFTER, Slot.ACCEPTOR),
        reads=frozenset({Resource.HIDDEN}),
        changes=frozenset({Resource.ONE_TOKEN_PASSES}),
        runners=frozenset({"eager", "compiled"}),
    )
    part_knobs: ClassVar[tuple[str, ...]] = ("num_heads",)

    num_heads: int = knob(3, "heads that are trained; more look further ahead", low=1, high=8)
    num_nodes: int = knob(
        8,
        "drafted tokens that each pass checks; more are accepted, each pass costs more",
        low=1,
        high=64,
    )
    acceptance: str = knob(
        "exact",
        "exact keeps the model's output; typical keeps all that is plausible",
        choices=("exact", "typical"),
    )
    eps: float = knob(
        0.09, "typical: a token above this probability is kept; lower keeps more", low=0.0, high=1.0
    )
    delta: float = knob(
        0.3, "typical: share of exp(-entropy) that is enough where the model is unsure", low=0.0
    )
    tree: str = knob(
        "tuned",
        "tuned takes the likeliest combinations, chain the best guess of each head, random any",
        choices=("tuned", "chain", "random"),
    )

    def loss_class(self) -> Loss:
        """Typical acceptance changes what is sampled; everything else is verified."""
        return Loss.LOSSY if self.acceptance == "typical" else self.card.loss

    # -- in a call -------------------------------------------------------------------------------
    def bind(self, model: nn.Module, parts: Parts) -> Heads:
        """Heads in the model's dtype, and the tree for this number of nodes."""
        assert isinstance(model, PreTrainedModel)
        accuracy = parts["accuracy"]
        if self.tree == "chain":
            tree = chain_tree(accuracy.shape[0], self.num_nodes)
        elif self.tree == "random":
            tree = random_tree(accuracy.shape[0], accuracy.shape[1], self.num_nodes)
        else:
            tree = tuned_tree(accuracy, self.num_nodes)
        num_ranks = max(tree.ranks) + 1
        columns = [(d - 1) * num_ranks + r for d, r in zip(tree.depths, tree.ranks, strict=True)]
        return Heads(
            parts["weight"][: tree.depth].flatten(0, 1).to(model.device, model.dtype),
            parts["bias"][: tree.depth].flatten().to(model.device, model.dtype),
            model.get_output_embeddings(),
            tree,
            torch.tensor(columns, device=model.device),
            num_ranks,
        )

    def begin(self, run: Run, bound: Heads) -> State:
        """See `CausalTechnique.begin`."""
        return State(bound)

    @torch.no_grad()
    def propose(self, state: State, run: Run) -> Draft | None:
        """The tree, filled from the state at the newest position that was run."""
        if run.last is None or run.last.hidden is None:
            return None
        tokens = state.heads.tokens(run.last.hidden[:, -1])
        draft = Draft(tokens, state.heads.tree.parents)
        state.tally.drafting(run, draft)
        return draft

    def accept(self, state: State, run: Run, draft: Draft | None, output: Output) -> Verdict:
        """Exactly what the model would take, or what is plausible to it."""
        if draft is None:
            return plain(run, output)
        if self.acceptance == "typical" and not run.sampler.greedy:
            return typical(run, draft, output, eps=self.eps, delta=self.delta)
        return longest_exact(run, draft, output)

    def finish(self, state: State, run: Run) -> None:
        """See `CausalTechnique.finish`."""
        state.tally.publish(run, self.name)

    def prepare(self, preparation: Preparation) -> Parts:
        """Train the heads on the frozen model's states (Medusa-1) and measure their guesses."""
        return train_heads(preparation, self.num_heads)
