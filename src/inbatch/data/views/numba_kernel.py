"""Complete views in one compiled pass on CPUs: an image stays in the processor's cache from its pixels to its view.

The computation is that of `crop`, `colour` and `filters`, operation by operation, in float32. Importing this file needs
numba and compiles the kernel (or loads it from numba's cache); `numba_backend` does so when the first view is drawn.

The code is written for the compiler's vectoriser: inner loops run over contiguous float32, select instead of branching,
and use float32 constants. Only the horizontal half of resizing has no such loop; it processes eight rows at a time as
vectors.
"""

from pathlib import Path
from typing import Any, no_type_check

import numba
import numpy as np
from llvmlite import ir
from numba import boolean, float32, int64, uint8
from numba.core import cgutils
from numba.extending import intrinsic

from inbatch.runtime.files import one_process_at_a_time

_OPTIONS: dict[str, Any] = dict(
    nogil=True,
    error_model="numpy",  # otherwise every division would be a branch
    fastmath={"contract", "nsz", "nnan", "ninf", "reassoc", "arcp"},  # no value lines is ever NaN or infinite
)
_inner = numba.njit(**_OPTIONS)

_ZERO, _HALF, _ONE, _TWO, _THREE, _FOUR, _SIX = (np.float32(x) for x in (0, 0.5, 1, 2, 3, 4, 6))
_TINY, _BYTE = np.float32(1e-12), np.float32(1 / 255)
_NEAR, _STEEP = np.float32(1.5), np.float32(2.5)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_LANES = 8
"""Rows per vector; with more, the compiler no longer transposes with shuffles."""
_WIDE = 32
"""Adjacent values of a row that are summed at once."""
_CHUNK = 1024
"""Approximate number of pixels that all operations process while they are in the first-level cache."""
_NEGLIGIBLE = 1e-8
"""Relative weight below which a tap changes no float32 in [0, 1]."""


# Resizing


@_inner
@no_type_check
def _weights(length, size, cubic, gain, mirrored, first, table):
    """Compute the first pixel and the weights, (size, taps) flat, for resizing `length` pixels to `size`; return taps.

    The centre is rounded as in torch.nn.functional.interpolate(antialias=True); the rest is exact.
    """
    scale = np.float32(length) / np.float32(size)
    sharp = 1.0 / max(scale, _ONE)  # enlarging interpolates, shrinking averages
    support = max(scale, _ONE) * (_TWO if cubic else _ONE)
    taps = min(length, int(np.ceil(_TWO * support)))
    for x in range(size):
        centre = np.float32(scale * (x + 0.5))
        low = min(max(int(centre - support + 0.5), 0), length - taps)
        at = size - 1 - x if mirrored else x
        first[at] = low
        total = _ZERO
        for k in range(taps):
            far = np.float32(abs((low + k - centre + 0.5) * sharp))
            if not cubic:
                weight = max(_ONE - far, _ZERO)
            elif far < _ONE:  # Keys 1981 with a = -1/2
                weight = (_NEAR * far - _STEEP) * far * far + _ONE
            else:
                weight = ((-_HALF * far + _STEEP) * far - _FOUR) * far + _TWO if far < _TWO else _ZERO
            table[at * taps + k] = weight
            total += weight
        for k in range(taps):
            table[at * taps + k] *= gain / total
    return taps


