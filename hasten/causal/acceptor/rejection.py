"""Rejection sampling of a drafted chain, which keeps the model's own distribution exactly.

Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding"
(arXiv 2211.17192), algorithm 1.
"""

from __future__ import annotations

import torch

from hasten.causal.run import Run, verdict_of_paths
from hasten.causal.runners import Output
from hasten.causal.slots import Draft, Verdict


def rejection(run: Run, draft: Draft, output: Output) -> Verdict:
    """Accept each drafted token x with chance min(1, p(x) / q(x)), in order, up to the first miss.

    There the next token is drawn from the normalised positive part of p - q, and from p behind a
    draft that was accepted whole. `draft.probs` must be the q that each token was sampled from.
    """
    assert draft.probs is not None, "rejection sampling needs the draft's probabilities"
    assert draft.parents == tuple(range(-1, draft.num_nodes - 1)), "it takes chains, not trees"
    probs = run.node_scores(draft, output.logits).softmax(dim=-1)  # (batch, 1 + nodes, vocabulary)
    tokens = draft.tokens[..., None]
    ours = probs[:, :-1].gather(2, tokens)[..., 0]
    theirs = draft.probs.gather(2, tokens)[..., 0]
    luck = run.sampler.uniform(*draft.tokens.shape, device=run.device)
    accepted = (luck * theirs < ours).long().cumprod(dim=1).sum(dim=1)  # (batch,)

    # The row of the output at which each row of the batch goes on; past the draft's end q is 0.
    padded = torch.cat((draft.probs, torch.zeros_like(probs[:, :1])), dim=1)
    at = accepted[:, None, None].expand(-1, 1, probs.shape[2])
    target = probs.gather(1, at)[:, 0]
    rest = (target - padded.gather(1, at)[:, 0]).clamp(min=0)
    # Where p and q agree to the last bit nothing is left of p - q: then p itself is right.
    rest = torch.where(rest.sum(dim=1, keepdim=True) > 0, rest, target)
    drawn = torch.multinomial(rest, 1, generator=run.sampler.generator)
    bonus = drawn.expand(-1, probs.shape[1])
    paths = [list(range(count)) for count in accepted.tolist()]
    return verdict_of_paths(run, draft, paths, bonus)
