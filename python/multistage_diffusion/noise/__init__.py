"""Noise: schedules, the stages of their levels, draws of levels, preconditioning and losses."""
