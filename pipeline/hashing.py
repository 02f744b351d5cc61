"""Row identity and the hashes that break ties and draw samples: the same on any machine, whatever the workers.

A row's key is the 16-byte xxh3-128 digest of its id or of its content. Every draw in Tamis (sample, tie, random
score) is `hash64(key, seed)`: a SplitMix64 finaliser over the key's two halves and the seed, vectorised in NumPy.
Rows with the same key hash alike: they are the same content, and what separates them is their address.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

KEY = pa.binary(16)
BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)


def row_keys(values: pa.Array) -> pa.FixedSizeBinaryArray:
    """xxh3-128 of every value (string, binary, or anything that casts to string), as big-endian digests.

    `values`: n non-null values. Returns n keys of 16 bytes.
    """
    import xxhash

    if pa.types.is_large_string(values.type):
        values = values.cast(pa.large_binary())
    elif not any(check(values.type) for check in BYTES):
        values = values.cast(pa.string()).cast(pa.binary())
    # No vectorised xxh3-128 exists in Arrow, polars or NumPy; `map` over the C function costs 0.3 us a row, little
    # beside decoding the text that it hashes.
    digests = b"".join(map(xxhash.xxh3_128_digest, values.to_pylist()))
    return pa.FixedSizeBinaryArray.from_buffers(KEY, len(values), [None, pa.py_buffer(digests)])


def mix64(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser (Steele, Lea and Flood 2014), a bijection of uint64 with full avalanche."""
    with np.errstate(over="ignore"):  # arithmetic is modulo 2**64
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))


def hash64(keys: pa.FixedSizeBinaryArray, seed: int) -> np.ndarray:
    """uint64 hash of every 16-byte key under a seed; shape (n,). Uniform, independent between seeds."""
    halves = np.frombuffer(keys.buffers()[1], dtype="<u8").reshape(-1, 2)[keys.offset : keys.offset + len(keys)]
    salt = mix64(np.array([(seed * 2 + 1) & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    with np.errstate(over="ignore"):
        return mix64(mix64(halves[:, 0] + salt) ^ halves[:, 1])


def uniform(keys: pa.FixedSizeBinaryArray, seed: int) -> np.ndarray:
    """Uniform float64 in [0, 1) for every key; shape (n,)."""
    return (hash64(keys, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53
