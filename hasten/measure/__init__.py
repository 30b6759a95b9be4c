"""Measuring as code: clocks, limits, ceilings, quality, memory, the ledger and reports.

Nothing in this folder knows an engine. Every number that leaves it carries one of three labels:
`measured` (timed or counted here), `modelled` (computed from measured figures) or `cited` (claimed
by a paper).
"""
