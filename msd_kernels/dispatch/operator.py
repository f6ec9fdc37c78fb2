"""Registration of the ops with PyTorch's dispatcher, and the way around it for ordinary eager calls.

It does what ``torch.library.custom_op`` does for a functional op, at a fraction of its time per call: on small feature
maps, and behind kernels that leave nothing of Python in the caches, that time is most of an op's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from inspect import Parameter as Argument
from inspect import signature
from itertools import chain, islice
from typing import Any, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from msd_kernels import _private
from msd_kernels.dispatch import arguments, flops
from msd_kernels.dispatch.backends import FallbackWarning, own_choice, use
from msd_kernels.dispatch.layout_cache import LAYOUTS, PLAIN

# Calls to remember per op: a compiled step repeats its calls.
MOST_PASSED = 4096

Context = torch.autograd.function.FunctionCtx

NAMESPACE = "msd_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

# With only this key left below autograd, no mode, subclass, transform or lazy view waits for the call.
_DEVICE_ALONE: frozenset[int] = frozenset()
if _private.AROUND_THE_DISPATCHER:
    _DEVICE_ALONE = frozenset(
        _private.DispatchKeySet(key).raw_repr()
        for key in (_private.DispatchKey.CPU, _private.DispatchKey.CUDA)
    )


class Form:
    """How a kernel takes its arguments, and how the dispatcher does: tensors first, then a layout, then options.

    Tensors are single ones, then lists with one tensor per stage. The dispatcher knows no NamedTuples, so the fields of
    the layout are arguments of the registered op.
    """

    def __init__(self, kernel: Callable[..., Any]) -> None:
        signed = signature(kernel, eval_str=True)
        arguments = list(signed.parameters.values())
        self.num_singles = sum(a.annotation in (Tensor, Tensor | None) for a in arguments)
        self.num_lists = sum(a.annotation == Sequence[Tensor] for a in arguments)
        self.returns_list = signed.return_annotation == list[Tensor]
        at = self._at = self.num_singles + self.num_lists
        layout = arguments[at].annotation if at < len(arguments) else None
        self._layout = layout if hasattr(layout, "_fields") else None
        if self._layout is not None:
            fields = [
                Argument(name, Argument.POSITIONAL_OR_KEYWORD, annotation=_schema_type(kind))
                for name, kind in get_type_hints(layout).items()
            ]
            self._end = at + len(fields)
            arguments[at : at + 1] = fields
        self.num_options = len(arguments) - at

        def prototype(*args: Any) -> Any:
            """Of which only the signature is read."""

        prototype.__signature__ = signed.replace(parameters=arguments)
        self.schema = torch.library.infer_schema(prototype, mutates_args=())

    def flat(self, args: Sequence[Any]) -> Sequence[Any]:
        """The dispatcher's arguments of a kernel's."""
        if self._layout is None:
            return args
        return (*args[: self._at], *args[self._at], *args[self._at + 1 :])

    def whole(self, flat: Sequence[Any]) -> Sequence[Any]:
        """The kernel's arguments of the dispatcher's, whose lists become what has a hash."""
        if self._layout is None:
            return flat
        fields = (tuple(f) if isinstance(f, list) else f for f in flat[self._at : self._end])
        return (*flat[: self._at], LAYOUTS.same(self._layout(*fields)), *flat[self._end :])

    def settings(self, flat: Sequence[Any]) -> Sequence[Any]:
        """The layout of the dispatcher's arguments, and what follows it; all arguments where there is no layout."""
        return flat if self._layout is None else self.options(self.whole(flat))

    def of_flat(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` as the dispatcher calls it."""
        return function if self._layout is None else lambda *flat: function(*self.whole(flat))

    def tensors(self, args: Sequence[Any]) -> Sequence[Any]:
        """What stands for tensors among arguments, or for their gradients: the single ones, then those of the lists."""
        if not self.num_lists:
            return args[: self.num_singles]
        return (*args[: self.num_singles], *chain.from_iterable(args[self.num_singles : self._at]))

    def lengths(self, args: Sequence[Any]) -> tuple[int, ...]:
        """Of the lists."""
        return tuple(map(len, args[self.num_singles : self._at]))

    def options(self, args: Sequence[Any]) -> Sequence[Any]:
        """The layout, and what follows it."""
        return args[self._at :]

    def arguments(self, tensors: Sequence[Any], lengths: tuple[int, ...], options: Sequence[Any]) -> tuple:
        """The kernel's arguments, put together again."""
        rest = iter(tensors[self.num_singles :])
        lists = (list(islice(rest, length)) for length in lengths)
        return (*tensors[: self.num_singles], *lists, *options)


def _schema_type(kind: Any) -> Any:
    return Sequence[kind.__args__[0]] if get_origin(kind) is tuple else kind


class _Counted:
    """An op whose FLOPs PyTorch counts."""

    _name: str
    _form: Form

    def register_flops(self, count: Callable[..., int]) -> Callable[..., int]:
        """A decorator: ``count(layout, *options)`` are the FLOPs of a call.

        An op without a layout is counted from all of its arguments, with shapes in the place of tensors.
        """
        packet = getattr(getattr(torch.ops, NAMESPACE), self._name)
        flops.register(packet, flops.Formula(self._form.settings, count))
        return count


class Operator(_Counted):
    """An op without aliases and side effects, whose arguments are all positional and without defaults.

    Args:
        name: its name below ``torch.ops.msd_kernels``.
        kernel: computes it for every device; the annotations of its arguments make the schema. Tensors come first, then
            lists of tensors, a layout may follow.
        check: raises for arguments that do not fit each other. It sees the calls that come through the dispatcher, the
            fake ones included; this library's own are checked before.
    """

    def __init__(self, name: str, kernel: Callable[..., Any], check: Callable[..., None]) -> None:
        self._kernel = kernel
        self._name = name
        self._check = check
        self._passed: set[tuple] = set()
        self._form = Form(kernel)
        LIBRARY.define(name + self._form.schema, tags=TAGS)
        LIBRARY.impl(name, self._checked(kernel), "CompositeExplicitAutograd")
        self._overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        self._function: type[torch.autograd.Function] | None = None
        self._warned = False

    def __call__(self, *args: Any) -> Any:
        tensors = self._form.tensors(args)
        if _observed(tensors):
            return self._overload(*self._form.flat(args))
        if _private.forward_mode() or (torch.is_grad_enabled() and _private.any_requires_grad(*tensors)):
            return self._differentiable(None, args, tensors)
        with _private.below_autograd():
            return self._kernel(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """A decorator: ``fake`` allocates what the kernel returns, without computing it."""
        torch.library.register_fake(f"{NAMESPACE}::{self._name}", self._checked(fake), lib=LIBRARY)
        return fake

    def _checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            self._require(args)
            return function(*args)

        return self._form.of_flat(checked)

    def _require(self, args: Sequence[Any]) -> None:
        """Checks arguments, or knows them by a call that has passed; of symbolic sizes nothing is known yet."""
        try:
            key = tuple([arguments.seen_of(arg) for arg in args])
            if key in self._passed:
                return
        except (TypeError, RuntimeError):  # symbols have no hash, sparse tensors no strides
            if arguments.are_symbolic(self._form.flat(args)):
                return
            key = None
        self._check(*args)
        if len(self._passed) >= MOST_PASSED:
            self._passed.clear()
        if key is not None:
            self._passed.add(key)

    def register_autograd(
        self,
        backward: Callable[..., Sequence],
        *,
        setup_context: Callable[[Context, tuple, Any], None],
    ) -> None:
        """``setup_context(ctx, inputs, output)`` saves what ``backward(ctx, *cotangents)`` needs.

        ``backward`` returns a gradient, or None, for each tensor, those of the lists behind the single ones;
        ``ctx.needed`` says in that order which are needed. What is missing at the end has none.
        """

        def forward(ctx: Context, keyset: Any, lengths: tuple, options: Sequence[Any], *tensors: Any) -> Any:
            args = self._form.arguments(tensors, lengths, options)
            output = self._below_autograd(keyset, *args)
            setup_context(ctx, args, output)
            ctx.backend = own_choice()
            return tuple(output) if self._form.returns_list else output

        def backward_with_keyset(ctx: Context, *cotangents: Any) -> tuple:
            ctx.needed = ctx.needs_input_grad[3:]
            gradients = _by_choice_of_forward(backward, ctx, cotangents)
            return (None, None, None, *gradients, *(None,) * (len(ctx.needed) - len(gradients)))

        self._function = type(
            f"{self._name}_autograd",
            (torch.autograd.Function,),
            {"forward": staticmethod(forward), "backward": staticmethod(backward_with_keyset)},
        )
        LIBRARY.impl(self._name, self._dispatched, "Autograd", with_keyset=True)

    def _dispatched(self, keyset: Any, *flat: Any) -> Any:
        args = self._form.whole(flat)
        self._require(args)
        return self._differentiable(keyset, args, self._form.tensors(args))

    def _differentiable(self, keyset: Any, args: Sequence[Any], tensors: Sequence[Any]) -> Any:
        """``keyset`` is the dispatcher's, None for a call around it."""
        differentiated = torch.is_grad_enabled() and _private.any_requires_grad(*tensors)
        transformed = differentiated and _private.transforms_active()
        if transformed or (_private.forward_mode() and any(map(_has_tangent, tensors))):
            return self._plain(*args)
        if differentiated:
            form = self._form
            output = self._function.apply(keyset, form.lengths(args), form.options(args), *tensors)
            return list(output) if form.returns_list else output
        return self._below_autograd(keyset, *args)

    def _plain(self, *args: Any) -> Any:
        """By the reference, which is plain PyTorch and so has forward-mode derivatives and torch.func's."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._name}: served by 'reference', which alone has forward-mode and torch.func derivatives",
                FallbackWarning,
                stacklevel=4,
            )
        with use("reference"):
            return self._kernel(*args)

    def _below_autograd(self, keyset: Any, *args: Any) -> Any:
        with _private.below_autograd():
            if keyset is None or (keyset & _private.below_autograd_keyset).raw_repr() in _DEVICE_ALONE:
                return self._kernel(*args)
            return self._overload.redispatch(keyset & _private.below_autograd_keyset, *self._form.flat(args))


class PublicOperator(_Counted):
    """An :class:`Operator` by ``torch.library.custom_op``, for a PyTorch that lacks what goes around the dispatcher.

    It costs some ten times as much per call, and has no forward-mode derivatives.
    """

    def __init__(self, name: str, kernel: Callable[..., Any], check: Callable[..., None]) -> None:
        def checked(*args: Any) -> Any:
            check(*args)
            return kernel(*args)

        self._name, self._form, self._check = name, Form(kernel), check
        self._op = torch.library.custom_op(
            f"{NAMESPACE}::{name}",
            self._form.of_flat(checked),
            mutates_args=(),
            schema=self._form.schema,
            tags=TAGS,
        )

    def __call__(self, *args: Any) -> Any:
        return self._op(*self._form.flat(args))

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            if not arguments.are_symbolic(self._form.flat(args)):
                self._check(*args)
            return fake(*args)

        self._op.register_fake(self._form.of_flat(checked))
        return fake

    def register_autograd(
        self,
        backward: Callable[..., Sequence],
        *,
        setup_context: Callable[[Context, tuple, Any], None],
    ) -> None:
        def setup(ctx: Context, inputs: tuple, output: Any) -> None:
            args = self._form.whole(inputs)
            setup_context(ctx, args, output)
            ctx.backend, ctx.lengths = own_choice(), self._form.lengths(args)

        def backward_by_choice(ctx: Context, *cotangents: Any) -> tuple:
            ctx.needed = tuple(self._form.tensors(ctx.needs_input_grad))
            if self._form.returns_list:  # whose cotangents come in one list
                (cotangents,) = cotangents
            gradients = _by_choice_of_forward(backward, ctx, cotangents)
            gradients = (*gradients, *(None,) * (len(ctx.needed) - len(gradients)))
            return self._form.arguments(gradients, ctx.lengths, (None,) * self._form.num_options)

        self._op.register_autograd(backward_by_choice, setup_context=setup)


def _by_choice_of_forward(backward: Callable[..., Sequence], ctx: Context, cotangents: Sequence) -> Sequence:
    """``backward`` with the backend that :func:`use` forced for its forward."""
    if ctx.backend is None:
        return backward(ctx, *cotangents)
    with use(ctx.backend):
        return backward(ctx, *cotangents)


def _observed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the dispatcher must see the call: for a compiler, trace, profiler, mode, transform or subclass."""
    if torch.compiler.is_compiling() or _private.profiler_enabled() or _private.is_tracing():
        return True
    if _private.dispatch_modes() or _private.transforms_active():
        return True
    if tensors[0].is_meta or not PLAIN.issuperset(map(type, tensors)):
        return True
    for tensor in tensors:  # noqa: SIM110 (a generator takes three times as long)
        if tensor is not None and tensor.is_neg():
            return True
    return False


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor, level=0).tangent is not None


def operator(
    name: str, check: Callable[..., None]
) -> Callable[[Callable[..., Any]], Operator | PublicOperator]:
    """A decorator that makes an operator of its kernel."""
    kind = Operator if _private.AROUND_THE_DISPATCHER else PublicOperator
    return lambda kernel: kind(name, kernel, check)
