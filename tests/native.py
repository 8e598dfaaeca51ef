"""What the tests of the compiled plain layer share."""

from functools import partial

import pytest
from strategies import DTYPES

from clora_kernels import extension, routed_lora_linear
from clora_kernels.reference.routed_lora_samples import make_inputs

built = pytest.mark.skipif(
    not extension.has_op("routed_lora_lay_down", "cpu"), reason=f"not compiled: {extension.status()[0].detail}"
)
native = partial(routed_lora_linear, backend="native")
TYPES = ["fp32", "bf16+fp32", "fp16+fp32"]
RAN = ["routed_lora.layer.forward", "routed_lora.layer.backward"]


def plain(lead=(3, 7), dtypes="fp32", **options):
    dtype, adapter_dtype = DTYPES[dtypes]
    return make_inputs(lead, dtype=dtype, adapter_dtype=adapter_dtype, routing=False, **options)


NAMES = ("x", "weight", "lora_A", "lora_B", "bias", "scaling")