def _weighted_sum(lanes):
    """Build a function of (out, to, x, start, step, weights, first, taps) that adds weighted vectors of `lanes` values.

    It sets out[to : to + lanes] to the sum over k < taps of weights[first + k] x[start + k step : start + k step +
    lanes], held in registers; x is float32 or uint8. It uses LLVM vectors directly, for any processor, because LLVM's
    vectoriser does not vectorise such short loops.
    """

    @intrinsic
    @no_type_check
    def vectors(typing, out, to, x, start, step, weights, first, taps):
        vector, element = ir.VectorType(ir.FloatType(), lanes), ir.IntType(32)
        unset, broadcast = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(element, lanes), [0] * lanes)

        def generate(context, builder, signature, arguments):
            out, to, x, start, step, weights, first, taps = arguments

            def at(place, array, position, kind=None):
                data = context.make_array(signature.args[place])(context, builder, array).data
                pointer = builder.gep(data, [position])
                return pointer if kind is None else builder.bitcast(pointer, kind.as_pointer())

            total = cgutils.alloca_once(builder, vector)
            builder.store(ir.Constant(vector, [0.0] * lanes), total)
            with cgutils.for_range(builder, taps) as loop:
                position = builder.add(start, builder.mul(loop.index, step))
                if signature.args[2].dtype == float32:
                    values = builder.load(at(2, x, position, vector), align=4)
                else:
                    bytes_ = builder.load(at(2, x, position, ir.VectorType(ir.IntType(8), lanes)), align=1)
                    values = builder.uitofp(bytes_, vector)
                weight = builder.load(at(5, weights, builder.add(first, loop.index)))
                weight = builder.insert_element(unset, weight, ir.Constant(element, 0))
                product = builder.fmul(builder.shuffle_vector(weight, unset, broadcast), values, flags=("contract",))
                builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            builder.store(builder.load(total), at(0, out, to, vector), align=4)
            return context.get_dummy_value()

        return numba.void(out, to, x, start, step, weights, first, taps), generate

    return vectors


_sum_of_wide, _sum_of_narrow = _weighted_sum(_WIDE), _weighted_sum(_LANES)


@_inner
@no_type_check
def _down(pixels, start, pitch, width, weights, first, taps, line, to):
    """Set line[to : to + width] to the weighted sum of pixel rows `pitch` apart; the last vector overlaps."""
    if width >= _WIDE:
        for x in range(0, width, _WIDE):
            p = min(x, width - _WIDE)
            _sum_of_wide(line, to + p, pixels, start + p, pitch, weights, first, taps)
    elif width >= _LANES:
        for x in range(0, width, _LANES):
            p = min(x, width - _LANES)
            _sum_of_narrow(line, to + p, pixels, start + p, pitch, weights, first, taps)
    else:
        for x in range(width):
            total = _ZERO
            for k in range(taps):
                total += weights[first + k] * np.float32(pixels[start + k * pitch + x])
            line[to + x] = total


@_inner
@no_type_check
def _along(tile, start, first, weights, taps, size, out, to):
    """Compute the weighted sums of columns, each of eight adjacent pixels."""
    for x in range(size):
        _sum_of_narrow(out, to + _LANES * x, tile, start + _LANES * first[x], _LANES, weights, taps * x, taps)


@_inner
@no_type_check
def _to_columns(lines, n, tile):
    """Transpose eight lines of n: tile[8 x + j] = lines[j n + x]."""
    a, b, c, d = lines[:n], lines[n : 2 * n], lines[2 * n : 3 * n], lines[3 * n : 4 * n]
    e, f, g, h = lines[4 * n : 5 * n], lines[5 * n : 6 * n], lines[6 * n : 7 * n], lines[7 * n : 8 * n]
    for x in range(n):
        p = _LANES * x
        tile[p], tile[p + 1], tile[p + 2], tile[p + 3] = a[x], b[x], c[x], d[x]
        tile[p + 4], tile[p + 5], tile[p + 6], tile[p + 7] = e[x], f[x], g[x], h[x]


@_inner
@no_type_check
def _to_lines(tile, n, out):
    """Transpose back and clamp to [0, 1]: out[j n + x] = tile[8 x + j]."""
    a, b, c, d = out[:n], out[n : 2 * n], out[2 * n : 3 * n], out[3 * n : 4 * n]
    e, f, g, h = out[4 * n : 5 * n], out[5 * n : 6 * n], out[6 * n : 7 * n], out[7 * n : 8 * n]
    for x in range(n):
        p = _LANES * x
        a[x], b[x], c[x], d[x] = _clamp(tile[p]), _clamp(tile[p + 1]), _clamp(tile[p + 2]), _clamp(tile[p + 3])
        e[x], f[x], g[x], h[x] = _clamp(tile[p + 4]), _clamp(tile[p + 5]), _clamp(tile[p + 6]), _clamp(tile[p + 7])


