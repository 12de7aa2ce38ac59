"""Triton's interpreter without what it repeats: the same results in half of the time.

Before every call of every function inside a kernel it replaces the functions of the language by interpreted ones, and
looks through the whole language for them. Here a function called inside a kernel finds them replaced, and what is to
be replaced is looked up once. NumPy's types are looked up in one table in place of one made for each question, and
shapes are made once. Whether integers overflow is not computed where nobody is told, which is so without `debug`.
"""

import inspect
import math
from functools import cache


# functions as Triton has them, by their owner and name
REPLACED = {}


def _replace(owner, name: str, function) -> None:
    REPLACED[owner, name] = getattr(owner, name)
    setattr(owner, name, function)


def quicken() -> None:
    """Change the interpreter of this process; a Triton that keeps no scopes of replacements stays as it is."""
    from triton import language
    from triton.runtime import interpreter

    if REPLACED or not hasattr(interpreter, "_LangPatchScope"):
        return
    replace, replaced = interpreter._patch_lang, set()
    is_builtin = language.core.is_builtin

    @cache
    def languages(fn):
        modules = filter(inspect.ismodule, fn.__globals__.values())
        return frozenset(module for module in modules if module in (language, language.core))

    def replace_attribute(owner, name, member, builder, scope):
        # what wraps a builtin asks for `_semantic` only
        function, semantic = inspect.unwrap(member), interpreter.interpreter_semantic

        def interpreted(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(owner, name, interpreted)

    @cache
    def names(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def replace_builtins(package, builder, scope):
        for name in names(package):
            member = getattr(package, name)
            # those of a class may have been replaced beside another module
            if is_builtin(member):
                replace_attribute(package, name, member, builder, scope)

    def replace_once(fn):
        new = languages(fn) - replaced
        if not new and languages(fn):
            return interpreter._LangPatchScope()
        scope = replace(fn)
        replaced.update(new)
        restore = scope.restore

        def restored():
            restore()
            replaced.difference_update(new)

        scope.restore = restored
        return scope

    numpy_type = cache(interpreter._get_np_dtype)

    def numpy_type_of(kind):
        # of the kinds only scalars have a hash
        scalar = kind.element_ty if isinstance(kind, language.block_type) else kind
        pointer = isinstance(scalar, language.pointer_type)
        return interpreter.np.dtype("uint64") if pointer else numpy_type(scalar)

    _replace(interpreter, "_get_np_dtype", numpy_type_of)
    _replace(interpreter, "_patch_builtin", replace_builtins)
    _replace(interpreter, "_patch_lang", replace_once)
    _replace(interpreter, "_patch_attr", replace_attribute)
    _quicken_types(language.core)
    _quicken_semantic()


def _quicken_types(core) -> None:
    """Make the shape of a block and of a tensor once, in place of its parts each time."""
    make_block_type, unwrap = core.block_type.__init__, core._unwrap_if_constexpr

    @cache
    def checked(sizes):
        shape = core.tuple(sizes)
        return shape, core.validate_block_shape(shape), str(shape)

    @cache
    def constants(sizes):
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def block_type(self, element_ty, shape):
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        if not sizes or any(type(size) is not int for size in sizes):
            make_block_type(self, element_ty, shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, shown = checked(sizes)
        self.name = f"<{shown}, {element_ty}>"

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = constants(tuple(type.shape) if type.is_block() else ())

    def unwrapped(value):
        kind = type(value)
        if kind is core.constexpr:
            return value.value
        return value if kind is int or kind is core.tensor else unwrap(value)

    _replace(core.block_type, "__init__", block_type)
    _replace(core.tensor, "__init__", tensor)
    _replace(core, "_unwrap_if_constexpr", unwrapped)


def _quicken_semantic() -> None:
    from triton.language.semantic import TritonSemantic

    check, broadcast = TritonSemantic.binary_op_sanitize_overflow_impl, TritonSemantic.broadcast_impl_value

    def check_overflow(self, lhs, rhs, binary_op):
        if self.builder.options.debug:
            check(self, lhs, rhs, binary_op)

    def broadcast_value(self, lhs, rhs):
        # of one size each shape is made once; a scalar has an empty one
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    _replace(TritonSemantic, "binary_op_sanitize_overflow_impl", check_overflow)
    _replace(TritonSemantic, "broadcast_impl_value", broadcast_value)
