"""Image filters that corruptions are made of, for batches (N, C, H, W) or (N, H, W) of square images: blurs, zooms, edges.

Each does what the routine named in its docstring does, whose border rule and kernel size decide how strong a corruption is on a
small image. Everything is tensor code; whatever is random comes from the generator passed.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def folded(index: Tensor, size: int, border: str) -> Tensor:
    """Positions outside [0, size) put inside; border: ``nearest`` aaa|abcd|ddd, ``mirror`` dcb|abcd|cba, ``symmetric``
    cba|abcd|dcb."""
    if border == "nearest":
        return index.clamp(0, size - 1)
    period = 2 * size - 2 if border == "mirror" else 2 * size
    index = index.remainder(period)
    return torch.where(index < size, index, period - index - int(border == "symmetric"))


def gaussian_weights(sigma: float, reach: int) -> Tensor:
    """A normalised Gaussian at -reach ... reach: (2 reach + 1,) float64."""
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
    return weights / weights.sum()


def gaussian(x: Tensor, sigma: float, border: str = "nearest", truncate: float = 4.0) -> Tensor:
    """Gaussian blur of the last two axes, sigma in pixels, as ``scipy.ndimage.gaussian_filter`` with its kernel and borders."""
    reach = int(truncate * sigma + 0.5)
    if reach == 0:
        return x
    size = x.shape[-1]
    rows = torch.arange(size)[:, None].expand(size, 2 * reach + 1)
    columns = folded(rows + torch.arange(-reach, reach + 1), size, border)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.index_put_((rows, columns), gaussian_weights(sigma, reach).expand(size, -1), accumulate=True)
    matrix = matrix.to(x)
    return matrix @ x @ matrix.T


def disk(radius: float, sigma: float, reach: int) -> Tensor:
    """Kernel of a lens out of focus: a disk of ``radius`` pixels, its edge softened by a Gaussian cut off at ``reach`` pixels."""
    outer = int(radius) + 1
    squares = torch.arange(-outer, outer + 1, dtype=torch.float64) ** 2
    flat = (squares[:, None] + squares <= radius**2).double()
    soft = gaussian_weights(sigma, reach)
    kernel = F.conv2d((flat / flat.sum())[None, None], torch.outer(soft, soft)[None, None], padding=2 * reach)
    return kernel[0, 0]


def filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlation of each channel of (N, C, H, W) with an odd square kernel, borders mirrored, as OpenCV's ``filter2D``."""
    pad = kernel.shape[0] // 2
    flat = F.pad(x.flatten(0, 1)[:, None], (pad,) * 4, mode="reflect")
    return F.conv2d(flat, kernel.to(x)[None, None]).view_as(x)


def zoomed(x: Tensor, factor: float) -> Tensor:
    """The middle of (N, C, H, H) enlarged ``factor`` >= 1 times to the same size, bilinear between the corners' centres."""
    size = x.shape[-1]
    part = math.ceil(size / factor)
    start, large = (size - part) // 2, round(part * factor)
    crop = x[..., start:start + part, start:start + part]
    big = F.interpolate(crop, size=(large, large), mode="bilinear", align_corners=True)
    start = (large - size) // 2
    return big[..., start:start + size, start:start + size]


