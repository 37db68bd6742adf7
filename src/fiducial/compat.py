"""The only place that touches third-party internals. Each entry says why, and when it can go."""

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import TrainingArguments


@contextmanager
def peft_switch(
    model: nn.Module, *, active: list[str] | None = None, disabled: bool = False
) -> Iterator[None]:
    """Inside, PEFT layers run with the adapters `active` (None keeps theirs), or with none when `disabled`.

    Sets the private `_disable_adapters` and `_active_adapter` of PEFT's layers. Its public ways,
    `disable_adapter()` and `set_adapter()`, also rewrite `requires_grad`: on leaving they thaw adapter
    weights the user froze, and they walk the model several times (31.6 ms for 30 layers against 3.4 ms). See
    `enable_adapters` in https://github.com/huggingface/peft/blob/main/src/peft/tuners/tuners_utils.py.
    Can go when PEFT switches adapters without touching `requires_grad`.
    """
    layers = [
        module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = disabled
        if active is not None:
            layer._active_adapter = active
    try:
        yield
    finally:
        for layer, was_disabled, was_active in before:
            layer._disable_adapters = was_disabled
            layer._active_adapter = was_active


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Inside, a call of `module` runs its `forward` alone.

    Sets the private `_forward_hooks` and `_forward_pre_hooks`. Those of FSDP2 gather the module's weights,
    which is most of the cost of a call that multiplies nothing with them, and torch has no public way to call
    a module without. Can go when torch has one
    (https://github.com/pytorch/pytorch/blob/main/torch/nn/modules/module.py).
    """
    before = module._forward_hooks, module._forward_pre_hooks
    module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        module._forward_hooks, module._forward_pre_hooks = before


def use_one_device(args: TrainingArguments) -> None:
    """Keep a single process that sees several GPUs from wrapping the model in `nn.DataParallel`.

    Sets the private `_n_gpu`, as transformers itself does for model parallelism. `nn.DataParallel` scatters
    tensors, and a dataloader item here is a list of token ids. Can go when transformers drops
    `nn.DataParallel`
    (https://github.com/huggingface/transformers/blob/main/src/transformers/training_args.py).
    """
    if args.n_gpu > 1:
        args._n_gpu = 1


def enable_gradient_checkpointing(model: nn.Module, options: dict[str, Any]) -> None:
    """Keep only each layer's input for backward and recompute the rest.

    transformers also asks for gradients of the embeddings' output, without which reentrant checkpoints have
    none at all. Others do well without, and would run the layers below the lowest trained weight again, and
    back, for nothing.

    transformers renamed the method, and warns about the old name from the release that has the new one. Can
    go when that release is the oldest supported
    (https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py).
    """
    call: Any = model
    if hasattr(model, "activation_checkpointing_enable"):
        call.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        call.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if not options.get("use_reentrant", True):
        call.disable_input_require_grads()


@contextmanager
def weights_in_every_process() -> Iterator[None]:
    """Inside, transformers reads a checkpoint in every process.

    Where FSDP_CPU_RAM_EFFICIENT_LOADING is set, as `accelerate launch` does, only rank 0 would be sure to
    have the weights before they are sharded, and here each scores its share of the reference on them:
    transformers up to 5.22 sets those of the others to zero. Can go when transformers has an argument for it
    (https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py).
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    said = os.environ.pop(name, None)
    try:
        yield
    finally:
        if said is not None:
            os.environ[name] = said


@contextmanager
def hub_offline() -> Iterator[None]:
    """Inside, the hub's client and the libraries that use it keep to what is cached.

    Sets HF_HUB_OFFLINE, which PEFT reads at every use, and what huggingface_hub and datasets have made of it
    when they were imported: there is no call for it. Can go when the client has one
    (https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/constants.py).
    """
    import datasets
    import huggingface_hub

    holders: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before, said = [holder.HF_HUB_OFFLINE for holder in holders], os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for holder in holders:
        holder.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value
        os.environ.pop("HF_HUB_OFFLINE", None)
        if said is not None:
            os.environ["HF_HUB_OFFLINE"] = said


@contextmanager
def reading_uncounted() -> Iterator[None]:
    """Inside, `datasets` opens files without telling a server that it does.

    For each `load_dataset("json", data_files=…)` it asks for a page in a bucket on s3.amazonaws.com, whose
    visits are counted. Where packets are dropped that is 3 seconds a dataset, where no name server answers
    many more. Sets what datasets has made of HF_UPDATE_DOWNLOAD_COUNTS when it was imported: there is no call
    for it. Can go when only what is on the hub is counted
    (https://github.com/huggingface/datasets/blob/main/src/datasets/load.py).
    """
    import datasets

    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


def has_onednn_product() -> bool:
    """Whether this torch has the operator behind `onednn_product`."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def bound_onednn_caches() -> None:
    """Let oneDNN remember the kernels of one forward pass, not of a thousand shapes.

    It makes a kernel for every new shape, in half precision and for `onednn_product`, and each pass of packed
    rows has its own number of tokens: with the default of 1024 kept, resident memory grew by 950 MB over 1200
    shapes, with 32 by 230 MB and no further (plain products: 60 MB). torch has no call for it; both libraries
    read the environment at their first product. A user's own settings stand. Can go when oneDNN's kernels
    serve any number of rows
    (https://github.com/uxlfoundation/oneDNN/blob/main/doc/performance_considerations/primitive_cache.md).
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")


def onednn_product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """The float32 product left · rightᵀ + bias of matrices [m, k] and [n, k] by oneDNN.

    Calls the operator that torch's compiler emits for linear layers on a CPU. torch's public ways to oneDNN's
    float32 product copy every operand into a layout of its own (`Tensor.to_mkldnn`). Can go when torch's own
    products use 512-bit instructions on processors not made by Intel
    (https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/mkldnn/Linear.cpp).
    """
    dense = (_dense(left), _dense(right))
    result: Tensor = torch.ops.mkldnn._linear_pointwise(*dense, bias, "none", [], "")
    return result


def _dense(matrix: Tensor) -> Tensor:
    """Rows or columns side by side in memory: with gaps between them oneDNN is a thousand times slower."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def score_quantised_as_trained(model: nn.Module) -> None:
    """Make bitsandbytes' layers on a CPU compute the same in training and in eval mode.

    Otherwise they choose another kernel by the mode, so that policy and reference would differ by what
    activations lose in 8 bits (0.02 nats a token, measured). The kernel a 4-bit layer changes to (AVX-512
    bfloat16) moreover cannot be left again, has no backward, and needs widths that are multiples of a block.
    Sets `support_avx512bf16_for_cpu` of a 4-bit layer; an 8-bit one runs in training mode, where it
    multiplies by the dequantised weights. On a GPU both modes are one. See `Linear4bit.forward` and `matmul`
    in https://github.com/bitsandbytes-foundation/bitsandbytes/tree/main/bitsandbytes. Can go when layers
    there ask for gradients instead of the mode.
    """
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        elif hasattr(layer, "init_8bit_state") and layer.weight.device.type == "cpu":
            layer.register_forward_pre_hook(_train_for_one_call)


def _train_for_one_call(module: nn.Module, inputs: Any) -> None:
    if module.training:
        return
    module.training = True

    def restore(module: nn.Module, inputs: Any, output: Any) -> None:
        module.training = False
        handle.remove()

    handle = module.register_forward_hook(restore)
