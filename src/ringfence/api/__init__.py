"""How programs and people reach machines that run in other processes: the control socket.

Each machine has a process of its own, and a folder under its name (`names`) with a Unix socket in
it. Who connects sends commands and gets answers, a line of JSON each (`protocol`). `commands` is
the table of them, and the whole of what can be asked; `server` and `client` are the two ends.
"""
