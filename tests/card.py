"""A pretended CUDA card, for machines that have none: whole commands run with `device=cuda`, on real numbers, and what
would fail on a card fails.

Every tensor's storage remembers whether it is on the card. All of it is computed on the CPU, so that the numbers are
those of a CPU run, bit for bit, and `.item()`, sizes that depend on the images, files and checkpoints work as ever;
tensors say `cuda` of themselves when they are asked. torch's FakeTensorMode knows devices too, but no numbers: a step
ends at its first loss. Its rules about which devices an operation takes together are the ones here, and
tests/test_card.py compares them.

What is not pretended: kernels, streams (a copy that is not waited for is there at once), memory, torch.compile.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # before torch.cuda is patched, which it reads
from torch import Tensor
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

CARD, CPU, ANY = torch.device("cuda", 0), torch.device("cpu"), None
"""ANY: made by torch itself inside an operation, where its operands are."""
aten = torch.ops.aten
ACROSS = {aten.copy_.default, aten._foreach_copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Their indices may stay on the CPU."""


def place_of(tensor: Tensor, unknown: torch.device | None = CPU) -> torch.device | None:
    """Where a tensor is: what nobody has put on the card is on the CPU."""
    with torch._C.DisableTorchFunction():
        place: torch.device | None = getattr(tensor.untyped_storage(), "place", unknown)
    return place


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among arguments or results, and in lists of them."""
    found: list[Tensor] = []
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, list | tuple):
            found += _tensors(each)
    return found


@cache
def _targets(func: Any) -> list[tuple[int, str]]:
    """The arguments that an operation writes to: their places in the line, and their names."""
    arguments = enumerate(getattr(getattr(func, "_schema", None), "arguments", ()))
    return [(at, each.name) for at, each in arguments if each.alias_info is not None and each.alias_info.is_write]


def _pretending(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"


class _Places(TorchDispatchMode):
    """Checks the operands of every operation, gradients' included, and notes where its result is."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Any = ANY
        """Where the Python call that is running wants its result."""
        self.unknown: Any = CPU
        """Where operands are of which nothing is noted."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            kwargs = kwargs or {}
            operands = _tensors((*args, *kwargs.values()))
            place = CPU if func in ACROSS else self._common(func, args, operands)
            if func not in ACROSS:
                self._write(func, args, kwargs, place)
            out = func(*args, **kwargs)
            held = {each.untyped_storage()._cdata for each in operands}
            for made in _tensors((out,)):
                storage: Any = made.untyped_storage()
                if storage._cdata not in held:
                    storage.place = place if self.made is ANY else self.made
            return out

    def _of(self, tensor: Tensor) -> torch.device | None:
        return place_of(tensor, self.unknown)

    def _write(self, func: Any, args: Any, kwargs: Any, place: torch.device | None) -> None:
        """What is written to must be where the operands are, one number too; what torch has made itself is there from
        now on. `place`: the operands'."""
        for each in _tensors(args[at] if at < len(args) else kwargs.get(name) for at, name in _targets(func)):
            if place == CARD and self._of(each) == CPU:
                raise RuntimeError(f"{func}: operands on cuda, the result is written to cpu")
            if place is not ANY and self._of(each) is ANY:
                storage: Any = each.untyped_storage()
                storage.place = place

    def _common(self, func: Any, args: Any, operands: list[Tensor]) -> torch.device | None:
        """The place of all operands. A CPU's tensor without axes goes with any; a card's does not."""
        if func in INDEXING:
            places = [self._of(each) for each in args[1] if isinstance(each, Tensor)]
            if self._of(args[0]) == CARD or CARD not in places:
                operands = [args[0], *(each for each in args[2:3] if isinstance(each, Tensor))]
        places = [self._of(each) for each in operands if each.ndim]
        single = [self._of(each) for each in operands if not each.ndim]
        if CARD in places and CPU in places:
            raise RuntimeError(f"{func}: operands on cuda and on cpu; where was the latter made?")
        if CARD in single and CPU in places:
            raise RuntimeError(f"{func}: an operand without axes on cuda, others on cpu")
        known = [place for place in places or single if place is not ANY]
        if not known:
            return ANY if not operands or places else CPU
        return CARD if CARD in places or CARD in single else known[0]


