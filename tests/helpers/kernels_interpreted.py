"""Compare the kernels with a literal computation in float64; as a script, by Triton's interpreter (test_kernels.py).

Triton reads TRITON_INTERPRET when a kernel is defined, so the script needs its own process. It prints case -> errors
as JSON.
"""

import json
import math
import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor

from inbatch.nn import exponentials, logsumexp, sigmoid_sums, triton_logsumexp, triton_sigmoid
from inbatch.nn.pair_weights import SameGroup

Case = tuple[str, int, int, int, bool, float, str, tuple[int, int] | None, str]
"""Name, rows, columns, width, others, temperature, products, the range of rows to compute (None: all), and weights."""
EPS = torch.finfo(torch.float32).eps


def cases() -> Iterator[Case]:
    def case(
        n: int, m: int, d: int, others: bool = False, temperature: float = 0.07, products: str = "float32",
        span: tuple[int, int] | None = None, weights: str = "",
    ) -> Case:  # fmt: skip
        name = f"{n}x{m}x{d} exclude_self={others} T={temperature} {products} rows={span or 'all'} {weights}".strip()
        return name, n, m, d, others, temperature, products, span, weights

    for others in (False, True):
        for n, m, d in [(1, 1, 3), (5, 5, 16), (64, 64, 40), (130, 130, 128)]:
            for temperature in (0.07, 0.003):
                yield case(n, m, d, others, temperature)
        yield case(130, 130, 40, others, span=(63, 130))
        yield case(5, 130, 16, others, span=(2, 3))
        yield case(130, 5, 3, others, span=(1, 100))
        for products in ("tf32x3", "bf16"):
            yield case(130, 64, 40, others, products=products)
            yield case(64, 130, 128, others, 0.003, products)
        # Columns split over two and more programs, with a remainder; and the width at which the tile size changes.
        yield case(66, 1100, 16, others)
        yield case(5, 1030, 3, others, 0.003, "bf16", (1, 4))
        yield case(5, 130, 256, others)
        yield case(5, 130, 256, others, products="bf16")
        for weights in ("w=0", "w=0.25", "w=3", "w=0 classes"):
            yield case(70, 130, 40, others, weights=weights)
        yield case(66, 1100, 16, others, products="bf16", span=(3, 66), weights="w=0 classes")
        yield case(64, 64, 3, others, 0.003, weights="w=0")
    yield case(9, 9, 16, weights="w=0 one group")
    yield case(5, 130, 16, span=(2, 2))
    yield case(5, 0, 16)


