"""Student's t against its table and its density, and what the report says over several seeds."""

import math
from pathlib import Path

import numpy as np
import pytest
from report_runs import Writer, edit_row, flags, headline, markdown, page

from llavakd.report import collect
from llavakd.report.compare import over_seeds, seed_difference


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_the_interval_has_the_quantile_of_the_table(freedom: int, quantile: float) -> None:
    values = np.random.default_rng(freedom).normal(0.1, 0.02, freedom + 1)
    error = np.std(values, ddof=1) / math.sqrt(freedom + 1)
    assert over_seeds(values.tolist()).half_width / error == pytest.approx(quantile, abs=6e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 8.0])
def test_p_is_what_the_integral_of_the_density_leaves(freedom: int, t: float) -> None:
    values = np.random.default_rng(freedom).normal(size=freedom + 1)
    values += t * np.std(values, ddof=1) / math.sqrt(freedom + 1) - np.mean(values)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    x = np.linspace(-t, t, 200_001)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert over_seeds(values.tolist()).p == pytest.approx(1 - np.trapezoid(density, x), abs=1e-8)


def test_mean_interval_and_p_over_three_seeds() -> None:
    mean = over_seeds([0.1, 0.2, 0.3])
    assert mean is not None
    assert mean.value == pytest.approx(0.2)
    assert mean.half_width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), abs=1e-5)
    # t = 0.2 sqrt(3) / 0.1; with two degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t^2) = 1 - sqrt(12 / 14).
    assert mean.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert over_seeds([-0.1, -0.2, -0.3]) == pytest.approx(mean._replace(value=-mean.value))


@pytest.mark.parametrize("values", [[], [0.2], [0.2, 0.2], [0.3 - 0.2, 0.2 - 0.1, 0.1]])
def test_there_is_no_interval_without_spread(values: list[float]) -> None:
    assert over_seeds(values) is None


def three_seeds(make_run: Writer, gains: tuple[int, int, int]) -> list[Path]:
    """Controls with 8, 10 and 12 of 20 right, and distilled models with so many more."""
    runs = []
    for seed, gain in enumerate(gains):
        right = 8 + 2 * seed
        rows = {"pt-sft": flags(right, 20), "dpt-sft-dft": flags(right + gain, 20)}
        runs.append(make_run(f"s{seed}", rows, seed=seed))
    return runs


def test_the_table_over_seeds(make_run: Writer) -> None:
    results = collect(three_seeds(make_run, (2, 4, 6)))
    # Controls 40, 50, 60: mean 50, deviation 10, 4.303 * 10 / sqrt(3) = 24.8. Distilled 50, 70, 90: twice that.
    # Differences 10, 20, 30 as in the test above.
    text = markdown(results)
    assert "| recipe | seeds | accuracy % by seed | mean % | paired difference to control | p |" in text
    assert "| pt-sft | 3 | 40.0, 50.0, 60.0 | 50.0 ± 24.8 | - | - |" in text
    assert "| dpt-sft-dft | 3 | 50.0, 70.0, 90.0 | 70.0 ± 49.7 | +20.0 ± 24.8 | 0.074 |" in text
    assert "<td>+20.0 ± 24.8</td><td>0.074</td>" in page(results)
    assert "| pt-sft (seed 1) | 50.0 ± " in text  # the single rows stay


def test_kinds_are_averaged_over_seeds(make_run: Writer) -> None:
    # Kinds alternate: of the first 8, 10 and 12 questions half are of each, so 40, 50 and 60 % of the ten.
    text = markdown(collect(three_seeds(make_run, (2, 4, 6))))
    assert "| kind | questions | majority % | pt-sft % | dpt-sft-dft % |" in text
    assert "| count | 10 | 30.0 | 50.0 | 70.0 |" in text
    assert "Of several seeds the means." in text


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((2, 4, 6), "No difference seen: over 3 seeds"),
        ((4, 5, 6), "Distillation helps here: over 3 seeds"),
        ((-4, -5, -6), "Distillation hurts here: over 3 seeds"),
    ],
)
def test_the_headline_judges_by_the_seeds(make_run: Writer, gains: tuple[int, int, int], verdict: str) -> None:
    lines = headline(collect(three_seeds(make_run, gains))).splitlines()
    assert lines[0].startswith(verdict)
    assert len(lines) == 4
    assert not any("No difference" in line or "Distillation" in line for line in lines[1:])


def test_the_headline_states_interval_and_p_over_seeds(make_run: Writer) -> None:
    # Differences 20, 25, 30: deviation 5, half-width 12.4, t = 25 sqrt(3) / 5, p = 1 - sqrt(75 / 77).
    words = "by +25.0 points on average (95 % interval +12.6 to +37.4, p = 0.013)."
    assert words in headline(collect(three_seeds(make_run, (4, 5, 6))))


def test_only_runs_of_one_seed_are_paired(make_run: Writer) -> None:
    runs = [make_run("control", {"pt-sft": flags(10, 20)}, seed=1)]
    runs += [make_run(f"s{seed}", {"dpt-sft-dft": flags(12 + seed, 20)}, seed=seed) for seed in (0, 1, 2)]
    results = collect(runs)
    assert seed_difference(results, results.models["dpt-sft-dft"]) is None  # one pair has no spread
    assert "| dpt-sft-dft | 3 | 60.0, 65.0, 70.0 | 65.0 ± 12.4 | - | - |" in markdown(results)
    assert "| pt-sft | 1 | 50.0 | - | - | - |" in markdown(results)
    assert "over 3 seeds" not in headline(results)


def test_one_seed_has_no_table_over_seeds(make_run: Writer) -> None:
    results = collect([make_run("a", {"pt-sft": flags(10, 20), "dpt-sft-dft": flags(12, 20)})])
    for text in (markdown(results), page(results)):
        assert "Over seeds" not in text
        assert "Of several seeds" not in text


def test_all_seeds_of_a_recipe_share_a_colour(make_run: Writer) -> None:
    text = page(collect(three_seeds(make_run, (2, 4, 6))))
    assert all(f'<i class="hue1"></i>{label}</li>' in text for label in ("dpt-sft-dft", "s0", "s1", "s2"))
    assert "hue2" not in text.split("</style>")[1]


def test_a_run_without_a_model_of_its_own_has_no_colour(make_run: Writer) -> None:
    text = page(collect([make_run("a", {"teacher": flags(1, 2)}), make_run("b", {"pt-sft": flags(1, 2)})]))
    assert '<i class=""></i>a</li>' in text
    assert '<i class="hue1"></i>b</li>' in text


def test_equal_accuracies_still_show_each_seed(make_run: Writer) -> None:
    runs = [make_run(f"s{seed}", {"pt-sft": flags(10, 20)}, seed=seed) for seed in (0, 1)]
    edit_row(runs[1], 0, steps=31)
    assert "| pt-sft | 2 | 50.0, 50.0 | - | - | - |" in markdown(collect(runs))
