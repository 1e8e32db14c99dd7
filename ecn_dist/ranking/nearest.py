"""The nearest gallery pictures of a few queries, exactly, or from candidates that a FAISS index proposes.

Features are of unit length, so that the order of squared distances 2 - 2 q.g is that of dot products. A quick float32
product proposes candidates; float64 distances of these alone decide. Equal distances keep gallery order.

Shape letters: Q queries, G gallery pictures, C feature length, n candidates, T matches.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ecn_dist.errors import UserError

CHUNK_BYTES = 64 * 2**20  # of candidates as float64
LENGTH_TOLERANCE = 0.02  # half-precision features are of unit length only roughly
MORE = 4  # times as many candidates, where equals may have been left out


@dataclass(frozen=True)
class Matches:
    """The matches of one query, nearest first."""

    rows: np.ndarray  # (T,) int64, rows of the gallery
    distances: np.ndarray  # (T,) float64, Euclidean


class Proposals(Protocol):
    """Where candidates come from."""

    def propose(self, query_C: np.ndarray, top: int) -> np.ndarray:
        """(n,) rows among which the `top` nearest are, in any order."""


class ExactSearch:
    """Every gallery picture is looked at."""

    def __init__(self, gallery_GC: np.ndarray) -> None:
        self.gallery = check_features("gallery", gallery_GC)

    def propose(self, query_C: np.ndarray, top: int) -> np.ndarray:
        products_G = self.gallery @ query_C
        if top >= len(products_G):
            return np.arange(len(products_G))
        threshold = np.partition(products_G, -top)[-top]
        return np.flatnonzero(products_G >= threshold - rounding(len(query_C)))


class FaissSearch:
    """Candidates from a FAISS index: of `Flat` surely the nearest, of other kinds probably and more quickly.

    `factory` is FAISS's own description of an index, as `Flat`, `HNSW32` or `IVF1024,Flat`. Indexes that learn from
    the gallery do so here. Raises `UserError` where faiss is not installed or does not know the description.
    """

    def __init__(self, gallery_GC: np.ndarray, factory: str = "Flat") -> None:
        self.gallery = check_features("gallery", gallery_GC)
        faiss = _import_faiss()
        try:
            self._index = faiss.index_factory(self.gallery.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
            if not self._index.is_trained:
                self._index.train(self.gallery)
            self._index.add(self.gallery)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"--index faiss:{factory}: FAISS makes no such index of {len(self.gallery)} features of length "
                f"{self.gallery.shape[1]} ({reason}); try faiss:Flat or faiss:HNSW32"
            ) from error

    def propose(self, query_C: np.ndarray, top: int) -> np.ndarray:
        wanted = min(MORE * top, len(self.gallery))
        while True:
            products, rows = self._index.search(query_C[None], wanted)
            products_n, rows_n = products[0][rows[0] >= 0], rows[0][rows[0] >= 0]
            last_is_worse = len(rows_n) > top and products_n[-1] < products_n[top - 1] - rounding(len(query_C))
            if last_is_worse or len(rows_n) < wanted or wanted == len(self.gallery):
                return rows_n
            wanted = min(MORE * wanted, len(self.gallery))


def nearest(search: ExactSearch | FaissSearch, queries_QC: np.ndarray, top: int) -> list[Matches]:
    """The `top` nearest gallery pictures of each query (fewer where the gallery has fewer), nearest first."""
    if top < 1:
        raise UserError(f"--top: {top} must be 1 or more")
    queries_QC = check_features("query", queries_QC)
    if queries_QC.shape[1] != search.gallery.shape[1]:
        lengths = f"{queries_QC.shape[1]} and {search.gallery.shape[1]}"
        raise UserError(f"features of query and gallery have different lengths, {lengths}: they are of two models")
    return [_ordered(search.gallery, query_C, search.propose(query_C, top), top) for query_C in queries_QC]


def rounding(feature_length: int) -> float:
    """How far the float32 products of two pairs of unit vectors may stand in the wrong order, in any order of sums.

    Each is off by at most C u (Higham 2002, equation 3.5, with |q| |g| = 1); doubled for lengths that are not quite 1.
    """
    unit_roundoff = float(np.finfo(np.float32).eps) / 2
    return 2 * 2 * feature_length * unit_roundoff


def check_features(name: str, features: np.ndarray) -> np.ndarray:
    """(n, C) float32 of unit length to float32's rounding. Raises `UserError` where they were not so roughly before."""
    features = np.ascontiguousarray(features, dtype=np.float32)
    lengths_n = np.sqrt(np.einsum("nc,nc->n", features, features))
    wrong = np.flatnonzero(~(np.abs(lengths_n - 1) <= LENGTH_TOLERANCE))  # so written, NaN is wrong too
    if len(wrong):
        length = float(lengths_n[wrong[0]])
        raise UserError(
            f"{name} features must be of length 1; that of row {wrong[0]} is {length:.3g}. Embed the pictures again"
        )
    return features / lengths_n[:, None]


def _ordered(gallery_GC: np.ndarray, query_C: np.ndarray, candidates_n: np.ndarray, top: int) -> Matches:
    rows_n = np.sort(candidates_n).astype(np.int64)
    chunk = max(1, CHUNK_BYTES // (8 * len(query_C)))
    distances_n = np.concatenate(
        [np.empty(0)]
        + [
            np.linalg.norm(gallery_GC[rows_n[start : start + chunk]].astype(np.float64) - query_C, axis=1)
            for start in range(0, len(rows_n), chunk)
        ]
    )
    order = np.argsort(distances_n, kind="stable")[:top]
    return Matches(rows_n[order], distances_n[order])


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "--index faiss needs the package faiss, which is not installed: pip install 'ecn_dist[search]'"
        ) from error
    return faiss
