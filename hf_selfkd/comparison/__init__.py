"""Comparisons with equal budgets: methods, cells that run in processes of their own, intervals, a report."""
