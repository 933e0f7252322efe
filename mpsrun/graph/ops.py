"""The ops a branch may consist of: names that stand for callables, and nothing else does."""

import builtins
import math
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as functional

# Functions of torch's own namespaces that reach beyond tensors (files, foreign memory), change a tensor's
# storage, or serve layouts which branches do not have.
DENIED_PREFIXES = (
    "_", "cudnn_", "fbgemm_", "from_", "frombuffer", "is_", "miopen_", "mkldnn_", "q_", "quantize",
    "quantized", "resize", "set_", "sparse_", "sym_constrain",
)  # fmt: skip
DENIED = frozenset(
    {
        "apply_", "as_subclass", "asarray", "assert_int_or_pair", "backward", "boolean_dispatch",
        "broadcast_shapes", "can_cast", "const_data_ptr", "data_ptr", "dequantize", "detach_",
        "fake_quantize_per_channel_affine", "fused_moving_avg_obs_fake_quant", "get_device",
        "handle_torch_function", "has_torch_function", "has_torch_function_unary",
        "has_torch_function_variadic", "hspmm", "item", "map2_", "map_", "numpy", "pin_memory",
        "promote_types", "register_hook", "rename", "rename_", "requires_grad_", "result_type",
        "retain_grad", "share_memory_", "smm", "sspaddmm", "storage", "tolist", "untyped_storage",
        "vitals_enabled",
    }
)  # fmt: skip
# Private functions that Dynamo leaves in graphs of public modules.
PRIVATE = (
    "_adaptive_avg_pool2d", "_convolution", "_log_softmax", "_softmax", "_shape_as_tensor", "_stack",
    "_unique2", "_weight_norm", "_transformer_encoder_layer_fwd",
    "_native_multi_head_attention",
)  # fmt: skip
PRIVATE_NN = (
    "_pad_circular", "_pad_enum", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
)  # fmt: skip
# Tensor methods without a function of the same name in the torch namespace.
METHODS = frozenset(
    {
        "bfloat16", "bool", "byte", "cauchy_", "cdouble", "cfloat", "char", "contiguous", "copy_",
        "cpu", "cuda", "dim", "double", "element_size", "expand", "expand_as", "exponential_",
        "fill_diagonal_", "float", "geometric_", "half", "int", "log_normal_", "long", "ndimension",
        "nelement", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros",
        "random_", "repeat", "reshape_as", "short", "size", "stride", "sum_to_size", "to", "type",
        "type_as", "unfold", "uniform_", "unique", "view", "view_as", "zero_",
    }
)  # fmt: skip
ATTRIBUTES = ("shape", "dtype", "device", "T", "mT", "H", "mH", "real", "imag", "ndim")
OPERATORS = (
    "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "iadd", "iand", "ifloordiv",
    "imatmul", "imod", "imul", "inv", "invert", "ior", "ipow", "isub", "itruediv", "ixor", "le", "lt",
    "matmul", "mod", "mul", "ne", "neg", "not_", "or_", "pos", "pow", "setitem", "sub", "truediv",
    "xor",
)  # fmt: skip
MATH = (
    "acos", "asin", "atan", "atan2", "ceil", "cos", "cosh", "exp", "fabs", "floor", "log", "log10",
    "log2", "pow", "sin", "sinh", "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip
SYMBOLIC = ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sqrt", "sym_sum")
DATA = "_get_data_attr"  # what Dynamo writes for tensor.data; not in torch's stubs
MAX_INT_POWER = 64


def resolve(name: str) -> Callable[..., Any] | None:
    """The callable that `name` stands for, or None where the name is not on the list."""
    return _by_name().get(name)


def name_of(op: str, target: Any, args: tuple[Any, ...] = ()) -> str | None:
    """The name of an fx node's target (`op` is the node's op), or None where it is not on the list."""
    if op == "call_method":
        name = f"Tensor.{target}"
        return name if name in _by_name() else None
    if op != "call_function":
        return None
    if target is builtins.getattr:
        name = f"attr.{args[1]}" if len(args) == 2 else ""
        return name if name in _by_name() else None
    try:
        return _by_target().get(target)
    except TypeError:  # an unhashable callable
        return None


def describe(target: Any) -> str:
    """How a person would name the target of an fx node."""
    if isinstance(target, str):
        return f".{target}()"
    return str(getattr(target, "__name__", None) or target)


def _allowed(name: str) -> bool:
    return not name.startswith(DENIED_PREFIXES) and name not in DENIED


@lru_cache(maxsize=1)
def _by_name() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {}
    for prefix, found in (
        ("torch", _torch_functions()),
        ("torch.nn.functional", _functional()),
        ("torch._C._nn", _members(torch._C._nn, PRIVATE_NN)),
        ("torch.fft", _members(torch.fft)),
        ("torch.linalg", _members(torch.linalg)),
        ("torch.special", _members(torch.special)),
        ("operator", {name: getattr(operator, name) for name in OPERATORS}),
        ("math", {name: getattr(math, name) for name in MATH}),
        ("Tensor", _methods()),
        ("attr", {name: operator.attrgetter(name) for name in ATTRIBUTES}),
    ):
        table.update({f"{prefix}.{name}": target for name, target in found.items()})
    table["operator.pow"], table["operator.ipow"] = _power, _power_in_place
    table["autograd.data"] = getattr(torch._C._autograd, DATA)
    return table


@lru_cache(maxsize=1)
def _by_target() -> dict[Any, str]:
    targets: dict[Any, str] = {}
    for name, target in _by_name().items():
        if not name.startswith(("Tensor.", "attr.")):
            targets.setdefault(target, name)
    targets.update({operator.pow: "operator.pow", operator.ipow: "operator.ipow"})
    # What Dynamo writes for these attributes from torch 2.14 on.
    aten = torch.ops.aten
    targets.update({aten.numpy_T: "attr.T", aten.mT: "attr.mT", aten.matrix_H: "attr.H", aten.mH: "attr.mH"})
    return targets


def _torch_functions() -> dict[str, Callable[..., Any]]:
    variable = torch._C._VariableFunctions
    names = [name for name in dir(variable) if _allowed(name)] + list(PRIVATE)
    found = {name: getattr(torch, name, None) or getattr(variable, name) for name in names if hasattr(variable, name)}
    for name in (*filter(_allowed, torch.functional.__all__), *SYMBOLIC):
        if hasattr(torch, name):
            found[name] = getattr(torch, name)
    return found


def _functional() -> dict[str, Callable[..., Any]]:
    homes = {"torch.nn.functional", "torch._C._nn", None}
    return {
        name: target
        for name, target in vars(functional).items()
        if callable(target) and not isinstance(target, type) and _allowed(name)
        if getattr(target, "__module__", None) in homes
        or getattr(torch, name, None) is target
        or name in dir(torch._C._VariableFunctions)
    }


def _members(module: Any, private: tuple[str, ...] = ()) -> dict[str, Callable[..., Any]]:
    names = [name for name in dir(module) if _allowed(name) and not name[0].isupper()]
    found = {name: getattr(module, name) for name in [*names, *private] if hasattr(module, name)}
    return {
        name: target
        for name, target in found.items()
        if callable(target) and not isinstance(target, type) and type(target).__name__.startswith("builtin_")
    }


def _methods() -> dict[str, Callable[..., Any]]:
    functions = set(_torch_functions())
    found = {}
    for name in dir(torch.Tensor):
        if name in METHODS or (_allowed(name) and (name in functions or name.removesuffix("_") in functions)):
            target = getattr(torch.Tensor, name)
            if callable(target):
                found[name] = target
    return found


def _power(base: Any, exponent: Any) -> Any:
    """`operator.pow` without the whole numbers that would fill memory."""
    _check_power(base, exponent)
    return operator.pow(base, exponent)


def _power_in_place(base: Any, exponent: Any) -> Any:
    """`operator.ipow` without the whole numbers that would fill memory."""
    _check_power(base, exponent)
    return operator.ipow(base, exponent)


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and abs(exponent) > MAX_INT_POWER:
        raise ValueError(f"power of whole numbers: expected an exponent up to {MAX_INT_POWER}, found {exponent}")
