"""Measure guests from the outside: native, QEMU's translator and Ringfence, side by side.

``workloads`` says what is measured, ``image`` builds the one root file system that all sides
share, ``sides`` starts a guest (or the host's own shell) and talks to it, ``runner`` interleaves
the runs and takes the times, ``report`` prints them, ``split`` shows where Ringfence's time goes.
Run it with ``python -m bench``.
"""