@_inner
@no_type_check
def _resize(
    pixels, start, pitch, width, y, rows, first_row, down, row_taps, first_column, along, column_taps, scratch, out
):  # fmt: skip
    """Resize rows y to y + rows of a box that starts at pixels[start]; rows below the last one repeat it.

    Eight strips of rows, one below the other, are resized horizontally at once: a vector holds one pixel of each strip.
    """
    size, deep = len(first_row), rows // _LANES
    lines, tile, resized = scratch[0], scratch[1], scratch[2]
    for r in range(rows):
        row = min(y + r, size - 1)
        _down(pixels, start + pitch * first_row[row], pitch, width, down, row * row_taps, row_taps, lines, r * width)
    _to_columns(lines, deep * width, tile)
    for g in range(deep):
        columns, to = _LANES * g * width, _LANES * g * size
        _along(tile, columns, first_column, along, column_taps, size, resized, to)
    _to_lines(resized, deep * size, out)


@_inner
@no_type_check
def _copy(row, mirrored, out):
    """Copy a row that needs no resizing."""
    n = len(row)
    if mirrored:
        for x in range(n):
            out[x] = np.float32(row[n - 1 - x]) * _BYTE
    else:
        for x in range(n):
            out[x] = np.float32(row[x]) * _BYTE


# Colour


@_inner
@no_type_check
def _clamp(x):
    return min(max(x, _ZERO), _ONE)


@_inner
@no_type_check
def _blend(x, own, other):
    for i in range(len(x)):
        x[i] = _clamp(own * x[i] + other)


@_inner
@no_type_check
def _saturate(red, green, blue, luma, own):
    r, g, b = luma[0], luma[1], luma[2]
    for i in range(len(red)):
        light = (_ONE - own) * (r * red[i] + g * green[i] + b * blue[i])
        red[i] = _clamp(own * red[i] + light)
        green[i] = _clamp(own * green[i] + light)
        blue[i] = _clamp(own * blue[i] + light)


@_inner
@no_type_check
def _rotate_hue(red, green, blue, turns):
    move = _SIX * turns
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        high, low = max(max(r, g), b), min(min(r, g), b)
        chroma = high - low
        sixth = g - b if r == high else (b - r + _TWO * chroma if g == high else r - g + _FOUR * chroma)
        sixth = sixth / max(chroma, _TINY) + move  # a turn has six sectors; the value is from -4 to 8
        sixth = sixth + _SIX if sixth < _ZERO else sixth
        sixth = sixth - _SIX if sixth >= _SIX else sixth
        red[i] = _clamp(abs(sixth - _THREE) - _ONE) * chroma + low
        green[i] = _clamp(_TWO - abs(sixth - _TWO)) * chroma + low
        blue[i] = _clamp(_TWO - abs(sixth - _FOUR)) * chroma + low


@_inner
@no_type_check
def _desaturate(red, green, blue, luma):
    r, g, b = luma[0], luma[1], luma[2]
    for i in range(len(red)):
        light = r * red[i] + g * green[i] + b * blue[i]
        red[i] = light
        green[i] = light
        blue[i] = light


@_inner
@no_type_check
def _sum(x):
    total = _ZERO
    for i in range(len(x)):
        total += x[i]
    return total


@_inner
@no_type_check
def _finish(x, threshold, mean, std, out):
    """Solarise the values from the threshold on, then normalise."""
    gain, shift = _ONE / std, -mean / std
    for i in range(len(x)):
        value = _ONE - x[i] if x[i] >= threshold else x[i]
        out[i] = gain * value + shift


@_inner
@no_type_check
def _plan(kind, factors, turns, order, todo):
    """List the jitter operations in the image's order, without those that change nothing.

    Returns their number, and the position of the contrast, which needs the whole image (-1: none).
    """
    count, contrast = 0, -1
    if kind == 0:
        return count, contrast
    for k in range(4):
        if k == kind - 1 and turns != _ZERO:
            todo[count] = _HUE
            count += 1
        if k < 3 and factors[order[k]] != _ONE:
            if order[k] == _CONTRAST:
                contrast = count
            todo[count] = order[k]
            count += 1
    return count, contrast


