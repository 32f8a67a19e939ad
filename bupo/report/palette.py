"""Colours of figures and page: Okabe and Ito's, which colour-blind people can tell apart. In the
page each is a CSS variable, with another value on a dark screen."""

INK, GREY, GRID = "#1f2937", "#6b7280", "#e5e7eb"
LAYER, ATTENTION, FFN, NORMED = "#0072b2", "#c77800", "#009e73", "#b0578d"
OF_POLICY = {"layer": LAYER, "attention": ATTENTION, "ffn": FFN}
OF_SEGMENT = {"exploration": "#e69f00", "integration": "#9ca3af", "convergence": "#56b4e9"}
VARIABLES = {
    INK: "ink",
    GREY: "soft",
    GRID: "line",
    LAYER: "layer",
    ATTENTION: "attention",
    FFN: "ffn",
    NORMED: "normed",
}
"""Colour to the name of its CSS variable"""
