"""The passes that a pipeline can name: ours, and those that other packages add through the entry point `graphwright.passes`.

Entry points are loaded when a name is not ours, or when all passes are listed; never on import.
"""

import difflib
from importlib.metadata import EntryPoint, entry_points

from ..ir.errors import PassError
from .base import Pass
from .cleanups import CLEANUPS
from .experts import ExpertChoice, RegroupExperts
from .kv_cache import KVCache
from .layer_skip import LayerSkip
from .low_rank import AbsorbOutliers, AppendLoRA, Quantize, Smooth, SplitLowRank
from .rat import RatRecurrence
from .slicing import SliceGroups

GROUP = "graphwright.passes"
BUILT_IN: dict[str, type[Pass]] = {
    **{each.name: type(each) for each in CLEANUPS},
    **{
        each.name: each
        for each in (
            *(SliceGroups, Smooth, SplitLowRank, Quantize, AbsorbOutliers, AppendLoRA, RegroupExperts, ExpertChoice, RatRecurrence),
            *(KVCache, LayerSkip),
        )
    },
}


def pass_named(name: str) -> type[Pass]:
    """The pass class called `name`; `module:Class` is imported.

    Raises:
        PassError: no installed package has it (with the nearest names), or its module fails to import.
    """
    if ":" in name:
        return _loaded(EntryPoint(name, name, GROUP), f"pass {name}")
    if name in BUILT_IN:
        return BUILT_IN[name]
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return _load(entry)
    known = {*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))}
    near = difflib.get_close_matches(name, sorted(known), n=3)
    advice = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(known))}; one of yours is module:Class"
    raise PassError(f"no pass is called {name}: {advice}")


def all_passes() -> dict[str, type[Pass]]:
    """Every pass by name, those of other packages included. Raises PassError when one of these fails to import."""
    return dict(sorted({**{entry.name: _load(entry) for entry in entry_points(group=GROUP)}, **BUILT_IN}.items()))


def _load(entry: EntryPoint) -> type[Pass]:
    source = f"{entry.dist.name} " if entry.dist is not None else ""
    loaded = _loaded(entry, f"pass {entry.name} of package {source}({entry.value})")
    if loaded.name != entry.name:
        raise PassError(f"entry point {entry.name} of package {source}({entry.value}) holds a pass named {loaded.name}")
    return loaded


def _loaded(entry: EntryPoint, what: str) -> type[Pass]:
    try:
        loaded = entry.load()
    except Exception as error:
        raise PassError(f"{what} fails to import: {type(error).__name__}: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise PassError(f"{what} is not a subclass of graphwright's Pass")
    return loaded
