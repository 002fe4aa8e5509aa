"""What is on the host's side of a network card: backends that take and bring Ethernet frames."""
