"""Random numbers by address: a function of (seed, domain, purpose) and of three whole numbers, and of nothing else.

So a sample's augmentation, or the order of a window, is the same on every rank, in every worker and after a resume,
and nothing needs to be remembered to draw it again. The generator is Philox (Salmon et al., "Parallel Random Numbers:
As Easy as 1, 2, 3", SC 2011), whose counter is the address. Only its raw output is used, which NumPy promises not to
change from one version to the next, as it does not promise for `Generator.permutation` and the like.
"""

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import DTypeLike


class _Key(ISeedSequence):
    """Philox's key as a seed sequence: given as a plain `key`, NumPy also asks the system for entropy, and drops it."""

    def __init__(self, words_2: np.ndarray) -> None:
        self.words_2 = words_2

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint32) -> np.ndarray:
        assert (n_words, dtype) == (2, np.uint64)
        return self.words_2


class Draws:
    """The random numbers of one purpose in one domain.

    Args:
        seed: of the run, not negative.
        domain: "source" or "target"; two domains over the same shards draw independently.
        purpose: what the numbers are for; two purposes draw independently.
    """

    def __init__(self, seed: int, domain: str, purpose: str) -> None:
        entropy = [seed, *f"{domain}/{purpose}".encode()]
        self._key = _Key(np.random.SeedSequence(entropy).generate_state(2, np.uint64))

    def _raw(self, count: int, address: tuple[int, int, int]) -> np.ndarray:
        generator = np.random.Philox(self._key, counter=[0, *address])  # type: ignore[arg-type]  # any ISeedSequence
        return generator.random_raw(count)

    def uniforms(self, count: int, address: tuple[int, int, int]) -> np.ndarray:
        """(count,) float64 in [0, 1), with 53 random bits each."""
        return _uniform(self._raw(count, address))

    def uniform_rows(self, count: int, first: int, seconds_n: np.ndarray, third: int) -> np.ndarray:
        """(n, count) float64: the `uniforms` of n addresses that differ in their second number."""
        raw = np.empty((len(seconds_n), count), dtype=np.uint64)
        counter = np.array([0, first, 0, third], dtype=np.uint64)
        for row, second in zip(raw, seconds_n, strict=True):
            counter[2] = second
            row[:] = np.random.Philox(self._key, counter=counter).random_raw(count)  # type: ignore[arg-type]
        return _uniform(raw)

    def integer(self, below: int, address: tuple[int, int, int]) -> int:
        """A whole number in [0, below)."""
        return int(self._raw(1, address)[0]) % below  # the bias is below / 2**64

    def permutation(self, count: int, address: tuple[int, int, int]) -> np.ndarray:
        """(count,) int64, a random order of 0 .. count - 1."""
        return np.argsort(self._raw(count, address), kind="stable")


def _uniform(raw: np.ndarray) -> np.ndarray:
    return (raw >> np.uint64(11)) * 2.0**-53
