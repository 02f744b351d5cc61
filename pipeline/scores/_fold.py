"""Fold a fastText classifier: the same function, in a model as small as it has labels.

Up to its last step a fastText classifier is linear: the logits are O @ mean(I[t]) over the words and n-grams t of a
text, which is mean((I @ O.T)[t]). So the input matrix I (rows x dim) and the output matrix O (labels x dim) become
I @ O.T (rows x labels) and the identity, and fastText itself does the rest: the same words, hashes and softmax. With
two labels a row is 8 bytes instead of 4 * dim, which stays in a core's cache; prediction waits for nothing but rows.

Trades away the last bits: sums of float32 are taken in another order. Measured on 47,268 documents with dim 100: scores
differ by at most 5e-6, none crosses 0.5, prediction is 1.9 times as fast (bench/quality.py), and an actor holds 11 MB
instead of 218.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import numpy as np

MAGIC, VERSION = 793712314, 12
HEADER = struct.Struct("<ii12id")
"""Magic, version and fastText's arguments: dim, ws, epoch, minCount, neg, wordNgrams, loss, model, bucket, minn, maxn,
lrUpdateRate, t."""
DICTIONARY = struct.Struct("<iiiqq")
"""What the dictionary begins with: size, words, labels, tokens, size of the pruning index."""
MATRIX = struct.Struct("<?qq")
"""What a matrix begins with: whether it is quantized, rows, columns."""
SUPERVISED, SOFTMAX, ONE_VS_ALL = 3, 3, 4
CHUNK_ROWS = 1 << 16


def fold(model: Path, folded: Path) -> bool:
    """Write the folded twin of a .bin; False, and nothing written, where there is none.

    There is none of a quantized model, of hierarchical softmax, of one whose labels are not fewer than its dimensions,
    or of another version of the format.
    """
    size = model.stat().st_size
    with open(model, "rb") as source:
        head = source.read(HEADER.size + DICTIONARY.size)
    if len(head) < HEADER.size + DICTIONARY.size:
        return False
    magic, version, *arguments = HEADER.unpack_from(head)
    dim, loss, kind, bucket = (arguments[i] for i in (0, 6, 7, 8))
    _, words, labels, _, _ = DICTIONARY.unpack_from(head, HEADER.size)
    rows = words + bucket
    output_at = size - MATRIX.size - 4 * labels * dim
    input_at = output_at - MATRIX.size - 4 * rows * dim
    if (magic, version, kind) != (MAGIC, VERSION, SUPERVISED) or loss not in (SOFTMAX, ONE_VS_ALL) or labels >= dim:
        return False
    if input_at < len(head):
        return False
    with open(model, "rb") as source:
        data = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
    expected = {input_at: (False, rows, dim), output_at: (False, labels, dim)}
    if any(MATRIX.unpack_from(data, at) != shape for at, shape in expected.items()):
        return False
    outputs = (
        np.frombuffer(data, "<f4", labels * dim, output_at + MATRIX.size).reshape(labels, dim).T.astype(np.float64)
    )
    inputs = np.frombuffer(data, "<f4", rows * dim, input_at + MATRIX.size).reshape(rows, dim)
    with open(folded, "wb") as sink:
        sink.write(HEADER.pack(magic, version, labels, *arguments[1:]))
        sink.write(data[HEADER.size : input_at])
        sink.write(MATRIX.pack(False, rows, labels))
        for start in range(0, rows, CHUNK_ROWS):
            sink.write((inputs[start : start + CHUNK_ROWS] @ outputs).astype("<f4").tobytes())
        sink.write(MATRIX.pack(False, labels, labels) + np.eye(labels, dtype="<f4").tobytes())
    return True
