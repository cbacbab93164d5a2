"""Schedules as data: windows, actions, nestings, plans, and what they cost; pure."""
