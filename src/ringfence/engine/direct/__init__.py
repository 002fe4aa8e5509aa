"""Direct execution: user code of a guest runs on the host's CPU as it is, in a process of its own.

Most instructions of user code need no virtual machine monitor at all: what they may touch is
decided by page tables, and what they may not do traps. So the guest's kernel is translated, and
user code that computes for long is given the CPU itself, as early monitors of this processor did.
Each guest address space that deserves it has a host process whose memory is nothing but pages of
guest RAM, at the guest's own addresses. It has no system calls: the tracer takes them all.

| file | concept |
|---|---|
| `space.py` | a guest address space, and which pages of it the process has |
| `mapping.py` | what the guest's page tables say, and bringing the process in line with that |
| `scan.py` | pages whose code would behave otherwise in a process than in the guest |
| `ptrace.py` | stopping, resuming, registers: the host's calls |
| `run.py` | from the guest's registers to the process and back, once for each piece of user code |
| `stub.py` | the few instructions of ours in the process |
| `process.py` | making and ending processes |
| `host.py` | whether the host allows it |
| `policy.py` | which address spaces deserve it |

What an instruction *means* that doesn't run to its end there (a page fault, a system call, an
exception, a look at the time) is not decided here: the registers go back to the virtual CPU, and
the instruction is translated like any other.
"""
