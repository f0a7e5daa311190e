"""What the compiler did, to look at: one JSON document of a compile, and one page that shows it.

The document holds plain data alone and is described by `schema.json`; the page holds the document, its own code and no address of
anything else.
"""

from .document import VERSION, document
from .layer_errors import LayerError, layer_errors
from .page import page
from .story import KernelRun, Profile, Story

__all__ = ["VERSION", "KernelRun", "LayerError", "Profile", "Story", "document", "layer_errors", "page"]
