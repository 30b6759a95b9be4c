"""Typical acceptance (Medusa, section 2.3.1): keep what the model finds plausible enough."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.causal.run import Run, verdict_of_paths
from hasten.causal.runners import Output
from hasten.causal.slots import Draft, Verdict


def typical(run: Run, draft: Draft, output: Output, *, eps: float, delta: float) -> Verdict:
    """Keep the longest path of plausible nodes, and the likeliest of several such paths.

    A node is plausible where p(token | its path) > min(eps, delta * exp(-H(p))), with H the entropy
    of the model's distribution p at its parent, in nats. The token behind the path is sampled.
    p is what this call samples from, temperature and truncation included: at temperature zero it
    is a single token, and the rule is then the exact one (for eps > 0).
    """
    scores = run.node_scores(draft, output.logits)
    batch, rows, vocabulary = scores.shape
    log_probs = scores.log_softmax(dim=-1)
    parents = torch.tensor(draft.parents, device=run.device) + 1  # row of the output, 0 is the root
    bound = threshold(log_probs, eps=eps, delta=delta)[:, parents]
    chosen = log_probs[:, parents].gather(2, draft.tokens.clamp(min=0)[..., None])[..., 0]
    plausible = (chosen.exp() > bound) & (draft.tokens >= 0)
    paths = best_paths(draft, plausible, chosen)
    bonus = run.sampler.pick(scores.reshape(-1, vocabulary)).view(batch, rows)
    return verdict_of_paths(run, draft, paths, bonus)


def threshold(log_probs: Tensor, *, eps: float, delta: float) -> Tensor:
    """min(eps, delta * exp(-entropy)) for log-probabilities (..., vocabulary): (...)."""
    probs = log_probs.exp()
    # A token that truncation ruled out has log-probability -inf and adds nothing to the entropy.
    entropy = -(probs * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(dim=-1)
    return (delta * torch.exp(-entropy)).clamp(max=eps)


def best_paths(draft: Draft, kept: Tensor, log_probs: Tensor) -> list[list[int]]:
    """Per row the longest path whose nodes are all kept; of equally long ones the likeliest.

    Args:
        kept: (batch, nodes) bool.
        log_probs: (batch, nodes) of each node's token after its own parent.
    """
    ancestors = draft.ancestors().to(kept.device)  # (nodes, nodes), the node itself included
    whole = (kept[:, None, :] | ~ancestors).all(dim=-1)
    depths = torch.tensor(draft.depths(), device=kept.device)
    length = torch.where(whole, depths, 0)
    longest = length.max(dim=1, keepdim=True).values
    # Only nodes of whole paths are compared, so a -inf elsewhere must not reach the sums.
    known = log_probs.masked_fill(~kept, 0.0)
    likelihood = (known[:, None, :] * ancestors).sum(dim=-1)
    likelihood = likelihood.masked_fill(~whole | (length < longest), float("-inf"))
    ends = torch.where(longest[:, 0] > 0, likelihood.argmax(dim=1), -1).tolist()
    return [draft.path(end) if end >= 0 else [] for end in ends]
