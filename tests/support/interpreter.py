"""Triton's interpreter without what it repeats: the same results in two thirds of the time.

Before every call of every function inside a kernel it replaces the functions of the language by interpreted ones, and
looks through the whole language for them. Here a function called inside a kernel finds them replaced, and what is to
be replaced is looked up once. NumPy's types are looked up in one table in place of one made for each question.
"""

import inspect
from functools import cache


# functions of the interpreter as Triton has them
REPLACED = {}


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

    @cache
    def names(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def replace_builtins(package, builder, scope):
        for name in names(package):
            member = getattr(package, name)
            # those of a class may have been replaced beside another module
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

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

    quick = {
        "_get_np_dtype": numpy_type_of,
        "_patch_builtin": replace_builtins,
        "_patch_lang": replace_once,
    }
    for name, function in quick.items():
        REPLACED[name] = getattr(interpreter, name)
        setattr(interpreter, name, function)
