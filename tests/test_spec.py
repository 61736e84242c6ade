"""Specifications: lossless coercion, one canonical form, command-line words, and errors of one line."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dpkit.spec import Spec, canonical_json, coerce, later, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Spec):
    amount: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Spec):
    rate: float = 0.1
    count: int = 3
    name: str = "a"
    flag: bool = False
    shares: tuple[float, ...] = (0.5,)
    limit: int | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)

    def check(self):
        self.require(self.count >= 1, f"count must be >= 1, got {self.count}")
        self.one_of("name", ("a", "b"))
        self.between("rate", 0, 10, open_low=True)


@pytest.mark.parametrize(
    "one, other",
    [
        ({"rate": 1}, {"rate": 1.0}),
        ({"count": 2}, {"count": 2.0}),
        ({"shares": [1, 0]}, {"shares": (1.0, 0.0)}),
        ({"limit": 4.0}, {"limit": 4}),
        ({"inner": {"amount": 1}}, {"inner": Inner(amount=1.0)}),
        ({}, {"rate": 0.1, "limit": None}),
    ],
)
def test_equal_values_have_one_canonical_form(one, other):
    assert Example(**one) == Example(**other)
    assert canonical_json(Example(**one).to_dict()) == canonical_json(Example(**other).to_dict())


def test_canonical_form_holds_every_field_and_its_declared_type():
    found = Example(rate=2, shares=[1]).to_dict()
    assert found == {
        "rate": 2.0,
        "count": 3,
        "name": "a",
        "flag": False,
        "shares": [1.0],
        "limit": None,
        "inner": {"amount": 0.5},
    }
    assert type(found["rate"]) is float
    assert type(found["count"]) is int
    assert type(found["shares"][0]) is float
    assert canonical_json(found) == (
        '{"count":3,"flag":false,"inner":{"amount":0.5},"limit":null,"name":"a","rate":2.0,"shares":[1.0]}'
    )


def test_a_dictionary_gives_the_spec_back():
    spec = Example(rate=2, shares=[0.25, 0.75], limit=7, inner={"amount": 0.125})
    assert Example(**spec.to_dict()) == spec


def test_different_values_have_different_forms():
    forms = {
        canonical_json(Example(**change).to_dict())
        for change in (
            {},
            {"rate": 0.2},
            {"count": 4},
            {"name": "b"},
            {"flag": True},
            {"shares": []},
            {"limit": 0},
            {"inner": {"amount": 0.25}},
        )
    }
    assert len(forms) == 8


@pytest.mark.parametrize(
    "change, line",
    [
        ({"rate": "0.1"}, r"^rate must be a number, got '0\.1' \(str\)$"),
        ({"rate": True}, r"^rate must be a number, got True \(bool\)$"),
        ({"rate": None}, r"^rate must be a number, got None"),
        ({"rate": math.inf}, r"^rate must be a finite number, got inf"),
        ({"rate": math.nan}, r"^rate must be a finite number, got nan"),
        ({"count": 2.5}, r"^count must be a whole number, got 2\.5 \(float\)$"),
        ({"count": True}, r"^count must be a whole number, got True"),
        ({"count": math.inf}, r"^count must be a whole number, got inf"),
        ({"name": 3}, r"^name must be text, got 3 \(int\)$"),
        ({"flag": 1}, r"^flag must be true or false, got 1 \(int\)$"),
        ({"shares": 0.5}, r"^shares must be a list of a number, got 0\.5"),
        ({"shares": ["x"]}, r"^shares must be a number, got 'x'"),
        ({"limit": "many"}, r"^limit must be a whole number, got 'many'"),
        ({"inner": 3}, r"^inner must be Inner, got 3"),
        ({"count": 0}, r"^count must be >= 1, got 0$"),
        ({"name": "c"}, r"^name must be one of a, b; got 'c'$"),
        ({"rate": 0}, r"^rate must lie in \(0, 10\], got 0$"),
        ({"rate": 11}, r"^rate must lie in \(0, 10\], got 11$"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(change, line):
    with pytest.raises(ValueError, match=line) as caught:
        Example(**change)
    assert "\n" not in str(caught.value)


def test_a_replacement_is_validated_and_the_original_is_frozen():
    spec = Example()
    assert spec.replace(count=5.0).count == 5
    with pytest.raises(ValueError, match="count must be >= 1"):
        spec.replace(count=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.count = 4


@pytest.mark.parametrize(
    "text, kind, value",
    [
        ("1e-3", float, 0.001),
        ("1", float, 1.0),
        ("-2", int, -2),
        ("1e3", int, 1000),
        ("3.0", int, 3),
        ("yes", bool, True),
        ("False", bool, False),
        ("0", bool, False),
        ("word", str, "word"),
        ("1", str, "1"),
        ("a, b", tuple[str, ...], ("a", "b")),
        ("[2,5]", tuple[int, ...], (2, 5)),
        ("4", tuple[int, ...], (4,)),
        ("", tuple[str, ...], ()),
        ("none", int | None, None),
        ("7", int | None, 7),
        (5, float, 5.0),
        ([1, 2], tuple[int, ...], (1, 2)),
        (True, bool, True),
    ],
)
def test_words_are_read_as_the_declared_type(text, kind, value):
    found = parse("x", text, kind)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text, kind, line",
    [
        ("many", int, "x must be a whole number, got 'many'"),
        ("2.5", int, "x must be a whole number, got '2.5'"),
        ("²", int, "x must be a whole number, got '²'"),
        ("a", float, "x must be a number, got 'a'"),
        ("nan", float, "x must be a number, got 'nan'"),
        ("maybe", bool, "x must be true or false, got 'maybe' (str)"),
        ("1,b", tuple[int, ...], "x must be a whole number, got 'b'"),
        (2.5, int, "x must be a whole number, got 2.5 (float)"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line(text, kind, line):
    with pytest.raises(ValueError) as caught:
        parse("x", text, kind)
    assert str(caught.value) == line


def test_coercion_never_loses_anything():
    assert coerce("x", 2**53 + 1, int) == 2**53 + 1
    assert coerce("x", None, float | None) is None
    with pytest.raises(ValueError, match="x must be a whole number"):
        coerce("x", 0.1, int)


@pytest.mark.parametrize("value", [math.nan, math.inf, [1.0, -math.inf]])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": value})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grown(Spec):
    a: int = 1
    b: float = later(0.5, before=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Around(Spec):
    inner: Grown = dataclasses.field(default_factory=Grown)
    c: bool = later(False, before=False)


def test_a_field_that_came_later_shows_only_where_it_matters():
    assert Around().to_dict() == {"inner": {"a": 1, "b": 0.5}}, "a default that is not what was done before is said"
    assert Around(inner=Grown(b=0)).to_dict() == {"inner": {"a": 1}}
    assert Around(inner={"a": 1}, c=True).to_dict() == {"inner": {"a": 1, "b": 0.5}, "c": True}
