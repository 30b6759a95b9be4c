"""DualFast: its formula in each solver, and when it pays, on data whose exact noise is known."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import SubjectError
from hasten.measure.image_quality import psnr
from tests import pipelines
from tests.techniques import drawn
from tests.techniques.trajectories import ddim, dpm, flow, gaussian, mixture, record, toy

STRENGTH = 0.4


@pytest.mark.parametrize("family", ["dit", "cogview4", "wan"])
def test_neutral_is_the_pipeline_itself(family: str) -> None:
    pipe = pipelines.tiny(family)
    expected = pipelines.picture(pipe(**pipelines.call(family)))
    with hasten.apply(pipe, "dual_fast(strength=0.0)") as fast:
        assert torch.equal(pipelines.picture(fast(**pipelines.call(family))), expected)
        assert "dual_fast.mixed" not in fast.activity


@pytest.mark.parametrize("scheduler", [ddim, dpm, flow])
def test_one_step_has_nothing_to_mix_with(scheduler: Any) -> None:
    kind = "flow" if scheduler is flow else ddim()
    pipe = toy(mixture(kind=kind), scheduler())
    noted = record(pipe, "dual_fast", num_inference_steps=1)
    assert torch.equal(noted.sample, record(pipe, num_inference_steps=1).sample)


@pytest.mark.parametrize("scheduler", [ddim, dpm, flow])
def test_the_network_is_called_as_often(scheduler: Any) -> None:
    kind = "flow" if scheduler is flow else ddim()
    noted = record(toy(mixture(kind=kind), scheduler()), "dual_fast", num_inference_steps=8)
    assert noted.calls == 8 and noted.run.activity["dual_fast.mixed"] == 7


@pytest.mark.parametrize("scheduler", [ddim, flow])
def test_an_estimate_of_another_size_is_not_mixed_in(scheduler: Any) -> None:
    rule = gaussian(ddim()) if scheduler is not flow else (lambda x, t: 0.3 * x)
    noted = record(toy(rule, scheduler()), "dual_fast", num_inference_steps=10, grow_at=4)
    assert noted.sample.shape[-1] == 16 and bool(noted.sample.isfinite().all())
    assert noted.run.activity["dual_fast.mixed"] == 8  # each size's first step is its reference


def start(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def mixed(noise: Tensor, first: Tensor | None, t: float, strength: float = STRENGTH) -> Tensor:
    """The sheet's formula with the straight ramp."""
    weight = strength * (1 - t / 1000)
    return noise if first is None else (1 + weight) * noise - weight * first


@pytest.mark.parametrize("reference", ["first", "last"])
def test_ddim_by_its_formula(reference: str) -> None:
    scheduler = ddim()
    rule = mixture(kind=scheduler)
    scheduler.set_timesteps(8)
    times = [int(t) for t in scheduler.timesteps]
    x, earlier = start(), None
    for i, t in enumerate(times):
        a, s = _levels(scheduler, t)
        a_next, s_next = _levels(scheduler, times[i + 1]) if i < 7 else (1.0, 0.0)
        eps = rule(x, float(t))
        new = mixed(eps, earlier, t)
        if earlier is None or reference == "last":
            earlier = eps
        if i < 7:  # x_s = (a_s / a_t) x_t - sigma_s (e^h - 1) eps_new
            h = math.log(a_next / s_next) - math.log(a / s)
            x = a_next / a * x - s_next * (math.exp(h) - 1) * new
        else:
            x = (x - s * new) / a
    plan = f"dual_fast(strength={STRENGTH}, reference={reference})"
    scheduler = ddim(set_alpha_to_one=True)
    noted = record(toy(rule, scheduler), plan, num_inference_steps=8, batch=2)
    assert torch.allclose(noted.sample, x, atol=1e-3)


def _levels(scheduler: Any, t: int) -> tuple[float, float]:
    share = float(scheduler.alphas_cumprod[t])
    return share**0.5, (1 - share) ** 0.5


