"""`grouped_cross_attention` against gathering the chunks and calling SDPA once for each slot.

PYTHONPATH=.:kernels python kernels/benchmarks/grouped_cross_attention.py

Operations are counted for the slots that hold a chunk: 4 M S D for each of them and each query head forward (two
products; 25.8 GFLOP at 16K tokens, 8 chunks of 64, 12 heads of 64), 3.5 times that forward and backward (seven
products, which is the minimum; the kernels do nine and store nothing). Times are those of captured graphs: they
hold the kernels and not the interpreter of Python; "called" is one plain call from Python. "Forward" runs without
gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from timing import DEVICE, Clock, backward_of, ceilings, main, markdown, median_ms, peak_mb
from torch.nn.functional import scaled_dot_product_attention

from insnext_kernels import grouped_cross_attention
from insnext_kernels.common import interpreting


COLUMNS = {
    "case": "case", "name": "implementation", "shape": "B, C x M, k x S, heads/kv heads x D",
    "forward_ms": "forward ms", "forward_called_ms": "forward called ms", "both_ms": "forward + backward ms",
    "peak_mb": "peak MB", "ratio": "speed-up forward", "ratio_both": "speed-up both", "tflops": "TFLOP/s forward",
    "share": "share of matmul peak", "tflops_both": "TFLOP/s both", "share_both": "share of matmul peak both",
    "gb_s": "GB/s",
}  # fmt: skip


class Case(NamedTuple):
    """A shape: see `grouped_cross_attention`. `popular` of the slots hold the same chunk; `decode` is one step."""

    name: str
    B: int = 1
    C: int = 256
    M: int = 64
    K: int = 8
    S: int = 64
    H: int = 12
    G: int = 12
    D: int = 64
    N: int = 256
    popular: float = 0.0
    decode: bool = False

    @property
    def shape(self) -> str:
        return f"{self.B}, {self.C} x {self.M}, {self.K} x {self.S}, {self.H}/{self.G} x {self.D}"


CASES = [
    Case("16K tokens"),
    Case("16K, 4 query heads a key head", G=3),
    Case("16K, landmark queries", M=65),
    Case("4 x 16K", B=4),
    Case("16K, a third of the slots alike", popular=1 / 3),
    Case("decode", C=1, M=1, N=4096, decode=True),
    Case("decode, batch 32", B=32, C=1, M=1, N=256, decode=True),
    Case("decode, 4 query heads a key head", C=1, M=1, G=3, N=4096, decode=True),
    Case("16K, 32 chunks, heads of 128", K=32, H=8, G=2, D=128),
]
SMOKE = [
    Case("smoke", C=2, M=5, K=2, S=8, H=2, G=1, D=16, N=2),
    Case("smoke, decode", C=1, M=1, K=2, S=8, H=2, G=1, D=16, N=2, decode=True),
]


def gathered(q, k, v, indices, weights):
    """The operator as it was published: gather, one softmax for each chunk and slot, weighted sum."""
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[3]
    C, K = indices.shape[1:]
    batch = torch.arange(B, device=q.device)[:, None, None]
    chunks = [x.transpose(1, 2)[batch, indices.clamp_min(0)].reshape(B * C * K, G, S, D) for x in (k, v)]
    queries = q.reshape(B, H, C, T // C, D).permute(0, 2, 1, 3, 4)[:, :, None].expand(-1, -1, K, -1, -1, -1)
    queries = queries.reshape(B * C * K, H, T // C, D)
    out = scaled_dot_product_attention(queries, *chunks, enable_gqa=H != G).reshape(B, C, K, H, T // C, D)
    weights = weights.masked_fill(indices < 0, 0).to(q.dtype)
    return torch.einsum("bckhmd,bck->bhcmd", out, weights).reshape(B, H, T, D)


def tensors_of(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return q, k, v, indices, weights; the past of chunk c are the chunks before it."""
    torch.manual_seed(0)
    q = torch.randn(case.B, case.C * case.M, case.H, case.D, device=DEVICE, dtype=dtype).transpose(1, 2)
    k, v = (
        torch.randn(case.B, case.N, case.S, case.G, case.D, device=DEVICE, dtype=dtype).permute(0, 3, 1, 2, 4)
        for _ in range(2)
    )
    past = torch.arange(case.N, device=DEVICE)[None] < torch.arange(case.C, device=DEVICE)[:, None]
    scores = torch.rand(case.B, case.C, case.N, device=DEVICE)
    if not case.decode:
        scores = scores.masked_fill(~past, -1)
    scores, indices = scores.topk(min(case.K, case.N), -1)
    indices = indices.masked_fill(torch.rand_like(scores) < case.popular, 0).masked_fill(scores < 0, -1)
    weights = torch.rand_like(scores).softmax(-1)
    return [x.requires_grad_(not case.decode) for x in (q, k, v)] + [
        indices.int(),
        weights.requires_grad_(not case.decode),
    ]


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """Return a call that replays the kernels of `function`, on a CPU `function` itself."""
    if DEVICE == "cpu":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure(case: Case, peak: float) -> list[dict]:
    impl = "triton" if DEVICE == "cuda" or interpreting() else "reference"
    implementations = {
        "kernel": lambda *x: grouped_cross_attention(*x, impl=impl),
        "gather + SDPA": gathered,
    }
    tensors = tensors_of(case, torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    found = (tensors[3] >= 0).sum().item()
    operations = 4 * found * case.M * case.S * case.D * case.H
    rows = []
    for name, function in implementations.items():
        row = {"case": case.name, "name": name, "shape": case.shape}

        def forward(function=function):
            with torch.no_grad():
                return function(*tensors)

        row["forward_ms"] = median_ms(graphed(forward), 100)
        row["forward_called_ms"] = median_ms(forward, 50)
        row["tflops"] = operations / row["forward_ms"] / 1e9
        row["share"] = row["tflops"] / peak
        if case.decode:
            row["peak_mb"] = peak_mb(forward)
            row["gb_s"] = found * case.G * 2 * case.S * case.D * tensors[1].element_size() / row["forward_ms"] / 1e6
        else:
            leaves = [x for x in tensors if x.requires_grad]
            both = backward_of(lambda f=function: f(*tensors), leaves)
            row["peak_mb"] = peak_mb(both)
            row["both_ms"] = median_ms(graphed(both), 150)
            row["tflops_both"] = 3.5 * operations / row["both_ms"] / 1e9
            row["share_both"] = row["tflops_both"] / peak
            for leaf in leaves:
                leaf.grad = None
        rows.append(row)
    for row in rows:
        row["ratio"] = rows[-1]["forward_ms"] / row["forward_ms"]
        if "both_ms" in row:
            row["ratio_both"] = rows[-1]["both_ms"] / row["both_ms"]
    return rows


def run(smoke: bool, seconds: float = 60) -> dict:
    clock, peaks, rows = Clock(seconds), ceilings(smoke), []
    for case in SMOKE if smoke else CASES:
        if clock.over():
            break
        try:
            rows += measure(case, peaks["matmul_tflops"])
        except Exception as error:  # a size that fails must not hide the others
            rows.append({"case": case.name, "name": f"{type(error).__name__}: {error}"[:300], "shape": case.shape})
    return {"rows": rows, "ceilings": peaks, "cut_short": clock.over()}


def table(result: dict) -> str:
    return markdown(result["rows"], COLUMNS)


if __name__ == "__main__":
    main(run, table)
