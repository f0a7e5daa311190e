"""DDIM: a function of the noise, exact for an exact predictor, guided by what the model says without a class."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.ir.errors import InputError
from graphwright.models.sampling import TRAIN_STEPS, ddim, noised, signal_levels

NO_CLASS = 2


def seeded(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def predictor_of(points):
    """Predicts exactly the noise in images that are all points[class]; its variance half is NaN, which nothing may read."""

    def model(x, timestep, class_labels):
        levels = signal_levels()[timestep].view(-1, 1, 1, 1)
        noise = (x - levels.sqrt() * points[class_labels]) / (1 - levels).sqrt()
        return torch.cat([noise, torch.full_like(noise, math.nan)], dim=1)

    return model


def any_model(x, timestep, class_labels):
    """Depends on all of its inputs, row by row."""
    noise = torch.sin(x + 0.01 * timestep.view(-1, 1, 1, 1)) + class_labels.view(-1, 1, 1, 1)
    return torch.cat([noise, noise], dim=1)


NOISE, LABELS = seeded(3, 1, 4, 4), torch.tensor([0, 1, 1])
POINTS = seeded(NO_CLASS + 1, 1, 4, 4, seed=1).clamp(-1, 1)


def test_signal_levels_are_the_cosine_schedule():
    """Away from its end, where the paper clips it, the product telescopes to f(t + 1) / f(0)."""
    levels = signal_levels()
    expected = [math.cos(math.pi / 2 * ((t + 1) / TRAIN_STEPS + 0.008) / 1.008) ** 2 for t in range(TRAIN_STEPS)]
    first = math.cos(math.pi / 2 * 0.008 / 1.008) ** 2
    torch.testing.assert_close(levels[:-1], torch.tensor(expected[:-1], dtype=torch.float64) / first, rtol=1e-9, atol=0)
    assert (levels.diff() < 0).all() and 0 < levels[-1] < 1e-8


def test_noised_images_have_the_schedule_s_mean_and_variance():
    images, timestep = POINTS[:2], torch.tensor([10, 900])
    levels = signal_levels()[timestep].view(-1, 1, 1, 1)
    assert torch.equal(noised(images, torch.zeros_like(images), timestep), levels.sqrt() * images)
    assert torch.equal(noised(torch.zeros_like(images), images, timestep), (1 - levels).sqrt() * images)


def test_the_same_noise_gives_the_same_image_and_other_noise_another():
    assert torch.equal(ddim(any_model, NOISE, LABELS, steps=7), ddim(any_model, NOISE, LABELS, steps=7))
    assert not torch.equal(ddim(any_model, NOISE, LABELS, steps=7), ddim(any_model, -NOISE, LABELS, steps=7))


@given(steps=st.integers(1, 60), seed=st.integers(0, 99))
def test_the_exact_predictor_of_one_point_leads_there_in_any_number_of_steps(steps, seed):
    images = ddim(predictor_of(POINTS), seeded(3, 1, 4, 4, seed=seed), LABELS, steps=steps)
    # one step divides a rounding of 1e-16 by sqrt(a_t) = 5e-5
    torch.testing.assert_close(images, POINTS[LABELS], rtol=0, atol=1e-10)


def test_one_step_is_the_clipped_estimate_at_the_last_time():
    level = signal_levels()[-1]
    predicted = any_model(NOISE, torch.full((3,), TRAIN_STEPS - 1), LABELS)[:, :1]
    expected = ((NOISE - (1 - level).sqrt() * predicted) / level.sqrt()).clamp(-1, 1)
    assert torch.equal(ddim(any_model, NOISE, LABELS, steps=1), expected)


def test_times_are_evenly_spaced_from_the_last_and_sizes_never_change():
    calls = []

    def watching(x, timestep, class_labels):
        calls.append((x.shape, timestep.tolist(), class_labels.tolist()))
        return any_model(x, timestep, class_labels)

    ddim(watching, NOISE, LABELS, steps=4, guidance=2.0, no_class=NO_CLASS)
    assert calls == [(torch.Size([6, 1, 4, 4]), [t] * 6, [0, 1, 1, 2, 2, 2]) for t in (999, 749, 499, 249)]


def test_guidance_of_one_is_the_unguided_sampler():
    unguided = ddim(any_model, NOISE, LABELS, steps=5)
    assert torch.equal(ddim(any_model, NOISE, LABELS, steps=5, guidance=1.0, no_class=NO_CLASS), unguided)
    # from the doubled batch the same comes as without + (with - without), which rounds otherwise
    nearly = ddim(any_model, NOISE, LABELS, steps=5, guidance=1.0 + 1e-12, no_class=NO_CLASS)
    torch.testing.assert_close(nearly, unguided, rtol=0, atol=1e-6)


def test_guidance_of_zero_samples_without_a_class():
    without = ddim(any_model, NOISE, torch.full_like(LABELS, NO_CLASS), steps=5)
    torch.testing.assert_close(ddim(any_model, NOISE, LABELS, steps=5, guidance=0.0, no_class=NO_CLASS), without)


def test_guidance_goes_past_the_class_by_its_factor():
    """Exact predictors of points p (class) and q (none) mix to the exact predictor of q + guidance (p - q)."""
    points = POINTS / 4  # so that the point beyond is not clipped
    beyond = points[NO_CLASS] + 1.5 * (points[LABELS] - points[NO_CLASS])
    images = ddim(predictor_of(points), NOISE, LABELS, steps=6, guidance=1.5, no_class=NO_CLASS)
    torch.testing.assert_close(images, beyond, rtol=0, atol=1e-10)


def test_ddim_is_diffusers_scheduler():
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers: pip install diffusers")
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=True,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(8)
    x = NOISE
    for time in scheduler.timesteps:
        predicted = any_model(x, time.expand(3), LABELS)[:, :1]
        x = scheduler.step(predicted, time, x, use_clipped_model_output=True).prev_sample
    # its levels are float32, of a schedule whose smallest is 2e-9: the last step but one sees them with a relative error of some 1e-5
    torch.testing.assert_close(ddim(any_model, NOISE, LABELS, steps=8), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "1 to 1000 steps, not 0"),
        ({"steps": 1001}, "1 to 1000 steps, not 1001"),
        ({"steps": 2.0}, "1 to 1000 steps, not 2.0"),
        ({"guidance": math.nan, "no_class": NO_CLASS}, "finite guidance, not nan"),
        ({"guidance": 2.0}, "needs no_class"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        ddim(any_model, NOISE, LABELS, **options)
