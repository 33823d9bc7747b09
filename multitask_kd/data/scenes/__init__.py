"""Procedural street scenes: how they are drawn, labelled and cached; the layout that reads them is
layouts/scenes.py."""