def rows(n: int, d: int, seed: int, device: str = "cpu") -> Tensor:
    """Draw rows of lengths from 0.5 to 2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    length = 0.5 + 1.5 * torch.rand(n, 1, generator=generator)
    return (x / x.norm(dim=1, keepdim=True) * length).to(device)


def groups(words: str, n: int, m: int, symmetric: bool = False) -> SameGroup | None:
    """Return the weights that the words of a case describe."""
    if not words:
        return None
    weight = float(words.split()[0].removeprefix("w="))
    count = 1 if "one group" in words else 7
    ids, keys = torch.arange(n) % count - 2, torch.arange(m) * 3 % count - 2
    if "classes" not in words:
        return SameGroup(ids, ids if symmetric else keys, weight)
    kinds = torch.arange(n) % 3, torch.arange(m) % 3
    return SameGroup(ids, keys, weight, *kinds)


def softmax(s: Tensor, lse: Tensor) -> Tensor:
    """Return exp(s - lse) by rows; 0 in a row whose log-sum-exp is -inf."""
    return (s - lse.masked_fill(lse == -math.inf, 0)[:, None]).exp()


def errors(case: Case, device: str = "cpu", symmetric: bool = False) -> dict[str, float]:
    """Return the largest error of every result as a share of its rounding tolerance; NaN if a result is NaN.

    Logits reach L = max |S| and are rounded to L * eps a few times: in the product, by the scale, in base 2. A
    log-sum-exp may therefore be wrong by a few L eps, and a softmax by the same relative error; 8 L eps (and 8 eps, if
    L is small) are allowed. A gradient is a sum over softmaxes, so its errors are measured by the sum of the magnitudes
    added. tf32x3 drops the product of the low halves (2^-22): 4 times as much is allowed. bf16 is compared with rounded
    rows, so that only the softmax's rounding remains: 2^-9 of the magnitudes added (2^-7 in the interpreter, which
    truncates), and none in the log-sum-exp.
    """
    _, n, m, d, others, temperature, products, span, words = case
    start, stop = span or (0, n)
    scale, q = 1 / temperature, rows(n, d, 1, device)
    k = q if symmetric else rows(m, d, 2, device)
    wide = [(x.bfloat16() if products == "bf16" else x).double() for x in (q, k)]
    s = scale * wide[0] @ wide[1].T
    reach = float(s.abs().max()) if s.numel() else 0.0
    if others:
        s = s.masked_fill(torch.eye(n, m, dtype=torch.bool, device=device), -math.inf)
    weights = groups(words, n, m, symmetric)
    if weights is not None:
        s = s + weights.tile(slice(0, n), slice(0, m)).double().log().to(device)
    flipped = None if weights is None else weights.flipped
    lse_q, lse_k = s.logsumexp(1), s.logsumexp(0)
    grad_q, grad_k = rows(1, n, 3, device)[0], rows(1, m, 4, device)[0]
    by_q, by_k = softmax(s, lse_q), softmax(s.T, lse_k).T

    logits = 8 * EPS * max(reach, 1) * (4 if products == "tf32x3" else 1)
    cut = 2**-9 if q.is_cuda else 2**-7
    share = logits + (cut if products == "bf16" else 0)

    def compare(actual: Tensor | None, expected: Tensor, allowed: Tensor | float) -> float:
        assert actual is not None and actual.shape == expected.shape and actual.dtype == torch.float32
        off = ((actual - expected).abs() / allowed).masked_fill(actual == expected, 0)
        return float(off.max()) if off.numel() else 0.0

    def back(weights: Tensor, b: Tensor, actual: Tensor) -> float:
        terms = scale * weights.abs()[start:stop] @ b.abs()
        return compare(actual, (scale * weights @ b)[start:stop], share * terms + 1e-30)

    lse, none = triton_logsumexp.forward(q, k, scale, others, start, stop, False, products, weights)
    again, mean = triton_logsumexp.forward(q, k, scale, others, start, stop, True, products, weights)
    assert none is None and torch.equal(again, lse)
    settings = (scale, others, start, stop)
    of_q, of_k = (lse_q.float(), grad_q), (lse_k.float(), grad_k)
    deviations = {
        "lse": compare(lse, lse_q[start:stop], logits),
        "mean": compare(mean, (by_q @ wide[1])[start:stop], share * (by_q @ wide[1].abs())[start:stop] + 1e-30),
        "queries": back(
            grad_q[:, None] * by_q, wide[1],
            triton_logsumexp.backward(q, k, *settings, *of_q, None, None, products, weights)
        ),
        "both": back(
            grad_q[:, None] * by_q + by_k * grad_k, wide[1],
            triton_logsumexp.backward(q, k, *settings, *of_q, *of_k, products, weights)
        ),
    }  # fmt: skip
    start, stop = (0, m) if span is None else (min(start, m), min(stop, m))
    gradient = triton_logsumexp.backward(k, q, scale, others, start, stop, None, None, *of_q, products, flipped)
    return deviations | {"keys": back((grad_q[:, None] * by_q).T, wide[0], gradient)}


def logistic_errors(
    n: int, m: int, d: int, products: str, positive: str, words: str, device: str = "cpu", length: float = 1.0
) -> float:
    """Return the largest error of the sums of pairwise sigmoids as a share of their rounding tolerance.

    A logit is wrong by 8 L eps, as in `errors`, a loss by as much times its slope, and a slope by less than its size
    times as much. Small losses are therefore compared by their relative error.
    """
    q, k, bias = length * rows(n, d, 1, device), rows(m, d, 2, device), 3 * rows(1, n, 3, device)[0] - 2
    wide = [(x.bfloat16() if products == "bf16" else x).double() for x in (q, k)]
    x = wide[0] @ wide[1].T + bias.double()[:, None]
    same = {"none": torch.zeros(n, m), "diagonal": torch.eye(n, m)}.get(positive)
    of_positives = SameGroup(torch.arange(n) % 5, torch.arange(m) % 5) if same is None else None
    if of_positives is not None:
        same = 1 - of_positives.tile(slice(0, n), slice(0, m))
    assert same is not None
    sign = 1 - 2 * same.double().to(device)
    weights = groups(words, n, m)
    w = torch.ones(n, m) if weights is None else weights.tile(slice(0, n), slice(0, m))
    w = w.double().to(device)
    losses, slopes = w * torch.nn.functional.softplus(sign * x, threshold=1e9), w * sign * (sign * x).sigmoid()
    allowed = 8 * EPS * max(1.0, float(x.abs().max()) if x.numel() else 0) * (4 if products == "tf32x3" else 1)
    rounded = allowed + ((2**-9 if q.is_cuda else 2**-7) if products == "bf16" else 0)
    flip = [None if x is None else x.flipped for x in (of_positives, weights)]

    def worst(actual: Tensor | None, expected: Tensor, tolerance: Tensor) -> float:
        assert actual is not None and actual.shape == expected.shape and actual.dtype == torch.float32
        off = ((actual - expected).abs() / (tolerance + 1e-30)).masked_fill(actual == expected, 0)
        return float(off.max()) if off.numel() else 0.0

    deviations, bounds = [], [(0, n), (n // 3, n - n // 4)]
    for start, stop in bounds:
        every = of_positives, positive == "diagonal", weights, (True, True, True), products
        loss, dq, db = triton_sigmoid.row_sums(q, k, bias, None, start, stop, *every)
        part = slice(start, stop)
        deviations.append(worst(loss, losses.sum(1)[part], allowed * (losses + slopes.abs()).sum(1)[part]))
        deviations.append(worst(db, slopes.sum(1)[part], allowed * 2 * slopes.abs().sum(1)[part]))
        deviations.append(worst(dq, (slopes @ wide[1])[part], 2 * rounded * (slopes.abs() @ wide[1].abs())[part]))
    every = flip[0], positive == "diagonal", flip[1], (False, True, False), products
    none, dk, nothing = triton_sigmoid.row_sums(k, q, None, bias, 0, m, *every)
    assert none is nothing is None
    deviations.append(worst(dk, slopes.T @ wide[0], 2 * rounded * (slopes.T.abs() @ wide[0].abs())))
    return max(deviations) if all(x == x for x in deviations) else math.nan


def sigmoids(device: str = "cpu") -> dict[str, float]:
    """Return the errors of sums of sigmoids: every kind of positives, weights, products and shape."""
    cases = [(70, 130, 40, "float32", positive, "", 1.0) for positive in ("none", "diagonal", "groups")]
    cases += [(64, 70, 16, "float32", "diagonal", words, 1.0) for words in ("w=0", "w=0.25", "w=0 classes")]
    cases += [(65, 64, 128, products, "groups", "w=3", 1.0) for products in ("tf32x3", "bf16")]
    cases += [(5, 1100, 16, "float32", "groups", "w=0.5 classes", 60.0), (1, 1, 3, "float32", "diagonal", "", 1.0)]
    cases += [(9, 0, 3, "float32", "diagonal", "", 1.0), (5, 130, 256, "float32", "none", "w=0", 20.0)]
    return {" ".join(map(str, case)): logistic_errors(*case[:6], device, case[6]) for case in cases}


def through_tiled() -> dict[str, float]:
    """Compare the kernels within `tiled` with the literal version and with torch's tiles, alone and over two ranks."""
    u, k = rows(40, 16, 1), rows(70, 16, 2)
    deviations = {}
    twice = SameGroup(torch.arange(40) % 6, torch.arange(70) % 6, 0.5, torch.arange(40) % 4, torch.arange(70) % 4)
    own = torch.arange(40) % 6
    for name, q, keys, others, learn, weights in (
        ("itself", u, u, True, (True,), None), ("both", u, k, False, (True, True), None),
        ("exclude_self", u, k, True, (True, True), None),
        ("queries", u, k, False, (True, False), None), ("keys", u, k, False, (False, True), None),
        ("itself, weights", u, u, True, (True,), SameGroup(own, own)), ("weights", u, k, False, (True, True), twice),
        ("queries, weights", u, k, False, (True, False), twice),
    ):  # fmt: skip
        answers = []
        for mode, kernels in (("never", True), ("always", True), ("always", False)):
            a = q.clone().requires_grad_(learn[0])
            b = a if len(learn) == 1 else keys.clone().requires_grad_(learn[1])
            with _torch_only(not kernels), logsumexp.using(mode=mode):
                value = logsumexp.logsumexp(a, b, 0.1, others, weights)
                assert value.grad_fn is not None and ("Tiled" in type(value.grad_fn).__name__) == (mode == "always")
                value.square().sum().backward()
            answers.append([value.detach(), *(x.grad for x in ((a,) if b is a else (a, b)) if x.grad is not None)])
        deviations[name] = max(_error(answers[1], answers[0]), _error(answers[1], answers[2]))

        plans = [logsumexp.LogSumExpConfig(rank=rank, world=2) for rank in range(2)]
        pairs, keys_of = (10.0, others, weights), None if keys is q else keys
        parts = [exponentials.kernel_sums(q, keys_of, *pairs, False, plan)[0] for plan in plans]
        lse = parts[0] + parts[1]
        needs = (*learn, False)[:2]
        inputs = q, keys_of, lse, 2 * lse, *pairs, needs
        shares = [[x for x in exponentials.kernel_gradients(*inputs, plan) if x is not None] for plan in plans]
        deviations[f"{name}, two ranks"] = _error([lse, *(a + b for a, b in zip(*shares, strict=True))], answers[0])
    return deviations | _sigmoids_through_tiled(u, k, twice)


