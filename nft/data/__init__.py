"""Prompts of the tasks."""
