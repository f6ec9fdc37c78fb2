import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from multistage_diffusion.noise.schedules import LogNormal
from multistage_diffusion.noise.stages import Stages, StagesError

INF = math.inf


def test_assign_intervals_are_open_below_and_closed_above():
    stages = Stages.edm()
    for boundary, below in ((2.5103, 0), (7.6577, 1)):
        assert stages.assign(boundary) == below
        assert stages.assign(np.nextafter(boundary, 0)) == below
        assert stages.assign(np.nextafter(boundary, INF)) == below + 1


def test_assign_zero_and_infinity_belong_to_the_outer_stages():
    assert Stages.edm().assign(0.0) == 0
    assert Stages.edm().assign(INF) == 2


def test_assign_keeps_shape_and_kind():
    stages = Stages.edm()
    tensor = stages.assign(torch.tensor([[0.1, 3.0], [80.0, 2.0]]))
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == [[0, 1], [2, 0]]
    array = stages.assign(np.array([0.1, 3.0]))
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.int64
    assert isinstance(stages.assign(1), int)
    assert stages.assign(torch.tensor(9.0)).shape == ()
    assert stages.assign(torch.empty(0)).shape == (0,)


def test_assign_unions_in_any_order():
    stages = Stages([[(5, INF), (0, 1)], [(1, 2)], [(2, 5)]])
    assert stages.assign(np.array([0, 1, 1.5, 2, 2.5, 5, 5.5])).tolist() == [0, 0, 1, 1, 2, 2, 0]


def test_neighbouring_intervals_of_a_stage_are_merged():
    assert Stages([[(1, 2), (0, 1)], [(2, INF)]]) == Stages.from_boundaries([0, 2, INF])


@pytest.mark.parametrize("value", [math.nan, -1.0, -math.inf])
def test_assign_rejects_what_is_no_noise_level(value):
    with pytest.raises(ValueError, match=str(value)):
        Stages.edm().assign(torch.tensor([1.0, value]))


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ([], "at least one stage"),
        ([[(0, 1)], []], "stage 1 is empty"),
        ([[(0, 2)], [(2, 1)], [(1, INF)]], r"stage 1 has the interval \(2, 1\]"),
        ([[(0, 2)], [(2, 2)], [(2, INF)]], r"stage 1 has the interval \(2, 2\]"),
        ([[(0, 3)], [(2, INF)]], r"\(0, 3\] of stage 0 and \(2, inf\] of stage 1 overlap"),
        ([[(0, 2)], [(3, INF)]], r"gap: \(2, 3\] is in no stage"),
        ([[(0.1, 2)], [(2, INF)]], "stage 0 begins at 0.1"),
        ([[(0, 2)], [(2, 80)]], "stage 1 ends at 80"),
        ([[(0, math.nan)], [(2, INF)]], r"stage 0 has the interval \(0, nan\]"),
        ([[(0, "x")]], "'x' is not a number"),
        ([[0, 1]], "stage 0: an interval is a pair"),
        ([[(0, 1, 2)]], r"stage 0: an interval is a pair \(low, high\), got \(0, 1, 2\)"),
        ([["ab"]], "stage 0: an interval is a pair .*, got 'ab'"),
        ([[None]], "stage 0: an interval is a pair .*, got None"),
        ([5], "stage 0 must be a list of intervals .*, got 5"),
        ([{"low": 0}], "stage 0 must be a list of intervals .*, got {'low': 0}"),
        (None, "stages must be a list of stages, got None"),
        (torch.tensor(1.0), "stages must be a list of stages"),
        ([[(0, 10**400)]], "is not a number"),
    ],
)
def test_bad_stages_are_named(intervals, message):
    with pytest.raises(StagesError, match=message):
        Stages(intervals)


