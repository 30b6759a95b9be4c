"""Scenes: drawing, rendering, captions, questions, the reader and the judge."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from hasten.errors import HastenError
from hasten.zoo import catalogue
from hasten.zoo.denoisers.words import UNKNOWN, word_tokenizer
from hasten.zoo.scenes import (
    Ground,
    Object,
    Scene,
    attributes,
    caption,
    draw,
    draw_many,
    masks,
    mean_attributes,
    prompts,
    questions,
    read,
    render,
    render_clips,
)
from hasten.zoo.scenes import judge as judges
from hasten.zoo.scenes.render import area, coverage
from hasten.zoo.scenes.scene import COLOURS, EXTENT, FILLS, MOTIONS, SHAPES, SIZES

GREY = Ground("dark", 0.2, 0.0, 0.0)
NUM = 160


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return draw_many(NUM, 7)


@pytest.fixture(scope="module")
def pictures(scenes: list[Scene]) -> Tensor:
    return render(scenes, 64)


def thing(shape: str = "circle", fill: str = "solid", **changes: object) -> Object:
    return replace(Object(shape, "red", "big", fill, 0.5, 0.5, 0.17), **changes)  # type: ignore[arg-type]


# Drawing.


def test_a_seed_gives_its_scene() -> None:
    assert draw(5) == draw(5) != draw(6)
    assert draw(5, frames=8) == draw(5, frames=8)
    # The numbers are the same on every machine: these were written down once.
    first = draw(0)
    assert caption(first) == EXPECTED_CAPTION
    assert first.objects[0].x == pytest.approx(EXPECTED_X, abs=1e-12)


EXPECTED_CAPTION = (
    "a small purple square, a small hollow yellow diamond and a big hollow cyan square "
    "on light ground"
)
EXPECTED_X = 0.6610546125127034


def test_runs_share_no_scene() -> None:
    first, second = set(draw_many(50, 1)), set(draw_many(50, 2))
    assert len(first) == 50 and not first & second
    assert draw_many(10, 1, start=40) == draw_many(50, 1)[40:]


def test_scenes_have_everything_and_nothing_touches(scenes: list[Scene]) -> None:
    objects = [thing for scene in scenes for thing in scene.objects]
    for kind, words in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("fill", FILLS)):
        assert {getattr(thing, kind) for thing in objects} == set(words)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
    assert {scene.ground.tone for scene in scenes} == {"dark", "light"}
    for scene in scenes:
        covered = coverage(scene.objects, 64)
        assert (covered > 0.01).sum(dim=0).max() == 1
        for one in scene.objects:
            low, high = SIZES[one.size]
            assert low <= one.radius <= high
            assert EXTENT * one.radius <= min(one.x, 1 - one.x, one.y, 1 - one.y)


def test_number_of_objects_can_be_set() -> None:
    assert [len(draw(3, num_objects=count).objects) for count in (1, 2, 3)] == [1, 2, 3]
    for wrong in (0, 4):
        with pytest.raises(HastenError, match="give 1 to 3"):
            draw(3, num_objects=wrong)
    with pytest.raises(HastenError, match="frames is 0"):
        draw(3, frames=0)


def test_clips_move_inside_and_apart() -> None:
    scenes = draw_many(40, 3, frames=8)
    motions = {thing.motion for scene in scenes for thing in scene.objects}
    assert motions == set(MOTIONS)
    for scene in scenes:
        for frame in range(8):
            covered = coverage(scene.at(frame).objects, 32)
            assert (covered > 0.01).sum(dim=0).max() == 1
            mass = covered.sum(dim=(1, 2)) / 32**2
            for one, share in zip(scene.objects, mass.tolist(), strict=True):
                assert share == pytest.approx(area(one.shape, one.fill, one.radius), rel=0.08)
    clips = render_clips(scenes[:2], 8, 32)
    assert clips.shape == (2, 8, 3, 32, 32)
    assert torch.equal(clips[1, 5], render([scenes[1].at(5)], 32)[0])


# Rendering.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fill", FILLS)
def test_area_is_what_is_drawn(shape: str, fill: str) -> None:
    covered = coverage([thing(shape, fill)], 256)
    assert float(covered.mean()) == pytest.approx(area(shape, fill, 0.17), rel=0.01)
    # The centre of mass is where the object is said to be.
    axis = (torch.arange(256) + 0.5) / 256
    across = (covered[0].sum(dim=0) * axis).sum() / covered.sum()
    down = (covered[0].sum(dim=1) * axis).sum() / covered.sum()
    assert (float(across), float(down)) == pytest.approx((0.5, 0.5), abs=0.004)


def test_edges_are_smooth_and_colours_true() -> None:
    picture = render([Scene((thing(),), GREY)], 64)[0]
    assert torch.allclose(picture[:, 32, 32], torch.tensor(COLOURS["red"]))
    assert torch.allclose(picture[:, 0, 0], torch.full((3,), 0.2))
    between = (picture[0] > 0.25) & (picture[0] < 0.85)
    assert between.any()
    small = render([Scene((thing(),), GREY)], 32)[0]
    assert torch.allclose(avg_pool2d(picture[None], 2)[0], small, atol=0.2)


def test_a_picture_does_not_depend_on_its_batch(scenes: list[Scene], pictures: Tensor) -> None:
    assert torch.equal(render(scenes[40:43], 64), pictures[40:43])
    assert render([], 32).shape == (0, 3, 32, 32)
    with pytest.raises(HastenError, match="size is 4"):
        render(scenes[:1], 4)


def test_masks_cut_objects_out() -> None:
    scene = Scene((thing("square"), thing("circle", "hollow", x=0.2, y=0.2, radius=0.1)), GREY)
    square, ring = masks(scene, 64)
    assert square[32, 32] and not square[5, 5]
    assert not ring[12, 12] and ring[12, 12 - 5]  # a ring has a hole
    assert not (square & ring).any()


def test_rendering_is_fast(scenes: list[Scene]) -> None:
    start = time.process_time()
    render(scenes, 32)
    assert NUM / (time.process_time() - start) > 1000


# Words.


def test_a_picture_without_objects_has_a_caption() -> None:
    assert caption(Scene((), GREY)) == "nothing on dark ground"


def test_captions() -> None:
    one = thing("square", "hollow", colour="blue", size="small", x=0.3)
    assert caption(Scene((one,), GREY)) == "a small hollow blue square on dark ground"
    two = Scene((thing(x=0.2), one), GREY)
    assert caption(two).startswith("a big red circle left of a small hollow blue square on")
    assert two.relation == "left"
    assert Scene((one, thing(x=0.25, y=0.1)), GREY).relation == "below"
    three = Scene((one, one, thing()), replace(GREY, tone="light"))
    assert caption(three) == (
        "a small hollow blue square, a small hollow blue square and a big red circle "
        "on light ground"
    )
    moving = Scene((replace(one, vx=-0.03), thing()), GREY)
    assert caption(moving, moving=True) == (
        "a small hollow blue square moving left and a big red circle standing still on dark ground"
    )


def test_every_caption_has_tokens_for_its_words(scenes: list[Scene]) -> None:
    words = word_tokenizer(start=True, end=True, padding_side="right", max_length=16)
    clips = [caption(scene, moving=True) for scene in draw_many(40, 3, frames=8)]
    texts = [caption(scene) for scene in scenes]
    found = words(texts)["input_ids"]
    assert max(map(len, found)) <= 16  # what the pipelines pad to
    assert words.unk_token_id not in {
        token for ids in found + words(clips)["input_ids"] for token in ids
    }
    assert words.tokenize("a big RED circle, zebra") == ["big", "red", "circle", UNKNOWN]
    # Scenes that look different are told apart.
    looks = {
        (tuple((o.shape, o.colour, o.size, o.fill) for o in s.objects), s.relation, s.ground.tone)
        for s in scenes
    }
    assert len({tuple(ids) for ids in found}) == len(looks)


def test_prompts_are_held_out() -> None:
    pairs = prompts(20, 3)
    assert pairs == prompts(20, 3) and pairs != prompts(20, 4)
    assert all(text == caption(scene) for text, scene in pairs)
    trained = set(draw_many(200, 3)) | set(draw_many(200, 0))
    assert not trained & {scene for _, scene in pairs}
    assert "moving" in " ".join(text for text, _ in prompts(5, frames=8))
    with pytest.raises(HastenError, match="num is 0"):
        prompts(0)


def test_questions_have_right_answers() -> None:
    scene = Scene((thing(x=0.2), thing("square", colour="blue", x=0.7)), GREY)
    found = dict(questions(scene))
    assert found["how many objects are there?"] == "2"
    assert found["what colour is the square?"] == "blue"
    assert found["is the red circle left of the blue square?"] == "yes"
    assert found["is the blue square left of the red circle?"] == "no"
    # What has two answers is not asked.
    twins = Scene((thing(x=0.2), thing(x=0.7)), GREY)
    assert not any("the circle" in question for question, _ in questions(twins))


# The reader.


def exact(pictures: Tensor, scenes: list[Scene]) -> float:
    return mean_attributes(attributes(pictures, scenes))["exact"]


def test_reads_clean_pictures_exactly(scenes: list[Scene], pictures: Tensor) -> None:
    assert exact(pictures, scenes) == 1.0
    assert exact(render(scenes, 32), scenes) >= 0.99
    for shown, scene in zip(read(pictures[:40]), scenes, strict=False):
        wanted = sorted(scene.objects, key=lambda thing: thing.x)
        for one, other in zip(shown.objects, wanted, strict=True):
            assert (one.x, one.y) == pytest.approx((other.x, other.y), abs=0.01)
            assert one.radius == pytest.approx(other.radius, rel=0.06)
        assert shown.ground.level == pytest.approx(scene.ground.level, abs=0.01)
        assert shown.ground.shade == pytest.approx(scene.ground.shade, abs=0.01)


@pytest.mark.parametrize(("noise", "least"), [(0.05, 0.98), (0.1, 0.97), (0.2, 0.85)])
def test_reads_noisy_pictures(
    scenes: list[Scene], pictures: Tensor, noise: float, least: float
) -> None:
    torch.manual_seed(0)
    noisy = pictures + noise * torch.randn_like(pictures)
    assert exact(noisy, scenes) >= least


def test_separates_right_from_wrong(scenes: list[Scene], pictures: Tensor) -> None:
    torch.manual_seed(0)
    shuffled = mean_attributes(attributes(pictures, [*scenes[1:], scenes[0]]))
    assert shuffled["exact"] == 0 and shuffled["attributes"] < 0.3
    static = mean_attributes(attributes(torch.rand(32, 3, 64, 64), scenes[:32]))
    assert static["attributes"] < 0.15
    heavy = avg_pool2d(avg_pool2d(pictures, 7, 1, 3), 7, 1, 3)
    assert exact(heavy, scenes) < 0.4
    # Each kind of attribute is judged on its own.
    wrong = [
        replace(scene, objects=tuple(replace(o, fill="solid") for o in scene.objects))
        for scene in scenes
    ]
    found = mean_attributes(attributes(pictures, wrong))
    assert found["shape"] == found["colour"] == found["size"] == found["count"] == 1
    assert 0.3 < found["fill"] < 0.7


def test_a_wrong_relation_is_seen() -> None:
    left, right = thing(x=0.25), thing("square", colour="blue", x=0.75)
    picture = render([Scene((left, right), GREY)])
    swapped = Scene((replace(left, x=0.75), replace(right, x=0.25)), GREY)
    result = attributes(picture, [swapped])[0]
    assert result.found["relation"] == 0 and not result.exact
    assert result.share == pytest.approx(10 / 11)


def test_a_missing_and_a_spare_object_are_seen() -> None:
    one, two = Scene((thing(x=0.25),), GREY), Scene((thing(x=0.25), thing(x=0.75)), GREY)
    missing = attributes(render([one]), [two])[0]
    assert missing.found["count"] == 0 and missing.found["colour"] == 0.5
    spare = attributes(render([two]), [one])[0]
    assert spare.found["count"] == 0 and spare.found["shape"] == 1 and not spare.exact


def test_what_looks_like_nothing_is_unclear() -> None:
    picture = torch.full((3, 64, 64), 0.2)
    picture[0, 10:14, 5:60] = 0.9  # a red bar
    picture[1:, 10:14, 5:60] = 0.1
    shown = read(picture)[0]
    assert [(o.colour, o.shape) for o in shown.objects] == [("red", "unclear")]
    assert read(torch.full((3, 64, 64), 0.2))[0].objects == ()


def test_reader_refuses() -> None:
    with pytest.raises(HastenError, match="give \\(pictures, 3, size, size\\)"):
        read(torch.zeros(2, 1, 64, 64))
    with pytest.raises(HastenError, match="give 16 or more"):
        read(torch.zeros(3, 8, 8))
    with pytest.raises(HastenError, match="not finite"):
        read(torch.full((3, 32, 32), float("nan")))
    with pytest.raises(HastenError, match="give as many"):
        attributes(torch.zeros(2, 3, 32, 32), [Scene((thing(),), GREY)])


# The judge.


def test_frechet_of_normal_distributions() -> None:
    torch.manual_seed(0)
    first = torch.randn(20_000, 3)
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 0.0, -2.0])
    second = torch.randn(20_000, 3) * scale + shift
    expected = float(shift.square().sum() + (scale - 1).square().sum())
    assert judges.frechet(first, second) == pytest.approx(expected, rel=0.05)
    assert judges.frechet(first, first) == pytest.approx(0, abs=1e-9)
    assert judges.frechet(first, second) == pytest.approx(judges.frechet(second, first), rel=1e-6)
    with pytest.raises(HastenError, match="2 pictures or more"):
        judges.frechet(first[:1], second)


def test_labels_say_what_a_scene_holds() -> None:
    scene = Scene((thing("square", "hollow", x=0.1, y=0.9),), GREY)
    true = judges.labels([scene])[0]
    held = {label for label, value in zip(judges.LABELS, true.tolist(), strict=True) if value}
    assert held == {
        "1 objects",
        "dark ground",
        "red square",
        "red big",
        "red hollow",
        "object in row 3 column 0",
    }


def test_perceptual_distance_is_a_distance(pictures: Tensor) -> None:
    torch.manual_seed(0)
    judge = judges.Judge((8, 8, 8)).eval()
    near = pictures[:4] + 0.05 * torch.randn_like(pictures[:4])
    far = pictures[4:8]
    assert judges.perceptual(judge, pictures[:4], pictures[:4]).tolist() == [0] * 4
    one = judges.perceptual(judge, pictures[:4], near)
    assert one.shape == (4,) and bool((one > 0).all())
    assert float(judges.perceptual(judge, pictures[:4], far).mean()) > 0
    with pytest.raises(HastenError, match="pair by pair"):
        judges.perceptual(judge, pictures[:4], pictures[:3])


def test_judge_round_trips(tmp_path: Path, pictures: Tensor) -> None:
    judge = judges.Judge((8, 8, 8)).bfloat16().float().eval()
    judges.save_judge(judge, tmp_path)
    with pytest.raises(HastenError, match="hasten train scenes-judge"):
        judges.load_judge(tmp_path)  # without its card
    (tmp_path / "card.json").write_text('{"recipe": {"widths": [8, 8, 8]}}')
    again = judges.load_judge(tmp_path)
    assert torch.equal(again.features(pictures[:2]), judge.features(pictures[:2]))
    assert not any(p.requires_grad for p in again.parameters())
    weights = tmp_path / judges.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(HastenError, match="cannot be read"):
        judges.load_judge(tmp_path)


@pytest.mark.zoo
def test_shipped_judge_sees_and_separates(scenes: list[Scene], pictures: Tensor) -> None:
    judge = judges.load_judge()
    found = judges.judge_quality(judge, judges.mark(scenes))
    assert min(found.values()) > 0.97
    card = catalogue.part_path("scenes-judge") / "card.json"
    assert card.is_file()
    torch.manual_seed(0)
    features = judges.features(judge, pictures)
    real = judges.features(judge, render(draw_many(NUM, 8)))
    own = judges.frechet(features, real)
    noisy = judges.features(judge, pictures + 0.2 * torch.randn_like(pictures))
    blurred = judges.features(judge, avg_pool2d(pictures, 5, 1, 2))
    few = [replace(scene, objects=scene.objects[:1]) for scene in scenes]
    lonely = judges.features(judge, render(few))
    for spoilt in (noisy, blurred, lonely):
        assert judges.frechet(spoilt, real) > 1.5 * own
    near = judges.perceptual(judge, pictures[:32], pictures[:32] + 0.02)
    far = judges.perceptual(judge, pictures[:32], pictures[32:64])
    assert float(near.mean()) < 0.2 * float(far.mean())
