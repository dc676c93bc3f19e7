"""Each statistic of a comparison is the only one to see some error, and none of them fails what is right."""

from types import SimpleNamespace

import pytest
import torch

from moe_harness.harness.core.bounds import Bound, max_limit, rms_limit
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.compare import against_bound
from moe_harness.harness.stages.experts.cases import ExpertsCase

ROWS, COLUMNS = 128, 256
GROUPS = {f"expert {e}": torch.arange(ROWS) % 4 == e for e in range(4)}
STAGE = SimpleNamespace(
    place_of=lambda call, row, column: {"row": row, "column": column},
    row_groups=lambda call: {name: rows[: call.case.T] for name, rows in GROUPS.items()},
)


def judged(z, data="normal", value=0.0):
    """The record of a result that is `z` sigma from `value`, every sigma being one."""
    ones = torch.ones_like(z, dtype=torch.float64)
    bound = Bound(ones * value, ones, ones * 0, torch.full((len(z), 2), torch.inf))
    return against_bound(STAGE, Call(ExpertsCase(data=data, T=len(z)), {}, {}), bound, bound.value.nan_to_num(0.0) + z)


@pytest.fixture
def noise():
    return torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_errors_of_the_permitted_size_pass_and_are_counted(noise):
    record = judged(noise)
    assert not record.findings and 0 < record.worst < 1
    assert record.elements == sum(record.histogram) == ROWS * COLUMNS
    assert record.histogram[:3] == [int(((noise.abs() * 4).long() == quarter).sum()) for quarter in range(3)]


@pytest.mark.parametrize(
    ("over", "rows", "columns", "factor"),
    [
        ("all elements", slice(None), slice(None), 1.12),
        ("expert 3", GROUPS["expert 3"], slice(None), 1.15),
        ("row 77", slice(77, 78), slice(None), 1.7),
        ("column 200", slice(None), slice(200, 201), 1.9),
        ("the tile at [48, 128]", slice(48, 64), slice(128, 192), 1.4),
    ],
)
def test_each_rms_sees_what_the_others_do_not(noise, over, rows, columns, factor):
    """Within the limit of as many independent errors as it holds elements."""
    noise[rows, columns] *= factor
    (finding,) = judged(noise).findings
    part = noise[rows, columns]
    assert finding.where == {"over": over}
    assert finding.headroom == pytest.approx(float(part.square().mean().sqrt()) / rms_limit(part.numel()))


@pytest.mark.parametrize(
    ("rows", "columns", "factor"),
    [(slice(112, 115), slice(192, 199), 3.0), (slice(0, 16), slice(192, 199), 2.0)],
)
def test_tiles_cut_off_by_the_edge_have_limits_of_their_own_size(noise, rows, columns, factor):
    """[115, 199]: 3 rows and 7 columns are left for the last tiles."""
    noise[rows, columns] *= factor
    (finding,) = judged(noise[:115, :199]).findings
    part = noise[rows, columns]
    assert finding.where == {"over": f"the tile at [{rows.start}, {columns.start}]"}
    assert finding.headroom == pytest.approx(float(part.square().mean().sqrt()) / rms_limit(part.numel()))


def test_one_element_beyond_the_limit_is_seen_where_it_is(noise):
    noise *= 0.5
    noise[5, 9] = -0.99 * max_limit()
    assert not (record := judged(noise)).findings and record.worst == pytest.approx(0.99)
    noise[5, 9] = -1.01 * max_limit()
    (finding,) = judged(noise).findings
    assert finding.where == {"row": 5, "column": 9} and finding.headroom == pytest.approx(1.01)


@pytest.mark.parametrize(
    ("data", "value", "got", "words"),
    [
        ("normal", 0.0, torch.nan, "is nan, but should be 0"),
        ("normal", 0.0, torch.inf, "is inf, but should be 0"),
        ("token_nan", torch.nan, 0.0, "a NaN in the inputs reaches"),
        ("down_inf", torch.inf, 0.0, "one product is infinite"),
        ("token_inf", torch.nan, 0.0, None),  # inf - inf may be NaN or not, by the order of the sums
        ("down_inf", torch.inf, torch.nan, None),
    ],
)
def test_what_is_not_finite_is_judged_by_kind(data, value, got, words):
    z = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    z[3, 4] = got
    ones = torch.ones_like(z)
    values = ones * 0
    values[3, 4] = value
    bound = Bound(values, ones, ones * 0, torch.full((ROWS, 2), torch.inf))
    findings = against_bound(STAGE, Call(ExpertsCase(data=data, T=ROWS), {}, {}), bound, z).findings
    assert [words in finding.message for finding in findings] == ([] if words is None else [True]), findings
