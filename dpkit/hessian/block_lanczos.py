"""Eigenpairs at an end of the spectrum by block Lanczos, for clusters and repeated eigenvalues."""
from __future__ import annotations

import torch
from torch import Tensor

from dpkit.hessian.checks import check_whole
from dpkit.hessian.estimate import LinearOperator
from dpkit.hessian.lanczos import Eigenpairs

WIDTH = 4
"""Vectors of a block that is not given."""

ENDS = ("largest", "smallest", "magnitude")


def block_eigenpairs(op: LinearOperator, k: int, products: int, generator: torch.Generator, *, block: int | None = None,
                     tolerance: float = 0.0, which: str = "largest") -> Eigenpairs:
    """``k`` eigenpairs from the Krylov space of ``block`` random vectors, with their residual norms.

    One start vector sees one direction of each eigenspace: of eigenvalues that are equal, or as close as the products' rounding
    lets them be, it finds one, and others only once rounding has brought them in. A block finds as many of them as it is wide,
    and multiplies its vectors together (Golub and Underwood 1977, The block Lanczos method for computing eigenvalues). The
    price: for the same products its polynomials are of a degree as many times lower. Where eigenvalues are close but apart, as
    a classifier's outliers, about as many as classes (Sagun et al. 2018, arXiv 1706.04454), narrow blocks converge after fewer
    products, one vector (:func:`top_eigenpairs`) included, since the basis is kept orthogonal.

    Every new block is made orthogonal to all former ones twice. Directions that vanish are replaced by fresh random ones, so a
    space that closes goes on, and where ``products`` reach the dimension all pairs come out, as often as they occur.

    op         symmetric operator (n, n)
    k          pairs wanted, 1 to n
    products   most to spend, k to n; what does not fill a block is left unspent
    generator  CPU generator for the start block
    block      vectors multiplied together, 1 to ``products``; None: k, at most 4
    tolerance  stop once each residual ||H y - theta y|| <= tolerance x the largest |theta|; 0: spend all. A residual is a bound
               (some eigenvalue lies within it of theta), not a value that has ceased to move
    which      "largest" (algebraically), "smallest" (most negative first), or "magnitude" (largest |theta| first)

    ``residuals`` are bounds as of :func:`top_eigenpairs`; ``values`` are in the order of ``which``. Memory: as many vectors as
    products. Raises ``ValueError`` outside these ranges.
    """
    check_whole(k=k, products=products, block=1 if block is None else block)
    if not 1 <= k <= op.size:
        raise ValueError(f"k must lie in [1, {op.size}] (the dimension), got {k}")
    if not k <= products <= op.size:
        raise ValueError(f"products must lie in [{k}, {op.size}] (k and the dimension), got {products}")
    width = min(k, WIDTH) if block is None else block
    if not 1 <= width <= products:
        raise ValueError(f"block must lie in [1, {products}] (the products), got {width}")
    if tolerance < 0.0 or which not in ENDS:
        raise ValueError(f"tolerance must be >= 0 and which one of {', '.join(ENDS)}, got {tolerance} and {which!r}")
    if products < op.size and products // width * width < k:
        raise ValueError(f"products must hold {-(-k // width)} whole blocks of {width} to give {k} pairs, got {products}; "
                         "allow more or take a narrower block")
    space = _Space(op, products)
    fresh = space.orthonormal(space.random(width, generator))
    while True:
        rest = space.extend(fresh)
        found = space.ritz(rest, len(fresh), min(k, space.count), which)
        done = space.count >= k and bool((found.residuals <= tolerance * space.largest).all())
        room = min(width, op.size - space.count)
        if done or room == 0 or space.count + room > products:
            return found
        fresh = space.next(rest, room, generator)


class _Space:
    """An orthonormal basis (rows), what H does within it, and the eigenpairs that it holds."""

    def __init__(self, op: LinearOperator, most: int) -> None:
        self.op, self.count, self.scale, self.largest = op, 0, 0.0, 0.0
        self._basis = torch.empty(most, op.size, dtype=op.dtype, device=op.device)
        self._within = torch.zeros(most, most, dtype=torch.float64)

    @property
    def floor(self) -> float:
        """Length below which what is left of a product is rounding."""
        return self.op.size**0.5 * torch.finfo(self.op.dtype).eps * self.scale

    def random(self, rows: int, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(rows, self.op.size, generator=generator, dtype=torch.float64)
        return drawn.to(self._basis)

    def orthonormal(self, rows: Tensor) -> Tensor:
        """``rows`` made orthogonal to the basis and to each other, twice over."""
        known = self._basis[:self.count]
        for _ in range(2):
            rows = torch.linalg.qr((rows - (rows @ known.T) @ known).T)[0].T
        return rows

    def extend(self, rows: Tensor) -> Tensor:
        """Take in orthonormal ``rows`` (r, n); what H makes of them outside the basis, as columns (n, r)."""
        start, stop = self.count, self.count + len(rows)
        self._basis[start:stop], self.count = rows, stop
        images = self.op.matmat(rows.T).T
        self.scale = max(self.scale, float(images.norm(dim=1).max()))
        known = self._basis[:stop]
        for _ in range(2):
            along = images @ known.T
            self._within[start:stop, :stop] += along.double().cpu()
            images = images - along @ known
        block = self._within[start:stop, start:stop]
        self._within[start:stop, start:stop] = (block + block.T) / 2
        # Symmetric by H itself; the columns of former blocks were filled with what those blocks could not see yet.
        self._within[:start, start:stop] = self._within[start:stop, :start].T
        return images.T

    def ritz(self, rest: Tensor, rows: int, k: int, which: str) -> Eigenpairs:
        """The ``k`` pairs of the space at the end ``which``; ``rest`` (n, rows) is what the last block's images have outside."""
        values, vectors = torch.linalg.eigh(self._within[:self.count, :self.count])
        key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
        chosen = torch.argsort(key, stable=True)[:k]
        self.largest = float(values.abs().max())
        values, vectors = values[chosen], vectors[:, chosen]
        # A product with R keeps its digits where Q R v is a small difference of large columns.
        triangle = torch.linalg.qr(rest, mode="r")[1].double().cpu()
        residuals = (triangle @ vectors[-rows:]).norm(dim=0).clamp_min(self.floor)
        full = self._basis[:self.count].T @ vectors.to(self._basis)
        return Eigenpairs(values, full / full.norm(dim=0), residuals, self.count)

    def next(self, rest: Tensor, room: int, generator: torch.Generator) -> Tensor:
        """Up to ``room`` new directions (r, n): those of ``rest`` that are not rounding, then random ones."""
        basis, triangle = torch.linalg.qr(rest)
        left, sizes, _ = torch.linalg.svd(triangle.double())
        kept = left[:, sizes > self.floor][:, :room].to(basis)
        rows = (basis @ kept).T
        return self.orthonormal(torch.cat([rows, self.random(room - len(rows), generator)]))