def _sigmoids_through_tiled(u: Tensor, k: Tensor, weights: SameGroup) -> dict[str, float]:
    deviations, bias = {}, rows(1, 40, 3)[0]
    groups = SameGroup(weights.q_ids, weights.k_ids)
    for name, positive, w in (("sigmoid", None, None), ("sigmoid, groups", groups, weights)):
        answers = []
        for mode, kernels in (("never", True), ("always", True), ("always", False)):
            leaves = [x.clone().requires_grad_() for x in (u, k, bias)]
            with _torch_only(not kernels), logsumexp.using(mode=mode):
                value = sigmoid_sums.sigmoid_sum(*leaves, positive=positive, weights=w)
                answers.append([value.detach(), *torch.autograd.grad(3 * value, leaves)])
        deviations[name] = max(_error(answers[1], answers[0]), _error(answers[1], answers[2]))
        plans = [logsumexp.LogSumExpConfig(rank=rank, world=2) for rank in range(2)]
        inputs = u, k, bias, positive, w
        shares = [sigmoid_sums._sums(*inputs, plan, (True, True, True)) for plan in plans]
        whole = [a + b for a, b in zip(*shares, strict=True) if a is not None and b is not None]
        deviations[f"{name}, two ranks"] = _error([whole[0].sum(), *(3 * x for x in whole[1:])], answers[0])
    return deviations