# Blur


@_inner
@no_type_check
def _gaussian(sigma, half, kernel):
    """Compute half of a Gaussian kernel with sum 1; return the number of non-negligible taps on each side."""
    total = 0.0
    for k in range(half + 1):
        total += np.exp(-0.5 * (k / sigma) ** 2) * (1 if k == 0 else 2)
    kernel[:] = _ZERO
    used = 0
    for k in range(half + 1):
        share = np.exp(-0.5 * (k / sigma) ** 2) / total
        if share > _NEGLIGIBLE:
            kernel[k] = share
            used = k
    return used


@_inner
@no_type_check
def _scale(x, w, out):
    for i in range(len(out)):
        out[i] = w * x[i]


@_inner
@no_type_check
def _add_pairs(a, b, c, d, u, v, out):
    for i in range(len(out)):
        out[i] += u * (a[i] + b[i]) + v * (c[i] + d[i])


@_inner
@no_type_check
def _convolve(x, start, step, kernel, used, out):
    """Compute out[i] = sum_k kernel[|k|] x[start + i + k step], two taps on each side at a time."""
    n = len(out)
    _scale(x[start : start + n], kernel[0], out)
    for k in range(1, used + 1, 2):
        p, q = k * step, (k + 1) * step
        a, b = x[start - p : start - p + n], x[start + p : start + p + n]
        c, d = x[start - q : start - q + n], x[start + q : start + q + n]
        _add_pairs(a, b, c, d, kernel[k], kernel[k + 1], out)


# Complete views


