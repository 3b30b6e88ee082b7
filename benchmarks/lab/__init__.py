"""Hosts and cables emulated on one machine, as root: what tests and notebook 08 measure on them."""
