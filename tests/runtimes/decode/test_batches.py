"""How a batch is cut: everywhere by one rule."""

import pytest

from tarflow_runtimes.decode.batches import cut  # engines, Flow and the command line cut by it


@pytest.mark.parametrize("images", [1, 2, 3, 7, 63, 64, 65, 130, 1000])
@pytest.mark.parametrize("most", [1, 2, 5, 64, 10**9])
@pytest.mark.parametrize("parts", [0, 1, 2, 8])
def test_as_few_as_memory_and_threads_ask_for_equal_to_within_one(images: int, most: int, parts: int) -> None:
    pieces = cut(images, most, parts=parts)
    assert [image for piece in pieces for image in range(images)[piece]] == list(range(images))
    sizes = {piece.stop - piece.start for piece in pieces}
    assert 1 <= min(sizes) <= max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(pieces) == max(-(-images // most), min(images, parts))
    assert cut(0, most, parts=parts) == []
