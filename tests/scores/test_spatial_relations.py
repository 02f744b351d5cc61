"""Captions that say where things are."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scores.spatial_relations import RELATIONS, SpatialRelations

CAPTIONS = {
    "A dog to the left of a cat, in front of a red house": ["left", "front"],
    "A dog": [],
    "Two birds ABOVE the   lake and a boat below": ["above", "below"],
    "The lamp is on top of the table next to a chair": ["on", "near"],
    "Right now he has left the house on Monday": [],
    "A cat on the right side, behind the sofa": ["right", "behind"],
    "Cows in the distance, between the trees": ["far", "between"],
    "A cup inside a box in the middle of the room": ["inside"],
    "the upper right corner": ["right"],
    "nearness and behinds of belowground fronts": [],
}


def score(texts: list[str], **fields: object) -> pa.RecordBatch:
    recipe = SpatialRelations.model_validate(fields)
    return recipe._open()(pa.record_batch([pa.array(texts)], ["text"]))


def test_relations_are_found_and_other_senses_are_not() -> None:
    found = score([*CAPTIONS])
    for text, kinds, expected in zip(CAPTIONS, found["kinds"].to_pylist(), CAPTIONS.values(), strict=True):
        assert kinds == len(expected), text


def test_the_score_counts_phrases_in_octaves() -> None:
    found = score(["nothing", "a near b", "a near b, above c, far away from d", "x near y near z"])
    assert found["phrases"].to_pylist() == [0, 1, 3, 2]
    assert found["kinds"].to_pylist() == [0, 1, 3, 1]
    assert found["score"].to_pylist() == pytest.approx([0, 1, 2, np.log2(3)])
    assert score(["a near b c"], per_word=True)["score"].to_pylist() == [0.25]


def test_every_relation_has_a_caption_that_states_it_alone() -> None:
    stated = ["on the left", "on the right", "overhead", "beneath", "foreground", "behind", "beside", "far away"]
    stated += ["surrounded by", "within", "atop", "opposite"]
    found = score([f"x {phrase} y" for phrase in stated])
    assert found["kinds"].to_pylist() == [1] * len(RELATIONS)


@settings(max_examples=30)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_a_row_does_not_depend_on_the_batch(texts: list[str]) -> None:
    together = score(texts)["score"].to_pylist()
    assert together == [score([text])["score"][0].as_py() for text in texts]
    assert all(0 <= value < 7 for value in together)
