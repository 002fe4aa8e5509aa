"""How a machine is saved, restored, cloned, and moved while it runs.

Everything here is written against the state protocol (``save`` and ``restore`` to plain data) and
against RAM with its log of dirty pages; it knows no chip, device or engine. `plain` writes plain
data as JSON, `description` what a machine is made of, `folder` is a snapshot on disk, `pages` finds
the pages worth keeping.
"""
