"""`insertion_attention` against FlexAttention: with an (n, n) matrix of offsets, and with plain causal ALiBi.

PYTHONPATH=.:kernels python kernels/benchmarks/insertion_attention.py

16K tokens a batch at every length, causal, positions in random order, 12 heads of 64. Operations are those of the two
products of causal attention, 2 B H n^2 D forward and 3.5 times that both ways; counts are overhead and not counted.
"Matrix" reads an int16 offset for every score; "ALiBi" computes the distance of a text written left to right, which
is no insertion model: a floor of what a bias costs. "SDPA" is causal attention without a bias. The table is made once
a batch and measured in a row of its own. "16 rows" decodes one token a row over n keys.
"""

from collections.abc import Callable
from functools import partial

import torch
from timing import DEVICE, Clock, backward_of, ceilings, main, markdown, median_ms, peak_mb
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from insnext_kernels.common import interpreting
from insnext_kernels.insertion_attention import insertion_attention, offset_table


COLUMNS = {
    "n": "n", "name": "implementation", "forward_ms": "forward ms", "both_ms": "forward + backward ms",
    "peak_mb": "peak MB", "ratio": "kernel's speed-up forward", "ratio_both": "kernel's speed-up both",
    "tflops": "TFLOP/s forward", "share": "share of matmul peak", "tflops_both": "TFLOP/s both",
    "share_both": "share of matmul peak both", "gb_s": "GB/s",
}  # fmt: skip
IMPL = "triton" if DEVICE == "cuda" or interpreting() else "reference"
# the lengths that the goals name first
LENGTHS = [1024, 4096, 16384, 2048, 8192]
TOKENS, HEADS, WIDTH = 16384, 12, 64


def alibi_slopes(heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    slopes = torch.pow(2.0, -8.0 * torch.arange(1, heads + 1, device=DEVICE) / heads)
    steep = torch.arange(heads, device=DEVICE) % 2 == 0
    return torch.where(steep, 4 * slopes, slopes), torch.where(steep, slopes, 4 * slopes)


def offset_matrix(positions_BN: torch.Tensor) -> torch.Tensor:
    """Return the offsets of causal insertion, int16 `[B, n, n]`, row after row of tokens in text order."""
    B, n = positions_BN.shape
    matrix = torch.empty(B, n, n, dtype=torch.int16, device=DEVICE)
    order_BN = positions_BN.argsort(1)
    rank_BN = order_BN.argsort(1)
    for first in range(0, n, 256):
        query = torch.arange(first, min(first + 256, n), device=DEVICE)
        seen = (order_BN[:, None] <= query[:, None]).int()
        before = (seen.cumsum(2) - seen).gather(2, rank_BN[:, None].expand(B, len(query), n))
        own = before.gather(2, query.expand(B, -1)[..., None])
        matrix[:, query] = (before - own).short()
    return matrix


def causal(b, h, q, k):
    return k <= q


def implementations(n: int, B: int) -> dict[str, Callable]:
    left, right = alibi_slopes(HEADS)
    positions = torch.rand(B, n, device=DEVICE).argsort(1)
    horizon = torch.arange(n, device=DEVICE).expand(B, n).contiguous()
    table = offset_table(positions, horizon, impl=IMPL)
    found = {
        "kernel": partial(_kernel, positions=positions, horizon=horizon, slopes=(left, right), table=table),
        "SDPA, causal, no bias": partial(scaled_dot_product_attention, is_causal=True),
    }
    if DEVICE == "cpu":
        return found
    matrix = offset_matrix(positions)
    blocks = create_block_mask(causal, None, None, n, n, device=DEVICE)

    def by_matrix(score, b, h, q, k):
        offset = matrix[b, q, k]
        return score + torch.where(offset < 0, left[h], -right[h]) * offset

    def by_alibi(score, b, h, q, k):
        return score + left[h] * (k - q)

    compiled = torch.compile(flex_attention, dynamic=False)
    found["FlexAttention, (n, n) matrix"] = partial(compiled, score_mod=by_matrix, block_mask=blocks)
    found["FlexAttention, causal ALiBi"] = partial(compiled, score_mod=by_alibi, block_mask=blocks)
    return found


def _kernel(q, k, v, positions, horizon, slopes, table):
    return insertion_attention(q, k, v, positions, horizon, *slopes, table=table, impl=IMPL)


def measure(n: int, B: int, peak: float) -> list[dict]:
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, n, HEADS, WIDTH, device=DEVICE, dtype=dtype).transpose(1, 2) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    operations = 2 * B * HEADS * n**2 * WIDTH
    rows = []
    for name, function in implementations(n, B).items():
        row = {"n": n, "name": name}
        rows.append(row)
        try:

            def forward(function=function):
                with torch.no_grad():
                    return function(q, k, v)

            both = backward_of(lambda f=function: f(q, k, v), leaves)
            row["forward_ms"], row["both_ms"] = median_ms(forward, 60), median_ms(both, 100)
            row["peak_mb"] = peak_mb(both)
        except TimeoutError:
            raise
        except Exception as error:  # an implementation that fails must not hide the others
            row["name"] = f"{name}: {type(error).__name__}: {error}"[:300]
            continue
        for kind, work in (("forward_ms", operations), ("both_ms", 3.5 * operations)):
            suffix = "" if kind == "forward_ms" else "_both"
            row["tflops" + suffix] = work / row[kind] / 1e9
            row["share" + suffix] = row["tflops" + suffix] / peak
            if kind in rows[0]:
                row["ratio" + suffix] = row[kind] / rows[0][kind]
    return rows


def measure_table(n: int, B: int) -> dict:
    positions = torch.rand(B, n, device=DEVICE).argsort(1)
    horizon = torch.arange(n, device=DEVICE).expand(B, n).contiguous()
    make = partial(offset_table, positions, horizon, impl=IMPL)
    return {"n": n, "name": "offset table, once a batch", "forward_ms": median_ms(make, 40), "peak_mb": peak_mb(make)}


def measure_decode(n: int, B: int) -> dict:
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    q = torch.randn(B, HEADS, 1, WIDTH, device=DEVICE, dtype=dtype)
    k, v = (torch.randn(B, HEADS, n, WIDTH, device=DEVICE, dtype=dtype) for _ in range(2))
    positions, horizon = torch.rand(B, n, device=DEVICE).argsort(1), torch.full((B, 1), n - 1, device=DEVICE)
    table = offset_table(positions, horizon, impl=IMPL)
    step = partial(_kernel, q, k, v, positions, horizon, alibi_slopes(HEADS), table)
    row = {"n": n, "name": f"decode, {B} rows", "forward_ms": median_ms(step, 40), "peak_mb": peak_mb(step)}
    return row | {"gb_s": 2 * k.numel() * k.element_size() / row["forward_ms"] / 1e6}


def run(smoke: bool, seconds: float = 90) -> dict:
    clock, peaks, rows, cut_short = Clock(seconds), ceilings(smoke), [], False
    try:
        for n in [70] if smoke else LENGTHS:
            if clock.over():
                break
            B = 1 if smoke else TOKENS // n
            rows.append(measure_table(n, B))
            rows += measure(n, B, peaks["matmul_tflops"])
            rows.append(measure_decode(n, 2 if smoke else 16))
            # each length compiles anew
            torch.compiler.reset()
    except TimeoutError:
        cut_short = True
    return {"rows": rows, "ceilings": peaks, "cut_short": cut_short or clock.over()}


def table(result: dict) -> str:
    return markdown(result["rows"], COLUMNS)


if __name__ == "__main__":
    main(run, table)
