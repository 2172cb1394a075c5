"""QEMU: what it is told (`args`, `kernel_words`, `cmdline`), its monitor (`qmp`), its life (`machine`)."""
