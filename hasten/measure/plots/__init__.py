"""Plots of a bench result as inline SVG.

Each plot is drawn twice, for wide and for narrow screens, and the page shows the one that fits.
Colours are stand-ins while drawing and become CSS variables, so that one drawing serves light and
dark pages alike. Text stays text. A plot without data is an empty string.
"""

from hasten.measure.plots.bars import cache_plot, memory_plot, throughput_plot
from hasten.measure.plots.pairs import pairs_plot
from hasten.measure.plots.ratios import ratio_plot

__all__ = ["cache_plot", "memory_plot", "pairs_plot", "ratio_plot", "throughput_plot"]
