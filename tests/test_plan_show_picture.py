"""The picture of a timeline: a file of sane size whose pixels show forwards, backwards and idle time."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

import matplotlib.image
import numpy as np

from spu.plan import draw_timeline
from spu.plan.show.colors import FILL, IDLE
from spu.schedules import Timeline, gpipe, one_f_one_b, simulate


def pixels_of(image, color):
    """How many pixels have exactly this colour."""
    wanted = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)])
    return int((np.round(image[..., :3] * 255).astype(int) == wanted).all(axis=-1).sum())


def draw(tmp_path, *timelines):
    draw_timeline(timelines[0], tmp_path / "t.png", "a run", *timelines[1:])
    return matplotlib.image.imread(tmp_path / "t.png")


def test_colours_cover_what_the_timeline_says(tmp_path):
    timeline = simulate(one_f_one_b(2, 4), [(1.0, 2.0)] * 2)
    image = draw(tmp_path, timeline)
    assert image.shape[1] == 1800
    assert 300 < image.shape[0] < 600
    forward, backward, idle = (pixels_of(image, color) for color in (FILL["F"], FILL["B"], IDLE))
    total = forward + backward + idle
    assert backward / forward == pytest.approx(2.0, rel=0.1)
    assert idle / total == pytest.approx(timeline.idle_share, abs=0.03)


def test_the_prediction_is_drawn_below_on_the_same_scale(tmp_path):
    measured = simulate(one_f_one_b(2, 4), [(1.0, 2.0)] * 2, 0.5)
    predicted = simulate(one_f_one_b(2, 4), [(0.5, 1.0)] * 2)
    alone, both = draw(tmp_path, measured), draw(tmp_path, measured, predicted)
    assert both.shape[0] > alone.shape[0] + 100
    middle = both.shape[0] // 2
    above, below = (pixels_of(half, FILL["B"]) for half in (both[:middle], both[middle:]))
    assert below / above == pytest.approx(0.5, rel=0.1)


def test_a_clock_that_does_not_start_at_zero_changes_nothing(tmp_path):
    timeline = simulate(gpipe(3, 2), [(0.01, 0.02)] * 3)
    moved = Timeline.from_spans(s._replace(start=s.start + 5000.0, end=s.end + 5000.0) for s in timeline.spans)
    first, second = draw(tmp_path, timeline), draw(tmp_path, moved)
    assert np.abs(first - second).mean() < 1e-3


@pytest.mark.parametrize("name", ["t.svg", "t.pdf"])
def test_vector_formats(tmp_path, name):
    draw_timeline(simulate(gpipe(2, 200), [(1e-4, 2e-4)] * 2), tmp_path / name, "many")
    assert (tmp_path / name).stat().st_size > 5000


def test_kinds_without_a_colour_of_their_own_are_drawn_and_split_backwards_too(tmp_path):
    timeline = Timeline.from_spans(
        [(0, "F", 0, 0.0, 1.0), (0, "I", 0, 1.0, 2.0), (0, "W", 0, 2.0, 3.0), (0, "update", 0, 3.0, 4.0)]
    )
    image = draw(tmp_path, timeline)
    areas = [pixels_of(image, color) for color in (FILL["F"], FILL["I"], FILL["W"], "#9a8fb8")]
    assert min(areas) > 0.8 * max(areas)


def test_an_empty_timeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the given timeline has no spans"):
        draw_timeline(Timeline.from_spans([]), tmp_path / "t.png", "empty")
    timeline = simulate(gpipe(1, 1), [(1.0, 1.0)])
    with pytest.raises(ValueError, match="the predicted timeline has no spans"):
        draw_timeline(timeline, tmp_path / "t.png", "empty", Timeline.from_spans([]))
    assert not (tmp_path / "t.png").exists()


def test_a_streamed_plan_is_drawn_with_its_tiers_and_copies(tmp_path):
    from test_plan_make import layers
    from test_plan_make_streaming import DISK, stream

    from spu.plan.show.colors import OTHER_FILL
    from spu.plan.show.picture import draw_plan

    plan = stream(layers(30, params=100_000), DISK, disk=(1e8, 1e8), microbatches=1, flops=2e11)
    assert plan.streaming is not None
    draw_plan(plan, tmp_path / "plan.png")
    image = matplotlib.image.imread(tmp_path / "plan.png")
    assert image.shape[0] < 1200  # no row for each of 30 stages
    assert plan.streaming.bottleneck == "disk"
    backward, disk = pixels_of(image, FILL["B"]), pixels_of(image, OTHER_FILL)
    seconds = 30 * plan.stages[0].backward_s
    assert disk / backward == pytest.approx(plan.streaming.seconds["disk"] / seconds, rel=0.1)
