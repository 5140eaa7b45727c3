"""Values as checkpoints and JSON hold them: numbers are converted, the rest is refused by name."""

import collections
import datetime
import enum
import io
import json
import math
import sqlite3
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from pml_tacl.trainers.arguments import check_loss_names
from pml_tacl.utils.plain import as_json, number, plain


class Whole(enum.IntEnum):
    THREE = 3


Pair = collections.namedtuple("Pair", "a b")


def read_back(value):
    """What a checkpoint gives back."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.1), 0.10000000149011612),
        (np.float16(0.5), 0.5),
        (np.longdouble(0.25), 0.25),
        (np.int64(-3), -3),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(True), True),
        (np.complex64(1 + 2j), 1 + 2j),
        (np.str_("a"), "a"),
        (np.array(0.5), 0.5),
        (Whole.THREE, 3),
        (Path("a/b"), "a/b"),
        (collections.defaultdict(list, a=[np.int8(1)]), {"a": [1]}),
        (collections.Counter("aab"), collections.Counter("aab")),
        ({np.int64(1): (np.float64(2), None)}, {1: (2.0, None)}),
        ({"a": {"b": [{np.float32(0.5)}]}}, {"a": {"b": [{0.5}]}}),
    ],
)
def test_numbers_become_plain_ones_of_the_same_value(value, expected):
    found = read_back(plain(value))
    assert found == expected
    assert type(found) is type(expected)
    assert repr(found) == repr(expected)  # members too are Python's own


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3),
        np.arange(6.0).reshape(2, 3)[::-1, ::2],
        np.arange(3, dtype=">i4"),
        np.array([True, False]),
        np.array([1 + 1j]),
        np.array([0.5], np.longdouble),
        np.empty((0, 3), np.float16),
        np.arange(3, dtype=np.uint16),
    ],
)
def test_arrays_become_tensors(array):
    found = read_back(plain({"a": array}))["a"]
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == array.tolist()
    assert tuple(found.shape) == array.shape
    array[...] = 0
    assert plain(array) is not array


def test_tensors_keep_their_kind_and_share_no_class_of_others():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert plain([parameter])[0] is parameter
    image = tv_tensors.Image(torch.ones(3, 2, 2))
    assert type(plain(image)) is torch.Tensor
    assert torch.equal(read_back(plain(image)), torch.ones(3, 2, 2))


def test_equal_states_are_equal_files():
    files = []
    for keys in (("rate", "rate"), ("rate", "".join(["ra", "te"]))):
        file = io.BytesIO()
        torch.save(plain({"a": {keys[0]: 1}, "b": {keys[1]: 2}}), file)
        files.append(file.getvalue())
    assert files[0] == files[1]


def test_a_state_dict_stays_one():
    state = torch.nn.BatchNorm2d(2).state_dict()
    found = read_back(plain(state))
    assert found._metadata == state._metadata
    assert list(found) == list(state)


@pytest.mark.parametrize(
    ("value", "where", "kind"),
    [
        ({"a": [0, datetime.datetime(2026, 1, 1)]}, r"extra\['a'\]\[1\]", r"datetime\.datetime"),
        (np.datetime64("2026-01-01"), "extra", r"numpy\.datetime64"),
        (np.timedelta64(1, "s"), "extra", r"numpy\.timedelta64"),
        (np.array(["a"]), "extra", "an array of <U1"),
        (np.ma.array([1, 2], mask=[0, 1]), "extra", "a masked array"),
        ({"rng": np.random.default_rng(0)}, r"extra\['rng'\]", r"numpy\.random\._generator\."),
        (frozenset({1}), "extra", "frozenset"),
        (Pair(1, 2), "extra", "Pair"),
        (Fraction(1, 3), "extra", r"fractions\.Fraction"),
        (lambda: 0, "extra", "function"),
        (2**3000, "extra", "too large"),
        ({Path("a"): 1, "a": 2}, "extra", "has the key 'a'"),
        ({frozenset(): 1}, "a key of extra", "frozenset"),
    ],
)
def test_the_rest_is_refused_by_name_and_type(value, where, kind):
    with pytest.raises(TypeError, match=f"^{where} .*{kind}"):
        plain(value, "extra")


def test_what_holds_itself_or_is_too_deep_is_refused():
    loop = {"a": []}
    loop["a"].append(loop)
    with pytest.raises(TypeError, match=r"extra\['a'\]\[0\] contains itself"):
        plain(loop, "extra")
    shared = [1]
    assert plain([shared, shared]) == [[1], [1]]
    deep = 1
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(TypeError, match="extra is nested too deep"):
        plain(deep, "extra")


@pytest.mark.parametrize(
    "value",
    [0.5, np.float64(0.5), np.float32(0.5), np.array(0.5), np.array([[0.5]]), torch.tensor(0.5),
     torch.tensor([0.5], requires_grad=True), torch.tensor(0.5, dtype=torch.bfloat16)],
)  # fmt: skip
def test_a_metric_is_a_float(value):
    found = number(value, "test(0)['recall']")
    assert (found, type(found)) == (0.5, float)


@pytest.mark.parametrize("value", [None, "0.5", [0.5], np.ones(2), torch.ones(0), 1j, {}, object()])
def test_what_is_no_number_is_named(value):
    with pytest.raises(TypeError, match=r"^test\(0\)\['recall'\] must be (a|one) number, got "):
        number(value, "test(0)['recall']")


# What people put into extra, learning rates and metrics.
_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.binary(max_size=5), st.complex_numbers(),
    st.floats(width=16).map(np.float16), st.floats(width=32).map(np.float32),
    st.floats().map(np.float64), st.booleans().map(np.bool_), st.floats().map(np.longdouble),
    st.integers(-128, 127).map(np.int8), st.integers(0, 2**64 - 1).map(np.uint64),
    st.integers(-(2**63), 2**63 - 1).map(np.int64), st.text(max_size=3).map(np.str_),
    st.just(Whole.THREE), st.floats(width=32).map(torch.tensor),
    st.lists(st.integers(-100, 100), max_size=3).map(np.array),
    st.lists(st.floats(width=32), max_size=3).map(lambda v: np.array(v, ">f4")),
)  # fmt: skip
_keys = st.one_of(st.text(max_size=3), st.integers(-3, 3), st.integers(-3, 3).map(np.int64))
_values = st.recursive(
    _scalars,
    lambda each: st.one_of(
        st.lists(each, max_size=3),
        st.lists(each, max_size=3).map(tuple),
        st.dictionaries(_keys, each, max_size=3),
        st.dictionaries(_keys, each, max_size=3).map(collections.OrderedDict),
        st.dictionaries(_keys, each, max_size=3).map(lambda d: collections.defaultdict(list, d)),
    ),
    max_leaves=6,
)


def alike(found, value):
    """Whether a plain value says what the other one said."""
    if isinstance(value, np.ndarray | torch.Tensor):
        expected = torch.as_tensor(np.array(value, value.dtype.newbyteorder("="))) if isinstance(
            value, np.ndarray) else value  # fmt: skip
        return torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    if isinstance(value, dict):
        return len(found) == len(value) and all(
            alike(found[key], each) for key, each in value.items()
        )
    if isinstance(value, list | tuple):
        return type(found) is type(value) and all(map(alike, found, value))
    if isinstance(value, bytes) and not value:
        return found == value
    if type(found) not in (type(None), bool, int, float, complex, str, bytes):
        return False
    return found == value or (found != found and value != value)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(_values)
def test_whatever_is_kept_comes_back_equal(value):
    assert alike(read_back(plain(value)), value)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(_values)
def test_whatever_json_takes_is_json(value):
    try:
        made = as_json(value)
    except TypeError:
        return  # it holds a tensor, bytes or a complex number

    def refuse(constant):
        raise AssertionError(constant)

    again = json.loads(json.dumps(made, allow_nan=False), parse_constant=refuse)
    assert as_json(again) == again
    if isinstance(value, float | np.floating):
        assert again is None if not math.isfinite(value) else again == float(value)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=6), st.from_regex(r"[A-Za-z_]\w{0,8}", fullmatch=True)),
                min_size=1, max_size=3, unique=True))  # fmt: skip
def test_names_of_losses_that_pass_are_columns_tables_and_files(names):
    try:
        check_loss_names(names)
    except ValueError:
        return
    base = sqlite3.connect(":memory:")
    columns = ", ".join(f"[{name}] real" for name in ["~iteration~", *names, "total_loss"])
    base.execute(f"CREATE TABLE loss_histories (id integer primary key autoincrement, {columns})")
    for name in names:  # as record-keeper writes them
        base.execute(f"CREATE TABLE {name}_SomeLoss (id integer primary key)")
    assert all(Path(f"{name}_SomeLoss.csv").name == f"{name}_SomeLoss.csv" for name in names)
    assert len({name.casefold() for name in names}) == len(names)
