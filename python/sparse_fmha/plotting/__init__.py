"""Pictures, drawn from plain data; every module needs matplotlib."""
