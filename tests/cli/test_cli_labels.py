"""`--labels`."""

import pytest

from tarflow_runtimes import InputError
from tarflow_runtimes.cli.labels import check_labels, label_name, parse_labels, spread

ANIMALS = ["cat", "dog", "wild"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("all", [0, 1, 2]),
        ("0,2", [0, 2]),
        ("wild, cat", [2, 0]),
        ("dog,0,null,-1", [1, 0, -1, -1]),
    ],
)
def test_names_and_numbers(text: str | None, expected: list[int] | None) -> None:
    assert parse_labels(text, classes=3, names=ANIMALS) == expected


def test_names_that_are_numbers_are_names_only() -> None:
    assert parse_labels("1,10,null", classes=3, names=["1", "10", "2"]) == [0, 1, -1]
    with pytest.raises(InputError, match="no class '0'") as caught:
        parse_labels("0", classes=3, names=["1", "10", "2"])
    assert caught.value.hint == "valid are 1, 10, 2, null, all"


@pytest.mark.parametrize("text", ["3", "-2", "cow", "cat,,dog", "", "1.0", "Cat"])
def test_wrong_labels_list_the_valid_ones(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_labels(text, classes=3, names=ANIMALS)
    assert caught.value.hint == "valid are cat, dog, wild; or 0 to 2, null, all"


def test_a_long_list_of_valid_labels_is_cut() -> None:
    with pytest.raises(InputError) as caught:
        parse_labels("cow", classes=1000, names=[f"kind {index}" for index in range(1000)])
    assert "kind 19 ... (1000 in all" in caught.value.hint
    assert len(caught.value.hint) < 300


def test_a_model_without_classes() -> None:
    assert parse_labels(None, classes=0, names=None) is None
    with pytest.raises(InputError, match="no classes"):
        parse_labels("0", classes=0, names=None)


def test_spread() -> None:
    assert spread(None, 3) is None
    assert spread([4], 3) == [4, 4, 4]
    assert spread([0, 1], 5) == [0, 1, 0, 1, 0]
    assert spread([0, 1, 2], 2) == [0, 1]


@pytest.mark.parametrize("labels", [[0], [0, 1], [0, 1, 2], [0, 1, -1, 2, 0], list(range(9))])
def test_a_label_belongs_to_the_number_of_the_image(labels: list[int]) -> None:
    assert spread(labels, 3, first_index=0) + spread(labels, 4, first_index=3) == spread(labels, 7)


def test_more_labels_than_images() -> None:
    check_labels(None, 1)
    check_labels([0, 1], 2)
    with pytest.raises(InputError, match=r"3 labels for 1 image$"):
        check_labels([0, 1, 2], 1)


def test_label_name() -> None:
    assert [label_name(1, ANIMALS), label_name(1, None), label_name(-1, ANIMALS)] == ["dog", "1", "null"]
