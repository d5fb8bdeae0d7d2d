"""How a group element is chosen: in closed form, by ascent in the algebra, or at random."""

from teleport_lite.search.ascent import STEPS, ascent
from teleport_lite.search.choose import search
from teleport_lite.search.closed_form import closed_form, has_closed_form, searched_factors

__all__ = ["STEPS", "ascent", "closed_form", "has_closed_form", "search", "searched_factors"]
