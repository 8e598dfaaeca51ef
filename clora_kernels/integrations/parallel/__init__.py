r"""Several processes, on torch's own engines: DDP, FSDP2, tensor parallel by DTensor plans, distributed checkpoints.

**DDP, FSDP2.** Adapted layers are ordinary modules, nothing is to be called. Each layer reads its parameters inside its
own forward, so ``fully_shard`` of the layer, or of any module around it, gathers them in time; layers of PEFT that are
accelerated look at what holds the base weight, and call a base layer that was sharded by itself. What FSDP2 asks for:
parameters that learn have one dtype in each group, where frozen ones may have any. fp32 adapters on a frozen 16-bit
base are such a group, a 16-bit base that learns beside them is not: convert the adapter (``adapter_dtype``) or the
base. It takes no 0-dim parameter either, as a ``scaling`` that learns is: DDP and tensor parallel do; what goes into
``ignored_params`` is not averaged over ranks. A ``MixedPrecisionPolicy(param_dtype=torch.bfloat16,
reduce_dtype=torch.float32)`` rounds fp32 adapters to bf16 once more than the layer does and gives gradients that are
bf16 before they are averaged in fp32; without a ``param_dtype`` the frozen base is bf16 all the same if that is how it
is stored, and adapters keep fp32 gradients, which is what to prefer. Adapters alone are sharded with ``ignored_params``
set to the frozen ones.

Of a sharded layer ``adapter_parameters`` and ``adapter_state_dict`` give DTensors, ``load_adapter_state_dict`` takes
whole tensors (all of them on each rank) or DTensors, and merging or folding is refused: merge before sharding, or in a
plain model that loads the full state dict (``torch.distributed.checkpoint.state_dict.get_model_state_dict``). In
between ``unshard()`` and ``reshard()`` a layer cannot see that it is sharded; what is merged there is lost.

**Tensor parallel.** :class:`ColumnParallel` and :class:`RowParallel` stand in plans of
``torch.distributed.tensor.parallel.parallelize_module`` where torch's ``ColwiseParallel`` and ``RowwiseParallel`` stand
for plain linear layers. FSDP2 goes around them, on another dimension of the mesh.

**Checkpoints.** State dicts hold DTensors, so ``torch.distributed.checkpoint`` saves from any number of ranks and loads
into any other.

**Gram-Schmidt** of factors that are sharded along their length: :func:`gram_schmidt_sharded`.
"""

from .gram_schmidt import gram_schmidt_sharded
from .tensor import ColumnParallel, RowParallel

__all__ = ["ColumnParallel", "RowParallel", "gram_schmidt_sharded"]
