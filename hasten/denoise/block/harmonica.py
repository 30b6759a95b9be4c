"""HarmoniCa: a table, learned offline, says at which steps which layers run.

"HarmoniCa: Harmonizing Training and Inference for Better Feature Cache in Diffusion Transformer
Acceleration" (arXiv 2410.01723), after the reference code. `hasten.denoise.block.router` trains the
table on whole trajectories that start from noise, and weighs each step by what reuse at it does to
the final sample. A layer's output is reused before its gate, so the gate is the step's own.

Ours: every attention and feed-forward layer of a block has a column, also those that read the text;
a layer that runs twice in a block, once for the text, has two. The table holds for one number of
steps, one solver and its timesteps, which are saved with it and checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.denoise.block.layers import Counting, Place, each, from_numbers
from hasten.denoise.block.residual import check_blocks
from hasten.denoise.run import Run
from hasten.denoise.slots import Block
from hasten.errors import HastenError
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

if TYPE_CHECKING:
    from hasten.preparation import Preparation

THRESHOLD = 0.1  # a chance above it means that the layer runs, and its output is kept anew


@dataclass(frozen=True)
class Table:
    """A trained table on a network.

    Attributes:
        runs: (steps, columns) bool, whether the layer runs.
        columns: the column of each layer.
        timesteps: (steps,) for which it was trained; `solver`: the scheduler's class.
    """

    runs: Tensor
    columns: dict[Place, int]
    timesteps: Tensor
    solver: str


@dataclass
class State:
    """One call of the pipeline: the table as lists, and what was kept of each layer's last run."""

    table: Table
    step: int = -1  # at which the sampler was last checked
    runs: list[list[bool]] = field(default_factory=list)
    counting: Counting = field(default_factory=Counting)
    kept: dict[tuple[int, int, Place], tuple[Any, tuple[int, ...]]] = field(default_factory=dict)


