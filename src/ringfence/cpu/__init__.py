"""What a virtual x86-64 CPU is: its state, its modes, and what sensitive instructions do."""
