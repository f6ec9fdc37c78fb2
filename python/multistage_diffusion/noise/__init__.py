"""Noise: schedules, the stages of their levels, draws of levels, preconditioning and losses."""

SCHEDULE_NAMES = ("edm", "vp", "ve", "ldm", "flow")  # the keys of ``schedules.SCHEDULES``, without torch