def _torch_only(yes: bool):  # type: ignore[no-untyped-def]
    """Return a context in which torch's products compute the sums."""
    return patch.object(triton_logsumexp, "usable", lambda *_: False) if yes else logsumexp.using()


def _error(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(actual, expected, strict=True))


def types() -> dict[str, float]:
    """Check that half-precision and strided rows give the results of the same rows in float32."""
    q, k = rows(5, 32, 1)[:, ::2], rows(16, 33, 2).T[:16].T
    k = k[:, :16]
    deviations = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = q.to(dtype), k.to(dtype)
        assert triton_logsumexp.usable(a, b)
        lse, mean = triton_logsumexp.forward(a, b, 10.0, False, 0, 5, True)
        other, expected = triton_logsumexp.forward(
            a.float().contiguous(), b.float().contiguous(), 10.0, False, 0, 5, True
        )
        assert mean is not None and expected is not None
        deviations[str(dtype)] = float((lse - other).abs().max() + (mean - expected).abs().max())
    return deviations


def refused() -> dict[str, bool]:
    """Return what `usable` answers for tensors that the kernels do not support."""
    x = torch.ones(2, 4)
    return {
        "nothing": triton_logsumexp.usable(),
        "float64": triton_logsumexp.usable(x, x.double()),
        "wide": triton_logsumexp.usable(torch.ones(2, triton_logsumexp.WIDEST + 1)),
        "no device": triton_logsumexp.usable(x, x.to("meta")),
    }


if __name__ == "__main__":
    wanted = sys.argv[1:]  # names of cases; all if there are none
    deviations = {case[0]: errors(case) for case in cases() if not wanted or case[0] in wanted}
    for n in (1, 5, 130):
        for temperature in (0.07, 0.003):
            name = f"symmetric {n} T={temperature}"
            if not wanted or name in wanted:
                deviations[name] = errors((name, n, n, 16, True, temperature, "float32", None, "w=0.5"), symmetric=True)
    report = {
        "cases": deviations,
        "types": types(),
        "refused": refused(),
        "tiled": through_tiled(),
        "sigmoids": sigmoids(),
    }
    print(json.dumps(report))
