"""Medusa: small heads on the last hidden state draft a tree of tokens that one pass verifies.

Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads"
(arXiv 2401.10774). Head k turns the state h at position t into z = h + SiLU(W_k h + b_k) and
guesses token t + k + 1 with an output layer of its own, where the model's own head guesses t + 1.
What differs from the paper's repository: b_k starts at zero like W_k, so that an untrained head is
the LM head itself, and the layers of a head that has several do not share their weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

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
    """The heads as a few batched products, and the tree that their guesses fill.

    Attributes:
        weight: (layers, heads, hidden, hidden), only the heads that the tree needs, transposed.
        bias: (layers, heads, 1, hidden).
        output: (heads, hidden, vocabulary), transposed; None where the LM head serves them all.
        lm_head: the model's own output layer.
        columns: (nodes,) each node's guess among the heads' best ones, head after head.
        num_ranks: best guesses taken from each head.
    """

    weight: Tensor
    bias: Tensor
    output: Tensor | None
    lm_head: Any
    tree: Tree
    columns: Tensor
    num_ranks: int

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (batch, heads, vocabulary) of all heads for states (batch, hidden)."""
        states = hidden.expand(self.weight.shape[1], -1, -1)
        for weight, bias in zip(self.weight, self.bias, strict=True):
            states = states + F.silu(torch.baddbmm(bias, states, weight))
        if self.output is None:
            return self.lm_head(states.transpose(0, 1))
        logits = torch.bmm(states, self.output).transpose(0, 1)
        return logits if self.lm_head.bias is None else logits + self.lm_head.bias

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
            "it is the exact rule. The paper trains 5 heads of one layer; here 3 heads of "
            "two are the default, since small models guess less far and say less in their states. "
            "tied=true shares the model's LM head: far less memory, and guesses that are worse. "
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
    part_knobs: ClassVar[tuple[str, ...]] = ("num_heads", "num_layers", "tied")

    num_heads: int = knob(3, "heads that are trained; more look further ahead", low=1, high=8)
    num_layers: int = knob(2, "layers of each head; more guess better", low=1, high=8)
    tied: bool = knob(False, "whether the heads share the model's LM head, which saves memory")
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

        def cast(tensor: Tensor) -> Tensor:
            return tensor[: tree.depth].to(model.device, model.dtype)

        return Heads(
            cast(parts["weight"]).permute(1, 0, 3, 2).contiguous(),
            cast(parts["bias"]).transpose(0, 1)[:, :, None].contiguous(),
            None if self.tied else cast(parts["output"]).transpose(1, 2),
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
        return train_heads(preparation, self.num_heads, num_layers=self.num_layers, tied=self.tied)