@technique("harmonica")
@dataclass(frozen=True, kw_only=True)
class Harmonica(Block):
    """Runs attention and feed-forward layers at the steps that a learned table names."""

    sublayers = True

    card: ClassVar[Card] = Card(
        title=(
            "HarmoniCa: Harmonizing Training and Inference for Better Feature Cache in Diffusion "
            "Transformer Acceleration"
        ),
        paper="harmonica",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2410.01723",
        year=2024,
        claims=(
            Claim("latency saved, share", 0.4, "PixArt-alpha, at least"),
            Claim("fewer operations", 2.07, "PixArt-alpha, counted, not timed"),
            Claim("speed-up", 1.44, "DiT-XL/2, 256 px, nearly the same quality"),
            Claim("speed-up", 1.73, "PixArt-Sigma, 2048 px"),
        ),
        neutral={"table": "all"},
        rival=Rival(
            "harmonica(steps={steps}, beta={beta}, table=random)",
            "psnr",
            "as many layers run at as many steps, drawn by chance",
        ),
        saves="blocks",
        trained=True,
        notes=(
            "The table belongs to one number of steps, one solver and its timesteps; for others it must "
            "be trained again. Training takes no pictures, only prompts; the guidance scale may differ "
            "from the one in training. Memory: one output of each layer that the next step reuses. "
            "Going on with the table's own samples wants patience: on scenes-dit at 10 steps, tables "
            "trained on the full model's were 2.4 and 4.3 dB better after 180 updates, and 0.6 dB worse "
            "after 720. Tables of two trainings differ by several dB."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.BLOCK,),
        needs=frozenset(
            {Resource.TRAJECTORY, Resource.EVERY_CALL, Resource.TIMESTEPS, Resource.TOKEN_SET}
        ),
        phase=Phase.PASS,
    )
    part_knobs: ClassVar[tuple[str, ...]] = ("steps", "beta", "trajectory", "weigh")
    part_settings: ClassVar[tuple[str, ...]] = ("size", "scheduler")

    steps: int = knob(50, "steps of the sampler for which the table is", low=2)
    beta: float = knob(
        1.0,
        "price in training of running all layers of a step, beside the error of the untrained table; "
        "higher reuses more",
        low=0.0,
    )
    table: str = knob(
        "learned",
        "which table: the learned one; everything runs; or, with as many runs as the learned one, at "
        "even distances or by chance. The last two are ablations",
        choices=("learned", "all", "even", "random"),
    )
    trajectory: str = knob(
        "router",
        "whose samples training goes on with: the router's own, or, as an ablation, the full model's",
        choices=("router", "full"),
    )
    weigh: str = knob(
        "image",
        "how training weighs steps: by the error that reuse makes in the final sample; all alike; by "
        "those weights in another order. The last two are ablations",
        choices=("image", "one", "shuffled"),
    )
    seed: int = knob(0, "seed of the random table", low=0)

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        check_blocks(pipe, self.name)

    # -- training ----------------------------------------------------------------------------------
    def prepare(self, preparation: Preparation) -> Parts:
        """Train the table: logits (steps, columns), the columns' layers, timesteps and solver."""
        from hasten.denoise.block.router import RouterTraining

        self.check(preparation.subject.pipe)
        training = RouterTraining(
            preparation,
            self.steps,
            beta=self.beta,
            own_samples=self.trajectory == "router",
            weigh=self.weigh,
        )
        return training.train()

    def bind(self, model: nn.Module, parts: Parts) -> Table:
        """The table for a network."""
        runs = parts["logits"].sigmoid() > THRESHOLD
        places = from_numbers(parts["places"], model)
        solver = bytes(parts["solver"].tolist()).decode()
        columns = {place: column for column, place in enumerate(places)}
        return Table(self._chosen(runs), columns, parts["timesteps"], solver)

    def _chosen(self, runs: Tensor) -> Tensor:
        """(steps, columns) the learned table, or one with as many runs."""
        if self.table == "all":
            return torch.ones_like(runs)
        if self.table == "random":
            generator = torch.Generator().manual_seed(self.seed)
            later = runs[1:].flatten()
            mixed = later[torch.randperm(len(later), generator=generator)].view_as(runs[1:])
            return torch.cat([runs[:1], mixed])
        if self.table == "even":
            return even_table(runs)
        return runs

    # -- the slot's methods ------------------------------------------------------------------------
    def begin(self, run: Run, bound: Table) -> State:
        """Nothing is kept at first."""
        return State(bound, runs=bound.runs.tolist())

    def sublayer(self, state: State, run: Run, key: tuple[int, str], compute: Any) -> Any:
        """See `Block.sublayer`."""
        if state.step != run.index <= 1:  # only then is it known at which step the loop began
            self._check_schedule(state.table, run)
            state.step = run.index
        place = state.counting.place(run, key)
        column = state.table.columns.get(place)
        if column is None:  # a layer that did not run in training
            return compute()
        where = (id(run.call.module), run.call.branch, place)
        if not state.runs[run.index][column] and where in state.kept:
            output, had = state.kept[where]
            if set(run.rows) <= set(had):
                run.activity[f"{self.name}.reused"] += 1
                return each(lambda tensor: run.fit(tensor, had), output)
        state.kept.pop(where, None)
        output = compute()
        if not run.is_last and not state.runs[run.index + 1][column]:
            state.kept[where] = (output, run.rows)
        return output

    def _check_schedule(self, table: Table, run: Run) -> None:
        """Raise where the sampler is not the one of training."""
        trained, steps = len(table.runs), run.num_steps
        if steps != trained:
            raise HastenError(
                f"harmonica's table is for {trained} steps, and this call makes {steps}; call it with "
                f"num_inference_steps={trained}, or prepare harmonica(steps={steps})."
            )
        solver = type(run.scheduler).__name__
        times = torch.as_tensor(run.scheduler.timesteps).double().cpu()[run.first :]
        if solver != table.solver or not torch.allclose(times, table.timesteps.double(), rtol=1e-3):
            raise HastenError(
                f"harmonica's table was trained with {table.solver} and other timesteps than {solver} makes "
                "here; prepare it for this scheduler and size."
            )


def even_table(runs: Tensor) -> Tensor:
    """(steps, columns) a table with about as many runs, each layer at even distances.

    It is the plain rule of running everything once in so many steps, for any share.
    """
    steps = len(runs)
    share = float(runs[1:].double().mean())
    at = torch.arange(steps, dtype=torch.float64)
    even = torch.floor(at * share + 1e-9) > torch.floor((at - 1.0) * share + 1e-9)
    even[0] = True
    return even[:, None].expand_as(runs).clone()
