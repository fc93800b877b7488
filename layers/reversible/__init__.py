"""Recurrent layers whose states are computed again from the last one."""
