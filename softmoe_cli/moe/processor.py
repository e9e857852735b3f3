"""How fast this machine's CPU multiplies in half precision, and how much memory such a product takes."""

import os
import platform

import torch
from torch import Tensor

HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def _products(dtype: torch.dtype) -> str:
    """`fast`: by instructions of its own. `slow`: by such ones that gain nothing over float32. `emulated`: oneDNN has
    the product for this CPU, but in float32 and with a buffer of it (AVX-512 without bf16 instructions). `loops`:
    oneDNN has none, and torch computes it itself."""
    if not torch.backends.mkldnn.is_available():
        return "loops"
    if not getattr(torch.ops.mkldnn, f"_is_mkldnn_{HALVES[dtype]}_supported")():
        return "loops"
    if platform.machine() not in ("x86_64", "AMD64"):
        return "fast"  # oneDNN emulates on x86 alone, and bfloat16 alone
    if dtype == torch.float16:
        return "fast" if torch.cpu._is_amx_fp16_supported() else "slow"
    # oneDNN can be told to use less than there is, and reads the first of these names first.
    most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "fast" if instructions and most.upper() not in ("AVX512_CORE", "AVX512_CORE_VNNI") else "emulated"


CPU_PRODUCTS = {dtype: _products(dtype) for dtype in HALVES}
"""What becomes of products of a half precision. Only `fast` ones are worth it (experiments/loop_overhead)."""


def borrowed(product: Tensor) -> int:
    """Bytes that mm, addmm, bmm or baddbmm takes while it computes this result, beside the result: if products are
    emulated, a float32 buffer of the whole matrix or, in a batch of matrices, of one matrix for each thread."""
    if product.device.type != "cpu" or CPU_PRODUCTS.get(product.dtype) != "emulated":
        return 0
    matrices = min(len(product), torch.get_num_threads()) if product.ndim == 3 else 1
    return 4 * matrices * product.shape[-2:].numel() + 128