def test_other_variables_have_their_own_ends():
    assert Stages.from_boundaries([0, 0.442, 0.6308, 1], "t").assign(0.5) == 1
    with pytest.raises(StagesError, match="cover 0 to 1"):
        Stages.from_boundaries([0, 0.5, 2], "t")
    assert len(Stages.from_boundaries([-3, 0, 3], "log_snr")) == 2
    with pytest.raises(StagesError, match="needs stages of 'sigma', got stages of 't'"):
        Stages.single("t").require_variable("sigma", "sampler")


@pytest.mark.parametrize(
    "stages",
    [
        Stages.edm(),
        Stages.single(),
        Stages([[(5, INF), (0, 1)], [(1, 5)]]),
        Stages.from_boundaries([-INF, 0, INF], "log_snr"),
    ],
)
def test_json_round_trip(stages, tmp_path):
    stages.save(tmp_path / "stages.json")
    assert Stages.load(tmp_path / "stages.json") == stages
    strict = json.loads((tmp_path / "stages.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert Stages.from_json(strict) == stages


def test_load_names_the_file(tmp_path):
    path = tmp_path / "stages.json"
    with pytest.raises(StagesError, match="cannot read"):
        Stages.load(path)
    path.write_text('{"stages": [[[0, 1]], [[2, "inf"]]]}')
    with pytest.raises(StagesError, match=r"stages\.json.*gap"):
        Stages.load(path)
    path.write_text("{")
    with pytest.raises(StagesError, match=r"stages\.json"):
        Stages.load(path)
    path.write_text('{"boundaries": [0, 2.5103, 7.6577, "inf"]}')
    assert Stages.load(path) == Stages.edm()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"stages": null}', "stages must be a list of stages, got None"),
        ('{"stages": [5]}', "stage 0 must be a list of intervals"),
        ('{"stages": [[null]]}', "an interval is a pair"),
        ('{"boundaries": 5}', "boundaries must be a list of numbers, got 5"),
        ('{"boundaries": "0,1"}', "boundaries must be a list of numbers, got '0,1'"),
        ('{"boundaries": [0, [1], "inf"]}', r"\[1\] is not a number"),
        ('{"boundaries": [0, "inf"], "variable": null}', "variable must be a name such as sigma, got None"),
        ("5", 'expected an object with "stages" or "boundaries", got 5'),
    ],
)
def test_load_names_what_is_wrong_in_the_file(tmp_path, text, message):
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(StagesError, match=rf"stages\.json: stages: .*{message}"):
        Stages.load(tmp_path / "stages.json")


def test_save_replaces_a_file_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "stages.json"
    Stages.edm().save(path)
    before, write_text = path.read_text(), Path.write_text

    def interrupted(self, text):
        write_text(self, text[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(OSError, match="No space left"):
        Stages.single().save(path)
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_probabilities_of_the_edm_stages():
    # Published: 0.961 / 0.035 / 0.004.
    p = Stages.edm().probabilities(LogNormal())
    assert [round(v, 3) for v in p] == [0.961, 0.035, 0.004]
    assert math.fsum(p) == pytest.approx(1, abs=1e-15)


def test_probabilities_of_a_union_are_the_sum_of_its_parts():
    distribution = LogNormal(0.3, 0.7)
    parts = Stages.from_boundaries([0, 1, 2, 5, INF]).probabilities(distribution)
    union = Stages([[(0, 1), (2, 5)], [(1, 2), (5, INF)]]).probabilities(distribution)
    assert union == pytest.approx((parts[0] + parts[2], parts[1] + parts[3]), abs=1e-15)


def test_probabilities_keep_their_accuracy_in_the_far_tail():
    # Q(z) for z = 20, from the asymptotic series of the complementary error function to 1e-6.
    z = 20.0
    q = math.exp(-z * z / 2) / (z * math.sqrt(2 * math.pi)) * (1 - 1 / z**2 + 3 / z**4 - 15 / z**6)
    stages = Stages.from_boundaries([0, math.exp(z), INF])
    assert stages.probabilities(LogNormal(0, 1))[1] == pytest.approx(q, rel=1e-5)