_GETTER = type(Tensor.device.__get__)
_ASKED = [getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu")]


class _Calls(TorchFunctionMode):
    """Answers for tensors that are asked where they are, and takes `cuda` out of what torch is asked for."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if type(func) is _GETTER and func not in _ASKED:
            return func(*args)
        kwargs = dict(kwargs or {})
        if _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None:  # whose gradients on cuda need a driver
            return func(*args, **kwargs | ({} if kwargs.get("device") is None else {"device": CPU}))
        tensors = _tensors((*args, *kwargs.values()))
        if any(not _pretending(each) for each in tensors):
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return CPU if place_of(args[0]) == CPU else CARD
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return place_of(args[0]) != CPU
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return place_of(args[0]) == CPU
        if func is Tensor.get_device:
            return -1 if place_of(args[0]) == CPU else 0
        if func in (Tensor.numpy, Tensor.__array__) and place_of(args[0]) == CARD:
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")
        if func is Tensor.pin_memory:
            return args[0].clone()
        if func in (Tensor.__getitem__, Tensor.__setitem__) and any(isinstance(each, list) for each in args[1:2]):
            self._places.unknown = ANY  # the list becomes a tensor where the indexed one is
            try:
                return func(*args, **kwargs)
            finally:
                self._places.unknown = CPU
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args[0], list(args[1:]), kwargs)
        return self._made(func, args, kwargs, tensors)

    def _moved(self, func: Any, tensor: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        copy = kwargs.pop("copy", False)
        before = place_of(tensor)
        if args and isinstance(args[0], Tensor):
            place, dtype, shape = place_of(args[0]), args[0].dtype, None
        elif func is Tensor.to:
            place, dtype, _, shape = torch._C._nn._parse_to(*args, **kwargs)
        else:
            place, dtype, shape = (CPU if func is Tensor.cpu else CARD), None, kwargs.get("memory_format")
        there = before if place is None else CPU if place.type == "cpu" else CARD if place.type == "cuda" else place
        if there is not None and there.type == "meta":
            return tensor.to(*args, **kwargs)
        options: dict[str, Any] = {} if shape is None else {"memory_format": shape}
        with self._making(there if there != before else ANY):
            return tensor.to(dtype=dtype or tensor.dtype, copy=copy or there != before, **options)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        place = kwargs.get("device")
        if place is not None:
            place = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
            if place.type not in ("cuda", "cpu"):
                return func(*args, **kwargs)
            generator = kwargs.get("generator")
            if generator is not None and place.type == "cuda":
                raise RuntimeError(f"{resolve_name(func)}: a CPU's generator for a tensor on cuda")
            place = CPU if place.type == "cpu" else CARD
            kwargs["device"] = CPU
        elif not tensors:
            place = CPU
        with self._making(place):
            out = func(*args, **kwargs)
        if func is Tensor.__deepcopy__:  # which copies storages without an operation
            out.untyped_storage().place = place_of(args[0])
        if not tensors:  # torch.tensor makes its result without an operation
            for each in _tensors((out,)):
                storage: Any = each.untyped_storage()
                if not hasattr(storage, "place"):
                    storage.place = place
        return out

    @contextmanager
    def _making(self, place: torch.device | None) -> Iterator[None]:
        before, self._places.made = self._places.made, place
        try:
            yield
        finally:
            self._places.made = before


@contextmanager
def card() -> Iterator[None]:
    """While open, this process has a card. What is on it stays there, and cannot be used outside."""
    places = _Places()
    with pytest.MonkeyPatch.context() as patch:
        nothing: Any = lambda *_, **__: None  # noqa: E731
        answers: dict[str, Any] = {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "is_bf16_supported": lambda **_: True, "get_device_name": lambda *_: "a pretended card",
            "mem_get_info": lambda *_: (2**36, 2**36), "memory_allocated": lambda *_: 0,
            "max_memory_allocated": lambda *_: 2**20, "get_device_properties": lambda *_: SimpleNamespace(uuid="0"),
            "get_rng_state": lambda *_: torch.get_rng_state(),
            "set_rng_state": lambda state, *_: torch.set_rng_state(state),
            **dict.fromkeys(("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats"), nothing),
        }  # fmt: skip
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        stream = SimpleNamespace(is_capturing=lambda: False)
        patch.setattr(torch.accelerator, "current_stream", lambda *_: stream)
        begun = torch.autocast.__init__

        def begin(self: torch.autocast, device_type: str, *args: Any, **options: Any) -> None:
            begun(self, "cpu" if device_type == "cuda" else device_type, *args, **options)

        patch.setattr(torch.autocast, "__init__", begin)  # the card's autocast is the CPU's
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            asked = getattr(torch, name)
            patch.setattr(torch, name, lambda device="cpu", asked=asked: asked("cpu" if device == "cuda" else device))
        calls, frame = _Calls(places), checkpoint._CheckpointFrame

        class Frame(frame):  # type: ignore[misc, valid-type]
            """Recomputation happens inside of the backward pass, where torch has put modes of calls aside."""

            def __init__(self, recompute: Callable[..., None], *args: Any, **options: Any) -> None:
                def inside(*inputs: Any) -> None:
                    with calls:
                        recompute(*inputs)

                super().__init__(inside, *args, **options)

        patch.setattr(checkpoint, "_CheckpointFrame", Frame)
        patch.setitem(
            checkpoint._allowed_determinism_checks_to_fns, "default", lambda x: (x.shape, x.dtype, place_of(x))
        )
        with places, calls:
            yield
