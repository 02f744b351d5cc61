"""Concatenation: documents end to end, cut wherever a sequence is full. The usual baseline of pretraining.

Every sequence is full but the last of a part, nothing is lost, and the order is kept to the token. What it trades are
whole documents: of those that would fit a sequence a good share is cut in two, whose second half has lost its beginning
(`truncated`; bench/packing.py has the measured share).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from pipeline.output.pack.base import Pack, Pieces


class Concat(Pack):
    kind: Literal["concat"] = "concat"
    shuffle: bool = Field(False, description="shuffle the sequences of a window")

    @property
    def mixes(self) -> bool:
        return self.shuffle

    def place(self, lengths: np.ndarray, last: bool) -> Pieces:
        end = np.cumsum(lengths)
        start = end - lengths
        first, final = start // self.length, (end - 1) // self.length
        count = final - first + 1
        document = np.repeat(np.arange(len(lengths)), count)
        sequence = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count) + first[document]
        begin = np.maximum(start[document], sequence * self.length)
        stop = np.minimum(end[document], (sequence + 1) * self.length)
        if not last:
            sequence = np.where(sequence == end[-1] // self.length, -1, sequence)
        return Pieces(document, begin - start[document], stop - begin, sequence)
