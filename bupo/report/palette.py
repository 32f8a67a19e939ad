"""The colours of all figures and pages: Okabe and Ito's, which colour-blind people can distinguish.

In a page, each of VARIABLES is a CSS variable, which has another value on a dark screen.
"""

INK, GREY, GRID = "#1f2937", "#6b7280", "#e5e7eb"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#c77800", "#009e73", "#b0578d"
SERIES = [BLUE, ORANGE, GREEN, PURPLE, "#56b4e9", "#d55e00", "#9a8700", GREY]
"""Colours of the first of several runs, the second, ..."""
OF_SEGMENT = {"exploration": "#e69f00", "integration": "#9ca3af", "convergence": "#56b4e9"}
VARIABLES = {
    INK: ("ink", "#e5e7eb"),
    GREY: ("soft", "#9ca3af"),
    GRID: ("line", "#2b313a"),
    BLUE: ("blue", "#56b4e9"),
    ORANGE: ("orange", "#f0a830"),
    GREEN: ("green", "#2fc79b"),
    PURPLE: ("purple", "#e08fc0"),
}
"""The name of a colour's CSS variable and its value on a dark screen, by colour"""