@no_type_check
def _draw(
    pixels, source, boxes, mirrored, kind, factors, turns, order, grey, blurred, sigma, solarised,
    luma, mean, std, threshold, blur_taps, cubic, start, stop, out,
):  # fmt: skip
    """Draw views start to stop of all (n, c, s, s), image by image and in chunks of rows."""
    channels, size = out.shape[1], out.shape[2]
    longest = 1
    for n in range(start, stop):
        longest = max(longest, boxes[n, 2], boxes[n, 3])
    reach = int(np.ceil(longest / size)) * (4 if cubic else 2) + 1  # maximum number of taps over these views
    down, along = np.empty(size * reach, np.float32), np.empty(size * reach, np.float32)
    first_row, first_column = np.empty(size, np.int64), np.empty(size, np.int64)

    rows = max(_LANES, _CHUNK // size // _LANES * _LANES)
    scratch = np.empty((3, rows * max(longest, size)), np.float32)
    half = blur_taps // 2
    pad = half + half % 2
    edge = pad * size
    high, pitch = -(-size // rows) * rows, size + 2 * pad
    planes = np.zeros((channels, (high + 2 * pad) * size), np.float32)
    middle, padded = np.empty(rows * size, np.float32), np.zeros((rows + 1) * pitch, np.float32)
    blurry, kernel = np.empty(rows * pitch, np.float32), np.empty(pad + 2, np.float32)
    todo = np.empty(4, np.int64)

    for n in range(start, stop):
        image, flip = pixels[source[n]], mirrored[n]
        top, left, height, width = boxes[n, 0], boxes[n, 1], boxes[n, 2], boxes[n, 3]
        count, contrast = _plan(kind[n], factors[n], turns[n], order[n], todo)
        limit = threshold if solarised[n] else _TWO
        resize = height != size or width != size
        row_taps, column_taps = 0, 0
        if resize:
            row_taps = _weights(height, size, cubic, _ONE, False, first_row, down)
            column_taps = _weights(width, size, cubic, _BYTE, flip, first_column, along)

        light = 0.0  # mean luminance, needed by contrast
        for stage in range(1 if contrast < 0 else 2):
            last = contrast < 0 or stage == 1
            for y in range(0, size, rows):
                end = min(y + rows, size)
                a, b = edge + y * size, edge + end * size
                for c in range(channels if stage == 0 else 0):
                    plane = planes[c]
                    if resize:
                        _resize(
                            image[c].reshape(pixels.shape[2] * pixels.shape[3]), top * pixels.shape[3] + left,
                            pixels.shape[3], width, y, rows, first_row, down, row_taps, first_column, along,
                            column_taps, scratch, plane[edge + y * size : edge + (y + rows) * size],
                        )  # fmt: skip
                    else:
                        for z in range(y, end):
                            into = plane[edge + z * size : edge + (z + 1) * size]
                            _copy(image[c, top + z, left : left + width], flip, into)
                for k in range(0 if stage == 0 else contrast, count if last else contrast):
                    if todo[k] == _HUE:
                        _rotate_hue(planes[0, a:b], planes[1, a:b], planes[2, a:b], turns[n])
                    elif todo[k] == _SATURATION:
                        _saturate(planes[0, a:b], planes[1, a:b], planes[2, a:b], luma, factors[n, _SATURATION])
                    else:
                        own = factors[n, todo[k]]
                        other = np.float32((1.0 - own) * light) if todo[k] == _CONTRAST else _ZERO
                        for c in range(channels):
                            _blend(planes[c, a:b], own, other)
                if not last:
                    for c in range(channels):
                        light += luma[c] * _sum(planes[c, a:b]) / (size * size)
                    continue
                if grey[n]:
                    _desaturate(planes[0, a:b], planes[1, a:b], planes[2, a:b], luma)
                if not blurred[n]:
                    for c in range(channels):
                        into = out[n, c].reshape(size * size)[a - edge : b - edge]
                        _finish(planes[c, a:b], limit, mean[c], std[c], into)
        if not blurred[n]:
            continue

        used = _gaussian(sigma[n], half, kernel)
        for c in range(channels):
            plane = planes[c]
            for k in range(1, used + 1):  # rows and columns are reflected about the outermost
                top_row, bottom_row = edge, edge + (size - 1) * size
                for inner, outer in (
                    (top_row + k * size, top_row - k * size),
                    (bottom_row - k * size, bottom_row + k * size),
                ):
                    _scale(plane[inner : inner + size], _ONE, plane[outer : outer + size])
            for y in range(0, size, rows):
                lines = min(rows, size - y)
                _convolve(plane, edge + y * size, size, kernel, used, middle[: lines * size])
                for j in range(lines):
                    line = padded[pad + j * pitch : 2 * pad + size + j * pitch]
                    _scale(middle[j * size : (j + 1) * size], _ONE, line[:size])
                    for k in range(1, used + 1):
                        padded[pad + j * pitch - k] = line[k]
                        line[size - 1 + k] = line[size - 1 - k]
                # The rows are stored in one line; the values computed between them are discarded.
                _convolve(padded, pad, 1, kernel, used, blurry[: lines * pitch - 2 * pad])
                for j in range(lines):
                    _finish(blurry[j * pitch : j * pitch + size], limit, mean[c], std[c], out[n, c, y + j])


@no_type_check
def _compiled():
    signature = numba.void(
        uint8[:, :, :, ::1], int64[::1], int64[:, ::1], boolean[::1],
        int64[::1], float32[:, ::1], float32[::1], int64[:, ::1],
        boolean[::1], boolean[::1], float32[::1], boolean[::1],
        float32[::1], float32[::1], float32[::1], float32, int64, boolean, int64, int64, float32[:, :, :, ::1],
    )  # fmt: skip
    try:
        cached = numba.njit(cache=True, **_OPTIONS)(_draw)
        place = Path(cached.stats.cache_path)
        place.mkdir(parents=True, exist_ok=True)
        with one_process_at_a_time(place / "views.lock"):  # the others load what the first one compiles
            cached.compile(signature)
        cached.disable_compile()
        return cached
    except Exception:  # cache directory not writable, full disk or damaged cache: compile in every process
        return numba.njit(signature, **_OPTIONS)(_draw)


draw = _compiled()
"""`_draw` for contiguous arrays of one set of types, compiled once."""
