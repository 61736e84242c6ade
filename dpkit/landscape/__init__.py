"""Loss landscapes: error and loss on planes through networks, around one network, and along lines through it.

Three kinds of surface, each with its specification, all measured by :func:`grid`: the plane through three networks
(:func:`plane`), the square of four (:func:`square`), and random filter-normalised directions around one (:func:`around`).
:func:`profile` measures lines through one network; :func:`project` says where other networks lie. A measured :class:`Grid` or
:class:`Profile` that is passed as ``known`` is refined: its points are taken over and only the new ones are evaluated.
"""
from dpkit.landscape.directions import filter_normalised, random_directions
from dpkit.landscape.measure import Grid, Profile, grid, profile
from dpkit.landscape.spec import FORMS, OTHERS, AroundSpec, MeasureSpec, PlaneSpec, ProfileSpec, SquareSpec
from dpkit.landscape.surfaces import Around, Plane, Projection, Square, around, plane, project, square

__all__ = ["FORMS", "OTHERS", "Around", "AroundSpec", "Grid", "MeasureSpec", "Plane", "PlaneSpec", "Profile", "ProfileSpec",
           "Projection", "Square", "SquareSpec", "around", "filter_normalised", "grid", "plane", "profile", "project",
           "random_directions", "square"]
