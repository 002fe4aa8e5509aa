"""What an enlightened guest asks of the VMM: so far, the paravirtual clock."""