def motion(x: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """Each of (N, C, H, W) smeared along its own direction (N,), by ImageMagick's ``MotionBlurImage``.

    A pixel becomes the mean of those at 0, 1 ... 2 ceil(radius) steps in that direction, weighted by the half of a Gaussian;
    steps go to the nearest pixel, halves down, and outside the image is its border.
    """
    size, steps = x.shape[-1], torch.arange(2 * math.ceil(radius) + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (steps / sigma) ** 2)
    weights, angle = weights / weights.sum(), torch.deg2rad(degrees.double())
    place, here, result = torch.arange(size), torch.arange(len(x))[:, None, None], torch.zeros_like(x)
    source = x.permute(0, 2, 3, 1).contiguous()  # a pixel's channels side by side: one look-up for all
    for step, weight in zip(steps.tolist(), weights.tolist(), strict=True):
        if weight < 1e-6:
            break  # far below one part in 255
        down, right = (torch.ceil(step * part - 0.5).long()[:, None] for part in (angle.sin(), angle.cos()))
        rows, columns = ((place + shift).clamp(0, size - 1) for shift in (down, right))
        result += weight * source[here, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return result


def sampled(x: Tensor, rows: Tensor, columns: Tensor, border: str) -> Tensor:
    """Values of (N, C, H, H) at pixel coordinates ``rows`` and ``columns`` (N, H, H), bilinear.

    border: ``mirror`` or ``symmetric``, see :func:`folded`.
    """
    size, corners = x.shape[-1], border == "mirror"
    grid = torch.stack([columns, rows], -1)
    grid = 2 * grid / (size - 1) - 1 if corners else (2 * grid + 1) / size - 1
    return F.grid_sample(x, grid.to(x), mode="bilinear", padding_mode="reflection", align_corners=corners)


def box_matrix(size: int, target: int) -> Tensor:
    """(target, size): each output pixel is the mean of the input pixels whose centres lie under it: Pillow's ``BOX``."""
    scale = size / target
    width = max(scale, 1.0)
    centre = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale
    offset = (torch.arange(size, dtype=torch.float64) + 0.5 - centre) / width
    inside = ((offset > -0.5) & (offset <= 0.5)).double()
    return inside / inside.sum(1, keepdim=True)


def plasma(count: int, size: int, decay: float, generator: torch.Generator) -> Tensor:
    """Clouds (count, size, size) in [0, 1] by the diamond-square algorithm (Fournier, Fussell and Carpenter 1982) on a torus.

    size: a power of two. Noise of amplitude w^2, w = 100 at first and divided by ``decay`` >= 1 when the grid is halved.
    """
    field, step, amplitude = torch.zeros(count, size, size), size, 100.0

    def disturbed(total: Tensor) -> Tensor:
        return total / 4 + amplitude**2 * (2 * torch.rand(total.shape, generator=generator) - 1)

    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        field[:, half::step, half::step] = centres = disturbed(pairs + pairs.roll(-1, 2))
        field[:, ::step, half::step] = disturbed(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        field[:, half::step, ::step] = disturbed(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        step, amplitude = half, amplitude / decay
    low, high = field.amin((1, 2), keepdim=True), field.amax((1, 2), keepdim=True)
    return (field - low) / (high - low)


def edges(x: Tensor, low: int, high: int) -> Tensor:
    """Canny's edges (1986) of whole numbers (N, H, W) in [0, 255]: bool, as OpenCV's ``Canny`` with a 3 x 3 Sobel operator.

    A pixel is an edge where the gradient |gx| + |gy| is the largest across it and above ``high``, or above ``low`` and connected
    to such a pixel.
    """
    near = F.pad(x[:, None], (1,) * 4, mode="replicate")
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).to(x)
    across, along = F.conv2d(near, torch.stack([sobel, sobel.T])[:, None]).unbind(1)
    size = across.abs() + along.abs()
    padded, last = F.pad(size, (1,) * 4), x.shape[-1]

    def at(rows: int, columns: int) -> Tensor:
        return padded[:, 1 + rows:1 + rows + last, 1 + columns:1 + columns + last]

    flat, upright = along.abs() < math.tan(math.pi / 8) * across.abs(), along.abs() > math.tan(3 * math.pi / 8) * across.abs()
    falling = (across < 0) ^ (along < 0)
    diagonal = torch.where(falling, (size > at(-1, 1)) & (size > at(1, -1)), (size > at(-1, -1)) & (size > at(1, 1)))
    sideways, vertical = (size > at(0, -1)) & (size >= at(0, 1)), (size > at(-1, 0)) & (size >= at(1, 0))
    crest = torch.where(flat, sideways, torch.where(upright, vertical, diagonal)) & (size > low)
    found = crest & (size > high)
    while True:
        grown = crest & (F.max_pool2d(found[:, None].to(x), 3, 1, 1)[:, 0] > 0)
        if bool((grown == found).all()):
            return found
        found = grown


def distance(marked: Tensor, most: float) -> Tensor:
    """Distance in pixels of each place of (N, H, W) to the nearest ``marked`` one, at most ``most``: float32.

    Steps to the side cost 1, diagonal ones 1.4 and a knight's 2.1969, close to the Euclidean distance (Borgefors 1986, Distance
    transformations in digital images), in two passes over the rows, as OpenCV's ``distanceTransform`` with a 5 x 5 mask.
    """
    found = torch.where(marked, 0.0, float("inf")).double()
    for _ in range(2):  # from the top left, then the same upside down and back to front
        found = _from_above(found).flip(1, 2)
    return found.clamp_max(most).float()


def _from_above(found: Tensor) -> Tensor:
    side, diagonal, knight = 1.0, 1.4, 2.1969
    width, place = found.shape[2], torch.arange(found.shape[2], dtype=found.dtype)
    empty = torch.full((len(found), width + 4), float("inf"), dtype=found.dtype)
    above, higher, rows = empty, empty, []
    for row in found.unbind(1):
        near = [(above, 0, knight), (above, 1, diagonal), (above, 2, side), (above, 3, diagonal), (above, 4, knight),
                (higher, 1, knight), (higher, 3, knight)]
        best = torch.stack([row, *(line[:, start:start + width] + cost for line, start, cost in near)]).amin(0)
        best = (best - place).cummin(1).values + place  # steps to the right, all at once
        rows.append(best)
        above, higher = F.pad(best, (2, 2), value=float("inf")), above
    return torch.stack(rows, 1)


def equalised(x: Tensor) -> Tensor:
    """Histogram equalisation of whole numbers (N, H, W) in [0, 255], as OpenCV's ``equalizeHist``."""
    flat = x.flatten(1).long()
    counts = torch.zeros(len(x), 256).scatter_add_(1, flat, torch.ones(flat.shape))
    first = counts.gather(1, flat.amin(1, keepdim=True))
    spread = 255 / (flat.shape[1] - first).clamp_min(1)
    levels = torch.round((counts.cumsum(1) - first).clamp_min(0) * spread)
    constant = (first == flat.shape[1])
    return torch.where(constant, flat.to(x), levels.gather(1, flat).to(x)).view_as(x)
