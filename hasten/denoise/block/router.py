"""Training of harmonica's table, inside the pipeline's own loop.

Each update is one network call of a trajectory that starts from noise: the network runs once with
everything computed and once with each layer's output mixed from a fresh and a kept one, and the
table's logits learn to bring the second near the first at a price for what runs. The loop goes on
with the second. Nothing but prompts and noise is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hasten.denoise.block.harmonica import THRESHOLD
from hasten.denoise.block.layers import to_numbers
from hasten.denoise.block.mixer import Mixer
from hasten.denoise.inputs import call_arguments
from hasten.denoise.network import hooked, networks, unpack
from hasten.denoise.pipelines import quiet
from hasten.denoise.run import Run, Slots
from hasten.errors import HastenError
from hasten.preparation import Preparation
from hasten.technique import Parts

BOUND = 5.0  # of logits
RATE = 0.01  # of AdamW, the paper's; for fewer updates a logit must still get from end to end
BATCH = 4  # prompts at a time; the paper takes 64
WEIGHING = 2  # prompts at a time where the weights of the steps are measured
REFRESH = 500  # updates after which that is done again
UPDATES_A_STEP = 40  # by default; the paper takes 1000 to 2000


class RouterTraining:
    """Trains one table.

    Args:
        preparation: the pipeline and its prompts; `steps` of it are updates.
        num_steps: steps of the sampler.
        beta: price of running, beside the error of the untrained table.
        own_samples: go on with what the table makes, not with what the full model makes.
        weigh: how steps are weighed: "image", "one" or "shuffled".
    """

    def __init__(
        self,
        preparation: Preparation,
        num_steps: int,
        *,
        beta: float,
        own_samples: bool,
        weigh: str,
    ) -> None:
        self.preparation = preparation
        self.pipe = preparation.subject.pipe
        self.num_steps = num_steps
        self.beta = beta
        self.own_samples = own_samples
        self.weigh = weigh
        self.generator = torch.Generator().manual_seed(preparation.seed)
        self.updates = preparation.steps or UPDATES_A_STEP * (num_steps - 1)
        self.done = 0
        self.mixer = Mixer()
        self.logits: list[Tensor] = []
        self.weights = torch.ones(num_steps)
        self.price: float | None = None  # of one layer at one step; known after one trajectory
        self.errors: list[float] = []
        self.weighed = 0  # updates done when the steps were weighed
        self.timesteps = torch.zeros(0)

    # -- the whole ---------------------------------------------------------------------------------
    def train(self) -> Parts:
        """Train, and give the table as it is saved."""
        with quiet(self.pipe), _frozen(networks(self.pipe)):
            self._first_look()
            self._weigh_steps()
            self._walk()  # without updates: how large errors are
            self.price = self.beta * sum(self.errors) / len(self.errors) / self.num_columns
            while self.done < self.updates:
                if self.done - self.weighed >= REFRESH:
                    self._weigh_steps()
                self._walk()
        solver = type(self.pipe.scheduler).__name__.encode()
        return {
            "logits": torch.stack([row.detach() for row in self.logits]),
            "places": to_numbers(list(self.mixer.columns), self.preparation.subject.model),
            "timesteps": self.timesteps,
            "solver": torch.tensor(list(solver), dtype=torch.uint8),
        }

    @property
    def num_columns(self) -> int:
        """How many layers the table is about."""
        return len(self.mixer.columns)

    def _first_look(self) -> None:
        """Find the layers, and make the logits: the first step always runs, others begin anyhow."""
        run = self._run("fill")
        self.timesteps = torch.as_tensor(self.pipe.scheduler.timesteps).double().cpu()
        if run.index != self.num_steps or len(self.timesteps) != self.num_steps:
            raise HastenError(
                f"{type(self.pipe.scheduler).__name__} makes {run.index} steps of {self.num_steps}, so the table "
                "has no step for each; use a solver of one network call a step."
            )
        if not self.num_columns:
            raise HastenError(
                f"{type(networks(self.pipe)[0]).__name__} has no attention or feed-forward layers in its blocks, "
                "which is what harmonica reuses."
            )
        first = torch.full((self.num_columns,), BOUND)
        later = torch.randn(self.num_steps - 1, self.num_columns, generator=self.generator)
        rows = [first, *later.clamp(-BOUND, BOUND).unbind()]
        self.logits = [row.clone().requires_grad_(step > 0) for step, row in enumerate(rows)]
        rate = max(RATE, min(0.5, 2 * BOUND * (self.num_steps - 1) / self.updates))
        self.optimizers = [
            torch.optim.AdamW([row], lr=rate, weight_decay=0.0) for row in self.logits[1:]
        ]

    # -- one trajectory ----------------------------------------------------------------------------
    def _walk(self) -> None:
        self._run("mix", forward=self._update)

    def _update(self, run: Run, original: Callable[[], Any]) -> Any:
        """One network call of a training trajectory; gives what the loop goes on with."""
        if run.index == 0:
            return self._pass(run, "fill", original)
        with torch.no_grad():
            reference = self._pass(run, "plain", original)
        row = self.logits[run.index]
        with torch.enable_grad():
            self.mixer.chances = row.sigmoid()
            mixed = self._pass(run, "mix", original)
            target, found = unpack(reference)[0], unpack(mixed)[0]
            error = (found.float() - target.float()).square().mean()
            weighed = self.weights[run.index].item() * error
            if self.price is None:
                self.errors.append(float(weighed.detach()))
            else:
                (weighed + self.price * self.mixer.chances.sum()).backward()
        if self.price is not None and self.done < self.updates:
            optimizer = self.optimizers[run.index - 1]
            optimizer.step()
            self.done += 1
            self.preparation.tick(self.done, self.updates, "harmonica: table")
        row.grad = None
        with torch.no_grad():
            row.clamp_(-BOUND, BOUND)
        found, pack = unpack(mixed)
        return pack(found.detach()) if self.own_samples else reference

    def _pass(self, run: Run, mode: str, original: Callable[[], Any]) -> Any:
        self.mixer.mode = mode
        self.mixer.counting.begin(run)
        return original()

    # -- what reuse does to the final sample -------------------------------------------------------
    def _weigh_steps(self) -> None:
        """Set the steps' weights anew."""
        self.weighed = self.done
        if self.weigh == "one":
            return
        # Before training the table says nothing yet, and everything is reused.
        nothing = [[False] * self.num_columns] * self.num_steps
        weights = self._measure_weights(self._table() if self.done else nothing)
        if self.weigh == "shuffled":
            order = torch.randperm(self.num_steps - 1, generator=self.generator)
            weights[1:] = weights[1:][order]
        self.weights = weights

    def _measure_weights(self, table: list[list[bool]]) -> Tensor:
        """(steps,) how much the final sample changes when reuse at a step is added; mean 1.

        Reuse is in force at all steps before it and at none behind. A step at which the table reuses
        nothing says nothing, and weighs as others do on average.
        """
        seed, prompts = self._draw_seed(), self.preparation.draw(WEIGHING, self.generator)
        finals = []
        for end in range(1, self.num_steps + 1):
            reused = frozenset(range(1, end))
            run = self._run("hard", table=table, steps=reused, seed=seed, prompts=prompts)
            finals.append(final_sample(run))
        changes = [(b - a).square().mean() for a, b in pairwise(finals)]
        weights, known = torch.stack(changes).cpu(), torch.tensor(changes) > 0
        if not bool(known.any()):
            return torch.ones(self.num_steps)
        weights[~known] = weights[known].mean()
        return torch.cat([torch.zeros(1), weights / weights.mean()])

    def _table(self) -> list[list[bool]]:
        return [row.sigmoid().gt(THRESHOLD).tolist() for row in self.logits]

    # -- running the pipeline ----------------------------------------------------------------------
    def _draw_seed(self) -> int:
        return int(torch.randint(2**31, (1,), generator=self.generator))

    def _run(
        self,
        mode: str,
        *,
        table: list[list[bool]] | None = None,
        steps: frozenset[int] = frozenset(),
        forward: Callable[[Run, Callable[[], Any]], Any] | None = None,
        seed: int | None = None,
        prompts: list[Any] | None = None,
    ) -> Run:
        """Call the pipeline once, with its network in a mode or by `forward`."""
        self.mixer.clear()
        self.mixer.mode, self.mixer.steps, self.mixer.table = mode, steps, table or []
        run = Run(self.pipe, Slots(block=(self.mixer, None)))
        run.trace = []
        arguments = call_arguments(
            self.pipe,
            self.preparation.draw(BATCH, self.generator) if prompts is None else prompts,
            **{"output_type": "latent", **self.preparation.arguments},
            num_inference_steps=self.num_steps,
            generator=torch.Generator().manual_seed(self._draw_seed() if seed is None else seed),
        )

        def inner(module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
            compute = lambda: original(*args, **kwargs)  # noqa: E731
            return compute() if forward is None else forward(run, compute)

        with ExitStack() as stack:
            for network in networks(self.pipe):  # before the engine's own, so inside it
                stack.enter_context(hooked(network, "hasten_training", inner))
            stack.enter_context(run.attached())
            self.pipe(**arguments)
        return run


def final_sample(run: Run) -> Tensor:
    """What the solver's last step made, on the run's way to a picture."""
    assert run.trace is not None
    result = run.trace[-1].result
    assert result is not None
    return result.float()


@contextmanager
def _frozen(modules: list[nn.Module]) -> Iterator[None]:
    """Weights ask for no gradients, for a while."""
    weights = [weight for module in modules for weight in module.parameters()]
    asked = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight, before in zip(weights, asked, strict=True):
            weight.requires_grad_(before)
