"""The unconditional prediction as a linear function of earlier predictions: LinearAG's fit.

Along a way of N steps the unconditional output at step i is written as the sum of a_ij times the
conditional outputs up to i and b_ij times the unconditional ones before i, with one number for each
pair of steps, whatever the place in the picture. The numbers come from ordinary least squares over
stored ways, for which the products of all outputs with each other are enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.denoise.guidance import like
from hasten.denoise.inputs import call_arguments
from hasten.denoise.network import Call
from hasten.denoise.run import Run, Slots, Step
from hasten.denoise.slots import Guider
from hasten.errors import HastenError
from hasten.technique import Card, Contract, Loss, Parts

BATCH = 8  # ways that are walked together
HELD_OUT = 0.2  # share of the ways on which the fit is judged


@dataclass
class Way:
    """Both branches' outputs at each step, (samples, ...) each."""

    conditional: list[Tensor] = field(default_factory=list)
    unconditional: list[Tensor] = field(default_factory=list)

    def products(self) -> Tensor:
        """(2 * steps, 2 * steps) inner products of all outputs, over samples and values."""
        rows = torch.stack([t.double().flatten() for t in self.conditional + self.unconditional])
        return rows @ rows.T


class _Recorder(Guider):
    """Keeps what both branches say."""

    name: ClassVar[str] = "recorder"
    card: ClassVar[Card] = Card(title="recorder", family="", loss=Loss.EXACT)
    contract: ClassVar[Contract] = Contract(slots=())

    def __init__(self) -> None:
        self.way = Way()

    def wanted(self, state: Any, run: Run, call: Call) -> Tensor:
        return torch.ones(1, dtype=torch.bool)

    def compare(
        self, state: Any, run: Run, conditional: Tensor, unconditional: Tensor, step: Step
    ) -> None:
        self.way.conditional.append(like(conditional, step.sample).cpu())
        self.way.unconditional.append(like(unconditional, step.sample).cpu())


def fit(products: Tensor) -> Parts:
    """The coefficients of all steps: "conditional" and "unconditional", (steps, steps) each."""
    steps = len(products) // 2
    made = {
        name: torch.zeros(steps, steps, dtype=torch.float64)
        for name in ("conditional", "unconditional")
    }
    for i in range(steps):
        known = _known(i, steps)
        found = torch.linalg.lstsq(
            products[known][:, known], products[known, steps + i, None], driver="gelsd"
        ).solution[:, 0]
        made["conditional"][i, : i + 1] = found[: i + 1]
        made["unconditional"][i, :i] = found[i + 1 :]
    return made


def explained(products: Tensor, parts: Parts) -> Tensor:
    """(steps,) share of the unconditional outputs' squares that the coefficients explain."""
    steps = len(products) // 2
    shares = []
    for i in range(steps):
        weights = torch.cat([parts["conditional"][i], parts["unconditional"][i]]).double()
        weights[steps + i] -= 1.0  # the residual is a combination too
        shares.append(1.0 - weights @ products @ weights / products[steps + i, steps + i])
    return torch.stack(shares)


def _known(step: int, steps: int) -> list[int]:
    """Places of the outputs that are known at a step."""
    return [*range(step + 1), *range(steps, steps + step)]


def fit_pipeline(preparation: Any, steps: int, count: int) -> Parts:
    """Walk `count` guided ways and fit them; beside the coefficients "explained" on held-out ways.

    Raises:
        HastenError: where the pipeline guides with no second branch.
    """
    pipe = preparation.subject.pipe
    generator = torch.Generator().manual_seed(preparation.seed)
    prompts = preparation.draw(count, generator)
    sums: list[Tensor] = []
    for first in range(0, count, BATCH):
        some = prompts[first : first + BATCH]
        way = _walk(pipe, call_arguments(pipe, some, **preparation.arguments), steps, first)
        if len(way.conditional) != steps:
            raise HastenError(
                f"{type(pipe).__name__} runs no unconditional branch here, so there is nothing to fit; give a "
                "guidance scale above 1, and a negative prompt where it needs one."
            )
        sums.append(way.products())
        preparation.tick(min(first + BATCH, count), count, "walking guided ways")
    held = max(1, round(HELD_OUT * len(sums))) if len(sums) > 1 else 0
    parts = fit(torch.stack(sums[held:]).sum(dim=0))
    parts["explained"] = explained(torch.stack(sums[: held or 1]).sum(dim=0), parts)
    return {name: tensor.float() for name, tensor in parts.items()}


def _walk(pipe: Any, arguments: dict[str, Any], steps: int, seed: int) -> Way:
    recorder = _Recorder()
    run = Run(pipe, Slots(guider=(recorder, None)))
    given = {
        **arguments,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
    }
    with run.attached():
        pipe(**given)
    return recorder.way


def predict(parts: Parts, way: Way, conditional: Tensor) -> Tensor:
    """The unconditional output of the step after those of a way.

    Args:
        conditional: the conditional output of that step.
    """
    i = len(way.conditional)
    made = parts["conditional"][i, i].item() * conditional
    for name, outputs in (
        ("conditional", way.conditional),
        ("unconditional", way.unconditional),
    ):
        for weight, output in zip(parts[name][i].tolist(), outputs, strict=False):
            made = made + weight * output.reshape(made.shape)
    return made