class MixingDPM(diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver++ 2M with the mix inside its formulas: in the first-order term only."""

    first: Tensor | None = None
    change: Tensor | float = 0.0

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        self.change = mixed(model_output, self.first, float(timestep)) - model_output
        if self.first is None:
            self.first = model_output
        return super().step(model_output, timestep, sample, **options)

    def _gain(self) -> Tensor:
        index = self.step_index
        a, s = self._sigma_to_alpha_sigma_t(self.sigmas[index])
        a_next, s_next = self._sigma_to_alpha_sigma_t(self.sigmas[index + 1])
        h = torch.log(a_next) - torch.log(s_next) - torch.log(a) + torch.log(s)
        clean = -s / a * self.change  # what the change does to the clean sample
        return -a_next * torch.expm1(-h) * clean

    def dpm_solver_first_order_update(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().dpm_solver_first_order_update(*args, **kwargs) + self._gain()

    def multistep_dpm_solver_second_order_update(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().multistep_dpm_solver_second_order_update(*args, **kwargs) + self._gain()


class MixingUniPC(diffusers.UniPCMultistepScheduler):
    """UniPC with the mix inside the first-order terms of its predictor and of its corrector."""

    first: Tensor | None = None
    change: Tensor | float = 0.0
    before: Tensor | float = 0.0

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        self.change = mixed(model_output, self.first, float(timestep)) - model_output
        if self.first is None:
            self.first = model_output
        return super().step(model_output, timestep, sample, **options)

    def _gain(self, index: int, change: Any) -> Tensor:
        a, s = self._sigma_to_alpha_sigma_t(self.sigmas[index])
        a_next, s_next = self._sigma_to_alpha_sigma_t(self.sigmas[index + 1])
        return (s_next - a_next * s / a) * change

    def multistep_uni_p_bh_update(self, *args: Any, **kwargs: Any) -> Tensor:
        made = super().multistep_uni_p_bh_update(*args, **kwargs)
        self.before = self.change
        return made + self._gain(self.step_index, self.change)

    def multistep_uni_c_bh_update(self, *args: Any, **kwargs: Any) -> Tensor:
        made = super().multistep_uni_c_bh_update(*args, **kwargs)
        return made + self._gain(self.step_index - 1, self.before)


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_solvers_with_a_history_keep_the_raw_outputs_in_it(kind: str) -> None:
    inside = MixingDPM if kind.startswith("DPM") else MixingUniPC
    rule = mixture(kind=ddim())
    settings = {"timestep_spacing": "trailing"}
    expected = record(toy(rule, inside(**settings)), num_inference_steps=10, batch=2)
    plan = f"dual_fast(strength={STRENGTH})"
    plain = getattr(diffusers, kind)(**settings)
    noted = record(toy(rule, plain), plan, num_inference_steps=10, batch=2)
    assert torch.allclose(noted.sample, expected.sample, atol=1e-3)
    without = record(toy(rule, plain), num_inference_steps=10, batch=2)
    assert not torch.allclose(noted.sample, without.sample, atol=1e-2)


def test_velocities_are_turned_into_noise_and_back() -> None:
    rule = mixture()
    scheduler = flow()
    scheduler.set_timesteps(6)
    x, first = start(), None
    for i, t in enumerate(scheduler.timesteps):
        s, s_next = float(scheduler.sigmas[i]), float(scheduler.sigmas[i + 1])
        velocity = rule(x, float(t))
        noise = x + (1 - s) * velocity
        new = mixed(noise, first, float(t))
        first = noise if first is None else first
        velocity = velocity if new is noise else (new - x) / (1 - s)
        x = x + (s_next - s) * velocity
    plan = f"dual_fast(strength={STRENGTH})"
    noted = record(toy(rule, flow()), plan, num_inference_steps=6, batch=2)
    assert torch.allclose(noted.sample, x, atol=1e-3)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_other_predictions_are_mixed_as_noise(kind: str) -> None:
    """A model that says the same in other words is led to the same sample."""
    table = ddim()
    rule = mixture(kind=table)

    def said(sample: Tensor, t: float) -> Tensor:
        a, s = _levels(table, int(t))
        noise = rule(sample, t)
        clean = (sample - s * noise) / a
        return a * noise - s * clean if kind == "v_prediction" else clean

    plan = f"dual_fast(strength={STRENGTH})"
    expected = record(toy(rule, ddim()), plan, num_inference_steps=8)
    noted = record(toy(said, ddim(prediction_type=kind)), plan, num_inference_steps=8)
    assert torch.allclose(noted.sample, expected.sample, atol=1e-2)


def distance(strength: float, steps: int, error: float = 0.0) -> float:
    """Mean squared distance to the exact solution, for Gaussian data of spread 1.

    The exact solution is the noise itself then. With an error the network's estimates lag behind,
    towards the first one, the more the less noise there is.
    """
    exact, first = gaussian(ddim(), 1.0), []

    def rule(sample: Tensor, t: float) -> Tensor:
        noise = exact(sample, t)
        if t == 999.0:
            first[:] = [noise]
        return noise - error * (1 - t / 1000) * (noise - first[0])

    pipe = toy(rule, ddim(set_alpha_to_one=True))
    noted = record(pipe, f"dual_fast(strength={strength})", num_inference_steps=steps)
    return float((noted.sample - start(1)).square().mean())


def best(steps: int, error: float = 0.0) -> float:
    """The strength, in tenths, that comes nearest to the exact solution."""
    return min((i / 10 for i in range(-2, 11)), key=lambda s: distance(s, steps, error))


def test_with_the_exact_noise_the_best_strength_is_what_the_solver_lacks() -> None:
    assert 0.2 < best(10) < best(5) and abs(best(20)) < best(10)


def test_an_error_that_grows_towards_the_end_asks_for_more() -> None:
    by_error = [best(10, error) for error in (0.0, 0.1, 0.3)]
    assert by_error == sorted(by_error) and by_error[2] > by_error[0] + 0.3


def test_a_fixed_strength_does_not_go_on_helping_with_many_steps() -> None:
    assert distance(0.3, 8) < distance(0.0, 8)
    assert distance(0.3, 120) > distance(0.0, 120)


def test_a_pull_towards_the_first_estimate_or_a_swap_hurts_where_the_mix_helps() -> None:
    table = ddim()
    exact, first = gaussian(table), []

    def lagging(sample: Tensor, t: float) -> Tensor:
        noise = exact(sample, t)
        if t == 999.0:
            first[:] = [noise]
        return noise - 0.3 * (1 - t / 1000) * (noise - first[0])

    def ends(rule: Any, plan: str = "") -> Tensor:
        pipe = toy(rule, ddim(set_alpha_to_one=True))
        return record(pipe, plan, num_inference_steps=8, batch=16).sample

    full = record(toy(exact, ddim(set_alpha_to_one=True)), num_inference_steps=500, batch=16).sample

    def swapped(sample: Tensor, t: float) -> Tensor:
        noise = lagging(sample, t)
        weight = 0.3 * (1 - t / 1000)
        return (1 + weight) * first[0] - weight * noise

    plain, helped, pulled, other = (
        float((made - full).square().mean())
        for made in (
            ends(lagging),
            ends(lagging, "dual_fast(strength=0.3)"),
            ends(lagging, "dual_fast(strength=-0.3)"),
            ends(swapped),
        )
    )
    assert helped < plain < pulled and other > plain


@pytest.mark.parametrize("family", ["dit", "sd3", "wan", "sana", "cogvideox"])
def test_it_runs_on_every_kind_and_again(family: str) -> None:
    pipe = pipelines.tiny(family)
    plain = pipelines.picture(pipe(**pipelines.call(family)))
    with hasten.apply(pipe, "dual_fast") as fast:
        first = pipelines.picture(fast(**pipelines.call(family)))
        again = pipelines.picture(fast(**pipelines.call(family)))
        assert fast.activity["dual_fast.mixed"] == 3
    assert torch.equal(first, again) and not torch.equal(first, plain)
    assert bool(first.isfinite().all())


@pytest.mark.parametrize(
    "scheduler", ["PNDMScheduler", "HeunDiscreteScheduler", "DPMSolverSinglestepScheduler"]
)
def test_solvers_whose_first_order_term_is_unknown_are_refused(scheduler: str) -> None:
    with pytest.raises(SubjectError, match="first-order term"):
        hasten.apply(pipelines.tiny("unet", scheduler=scheduler), "dual_fast")


# --------------------------------------------------------------------------------- trained models
@pytest.mark.zoo
@pytest.mark.thorough
def test_on_a_trained_model_the_wrong_sign_leads_away_from_many_steps() -> None:
    """At full strength, where it shows; the default should come nearer, and does not lose here."""
    count, settings = 6, {"guidance_scale": 4.0}
    many = drawn.draw("scenes-unet", "", count, num_inference_steps=500, **settings)
    made = {
        strength: drawn.draw(
            "scenes-unet",
            f"dual_fast(strength={strength})",
            count,
            num_inference_steps=5,
            **settings,
        )
        for strength in (0.0, 0.3, -1.0)
    }
    assert len({one.activity["calls"] for one in made.values()}) == 1
    near = {strength: psnr(one.array, many.array) for strength, one in made.items()}
    for strength, least, sign in ((0.3, -2, 1), (-1.0, 2, -1)):
        gain = sign * (near[strength] - near[0.0])
        error = gain.std(ddof=1) / count**0.5
        assert gain.mean() > least * error, (strength, gain.mean(), error)
    # It is not that pictures get sharper and nothing else: their coarse part does not suffer.
    coarse = {strength: smooth_error(one, many) for strength, one in made.items()}
    worse = coarse[0.3] - coarse[0.0]
    assert worse.mean() < 2 * worse.std(ddof=1) / count**0.5, (worse.mean(), coarse)
    # Nor does it saturate them as too much guidance does.
    full = {
        s: float(((p.pictures < 0.01) | (p.pictures > 0.99)).float().mean())
        for s, p in made.items()
    }
    assert full[0.3] < full[0.0] + 0.05, full


def smooth_error(made: drawn.Drawn, other: drawn.Drawn) -> Any:
    """(pictures,) mean square of the error that is left by a blur."""
    blurred = torch.nn.functional.avg_pool2d(made.pictures - other.pictures, 8)
    return blurred.double().square().flatten(1).mean(dim=1).numpy()
