"""Names that `from __future__ import` asks for at run time; the compiler has acted on them long before."""

annotations = None
