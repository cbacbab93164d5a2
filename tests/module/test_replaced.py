"""Replacing torch's functions meets neither the patches of others nor other threads."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from tbptt_ckpt.module.replaced import ReplacedFunctions


class Base:
    def inherited(self) -> str:
        return "plain"


class Owner(Base):
    def own(self) -> str:
        return "plain"


def ours(found: Callable[..., str]) -> Callable[..., str]:
    return lambda *args: f"ours({found(*args)})"


def theirs(found: Callable[..., str]) -> Callable[..., str]:
    return lambda *args: f"theirs({found(*args)})"


@pytest.fixture
def place() -> Any:
    place: Any = ModuleType("place")
    place.f = lambda: "plain"
    return place


def test_replaced_from_the_first_region_to_the_last(place: Any) -> None:
    plain, functions = place.f, ReplacedFunctions({(place, "f"): ours})
    functions.open()
    functions.open()
    assert place.f() == "ours(plain)"
    functions.close()
    assert place.f() == "ours(plain)"
    functions.close()
    assert place.f is plain


def test_the_replacement_is_the_same_function_each_time(place: Any) -> None:
    functions, found = ReplacedFunctions({(place, "f"): ours}), []
    for _ in range(2):
        functions.open()
        found.append(place.f)
        functions.close()
    assert found[0] is found[1]


def test_a_patch_made_before_a_region_is_called_and_stays(place: Any) -> None:
    functions = ReplacedFunctions({(place, "f"): ours})
    functions.open()
    functions.close()
    patch = place.f = theirs(place.f)
    functions.open()
    assert place.f() == "ours(theirs(plain))"
    functions.close()
    assert place.f is patch


def test_a_patch_made_within_a_region_stays_and_ends_well(place: Any) -> None:
    plain, functions = place.f, ReplacedFunctions({(place, "f"): ours})
    functions.open()
    replacement = place.f
    patch = place.f = theirs(place.f)
    functions.close()
    assert place.f is patch
    functions.open()
    assert place.f() == "ours(theirs(ours(plain)))"
    functions.close()
    assert place.f is patch
    place.f = replacement  # their patch ends: what they found is put back
    functions.open()
    assert place.f() == "ours(plain)"
    functions.close()
    assert place.f is plain


def test_methods_are_put_back_where_they_were() -> None:
    own = Owner.own
    functions = ReplacedFunctions({(Owner, "own"): ours, (Owner, "inherited"): ours})
    functions.open()
    assert Owner().own() == Owner().inherited() == "ours(plain)"
    functions.close()
    assert Owner.own is own
    assert "inherited" not in vars(Owner)


def test_a_patch_of_an_inherited_method_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = ReplacedFunctions({(Owner, "inherited"): ours})
    functions.open()
    functions.close()
    monkeypatch.setattr(Owner, "inherited", theirs(Base.inherited), raising=True)
    functions.open()
    assert Owner().inherited() == "ours(theirs(plain))"
    functions.close()
    assert Owner().inherited() == "theirs(plain)"


def test_a_patch_of_an_inherited_method_ends_well() -> None:
    functions = ReplacedFunctions({(Owner, "inherited"): ours})
    functions.open()
    replacement = Owner.inherited
    Owner.inherited = theirs(Owner.inherited)  # type: ignore[method-assign]
    functions.close()
    assert Owner().inherited() == "theirs(ours(plain))"
    Owner.inherited = replacement  # type: ignore[method-assign]
    functions.open()
    assert Owner().inherited() == "ours(plain)"
    functions.close()
    assert "inherited" not in vars(Owner)


def test_what_is_left_as_it_is_has_a_name(place: Any) -> None:
    functions = ReplacedFunctions({(place, "f"): lambda found: found, (Owner, "own"): ours})
    functions.open()
    assert functions.left() == ["place.f"]
    functions.close()
