"""Attention over intervals, biased by the signed distance in the text as it stood. Needs torch only.

Operations and bytes for n queries and keys, head dim d, H heads, tiles of 64 (forward; half of it when causal):

    products   2 n^2 H (2 d) for scores and values + 2 n^2 64 H for the distances
    memory     q, k, v, out once per 64 queries from the second-level cache; table 2 n^2 / 64 * 2 bytes, once per batch

At n = 4096, d = 64, H = 12 that is 52 + 26 GFLOP, 79 us of a H200's 989 TFLOP/s; its memory needs 25 MB of q, k, v and
out and 1 MB of table, 6 us of 4.8 TB/s: bound by arithmetic. An (n, n) matrix of offsets, 32 MB in int16 and read by
each of 12 heads, would cost one load a score on top. What is scarce is not the tensor core but ordinary arithmetic
(softmax, bias, comparison). Hence tiles of 64 queries: the count costs as much as one of the two products
and no more, and four warps hold it; hence unmasked inner blocks that need neither `right` nor flags. Counted in the
machine code for sm_90 (bfloat16, d = 64), such a block of 64 x 64 takes 709 instructions a warp forward with Triton
3.9 (683 with 3.6), of which 12 are products; without a table, as for plain ALiBi, it takes 507 (572). Two heads that
share a count in one program take 584 (554) each, but spill registers: that path is gone.
"""

from .api import insertion_attention, offset_table
from .ops import OffsetTable
from .reference import insertion_attention_reference


__all__ = ["OffsetTable", "insertion_attention", "insertion_attention_reference", "offset_table"]
