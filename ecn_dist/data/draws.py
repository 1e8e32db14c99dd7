"""Random numbers by address: a function of (seed, domain, purpose) and of three whole numbers, and of nothing else.

So they are the same on every rank, in every worker and after a resume. The generator is Philox4x32-10 (Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), whose counter is the address, for many addresses at a time. A
NumPy generator for every sample takes four times as long, and its orders change from one version to the next.
"""

import numpy as np

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = np.uint64(0xFFFFFFFF)
BITS = np.uint64(32)

Address = tuple[int | np.ndarray, int | np.ndarray, int | np.ndarray]


def philox(counter_4: tuple[np.ndarray, ...], key_2: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four 32-bit words for each counter of four, in uint64 arrays that broadcast with each other."""
    c0, c1, c2, c3 = counter_4
    k0, k1 = key_2
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (product1 >> BITS) ^ c1 ^ np.uint64(k0), product1 & WORD
        c2, c3 = (product0 >> BITS) ^ c3 ^ np.uint64(k1), product0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + KEY_STEPS[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


class Draws:
    """The random numbers of one purpose in one domain, independent of those of any other; `seed` is not negative.

    An address is three whole numbers below 2**32. Any of them may be an array of n, for the numbers of n addresses.
    """

    def __init__(self, seed: int, domain: str, purpose: str) -> None:
        entropy = [seed, *f"{domain}/{purpose}".encode()]
        k0, k1 = np.random.SeedSequence(entropy).generate_state(2, np.uint32).tolist()
        self._key = (k0, k1)

    def _words(self, count: int, address: Address) -> np.ndarray:
        """(n, count) uint64, each below 2**32."""
        first, second, third = (np.asarray(number, dtype=np.uint64).reshape(-1, 1) for number in address)
        blocks = np.arange(-(-count // 4), dtype=np.uint64)
        words = philox((blocks, second, third, first), self._key)
        return np.stack(np.broadcast_arrays(*words), axis=-1).reshape(-1, 4 * len(blocks))[:, :count]

    def uniforms(self, count: int, address: Address) -> np.ndarray:
        """(n, count) float64 in [0, 1), multiples of 2**-32."""
        return self._words(count, address) * 2.0**-32

    def integer(self, below: int, address: tuple[int, int, int]) -> int:
        """A whole number in [0, below)."""
        return int(_pairs(self._words(2, address))[0]) % below  # uneven by below / 2**64

    def permutation(self, count: int, address: tuple[int, int, int]) -> np.ndarray:
        """(count,) int64, a random order of 0 .. count - 1."""
        return np.argsort(_pairs(self._words(2 * count, address)), kind="stable")

    def order(self, address: Address) -> np.ndarray:
        """(n,) int64, a random order of the n addresses: each has its place from its own numbers; ties keep order."""
        return np.argsort(_pairs(self._words(2, address)), kind="stable")


def _pairs(words: np.ndarray) -> np.ndarray:
    """Each two 32-bit words as one of 64 bits."""
    high_and_low = words.reshape(-1, 2)
    return high_and_low[:, 0] << BITS | high_and_low[:, 1]
